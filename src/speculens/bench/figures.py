"""Records to figures: each measure of docs/benchmarks.md, pooled and by topic, with its spread.

Spread is told twice. Quartiles say how much prompts differ; an interval says how sure the pooled figure is: the central
95 % of its values when as many cases are drawn again, with replacement, from those that were measured (bootstrap).
Turns of one conversation are drawn together, because they depend on each other.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from speculens.answer import Answer, Entry
from speculens.bench.record import NONE, Record, RunFolder, entry, read_closer, read_records
from speculens.errors import UserError

DRAWS = 1000
LEVEL = 0.95
POOLED = "all"
# While speed is measured nobody waits for the device, so the clock of a part tells nothing there; the closer look does.
UNTIMED = ("seconds", "draft_time_fraction")


def conclude(folder: RunFolder, errors: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write and return the summary of a run; `errors` are cases that could not be asked, and why."""
    setting, closer = folder.read("setting"), read_closer(folder.path)
    summary = {**summarise(read_records(folder.path), setting, closer), "errors": dict(errors or {})}
    folder.write("summary", summary)
    return summary


def check_measured(summary: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError, with the first reason, if a run has no figures."""
    if not summary["questions"]:
        why = next(iter(summary["errors"].values()), "the suite is empty.")
        raise UserError(f"Nothing could be measured in {folder}: {why}")


def summarise(records: Sequence[Record], setting: Mapping[str, Any], closer: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a run came to, in plain JSON types."""
    topics = sorted({record.topic for record in records})
    return {
        "setting": dict(setting),
        "cases": len({record.case for record in records}),
        "questions": len(records),
        "topics": topics,
        "drafters": {
            name: _contender(name, [record for record in records if name in record.answers], topics, closer)
            | {"loop": about["loop"], "failures": _failures(name, records)}
            for name, about in setting["drafters"].items()
        },
    }


def _contender(
    name: str, records: Sequence[Record], topics: Sequence[str], closer: Mapping[str, Any]
) -> dict[str, Any]:
    costs = closer["costs"].get(name)
    by_topic = {topic: [record for record in records if record.topic == topic] for topic in topics}
    return {
        "differences": differences(name, records),
        POOLED: _with_costs(figures(name, records), costs) if records else None,
        "topics": {topic: figures(name, some) for topic, some in by_topic.items() if some},
    }


def _failures(name: str, records: Sequence[Record]) -> dict[str, int]:
    """Why there was no answer, counted."""
    return dict(Counter(record.failures[name] for record in records if name in record.failures).most_common())


def figures(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """One contender's measures over some records."""
    line = entry(name, records)
    stats = line.stats
    speedup, length = line.walltime_speedup, stats.mean_acceptance_length
    memory = [peak for record in records if (peak := record.memory.get(name)) is not None]
    return {
        "questions": len(records),
        "num_output_tokens": line.tokens,
        "exact": line.num_exact / len(records),
        **_speedup("walltime_speedup", name, records, speedup, attrgetter("seconds")),
        **_speedup("decode_speedup", name, records, line.decode_speedup, attrgetter("decode_seconds")),
        **{key: value for key, value in stats.to_dict().items() if key not in UNTIMED},
        "mean_acceptance_length_interval": _length_interval(name, records),
        "efficiency": speedup / length if length else 0.0,
        "decode_efficiency": line.decode_speedup / length if length else 0.0,
        "seconds_per_pass": _per_pass(line),
        "time_to_first_token": statistics.median(answer.time_to_first_token for answer in line.answers),
        "tokens_per_second": line.tokens / line.seconds,
        "peak_memory": max(memory, default=None),
        "wall_seconds": line.seconds,
    }


def differences(name: str, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Where tokens first part from the target's own, and by how little its two best choices differ there."""
    places = zip(records, entry(name, records).differences, strict=True)
    return [
        {"case": record.case, "turn": record.turn, "token": place, "gap": record.gaps.get(name)}
        for record, place in places
        if place is not None
    ]


def _with_costs(pooled: dict[str, Any], costs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Where the time goes, from the closer look: it ran eagerly and waited for the device around each part."""
    if not costs:
        return pooled
    return {**pooled, "draft_time_fraction": costs["draft_time_fraction"], "costs": dict(costs)}


def _speedup(
    key: str, name: str, records: Sequence[Record], pooled: float, seconds: Callable[[Answer], float]
) -> dict[str, Any]:
    """A speedup of all records together, its interval, and the median and quartiles of the pairs."""
    own = [seconds(record.answers[NONE]) for record in records]
    mine = [seconds(record.answers[name]) for record in records]
    ratios = [before / after for before, after in zip(own, mine, strict=True) if after > 0]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist() if ratios else [0.0] * 3
    return {
        key: pooled,
        f"{key}_interval": bootstrap(_by_case(records, own), _by_case(records, mine)),
        f"{key}_median": middle,
        f"{key}_quartiles": [low, high],
    }


def _length_interval(name: str, records: Sequence[Record]) -> list[float] | None:
    stats = [record.answers[name].generation.stats for record in records]
    tokens, passes = ([getattr(s, key) for s in stats] for key in ("num_tokens", "num_drafts"))
    return bootstrap(_by_case(records, tokens), _by_case(records, passes))


def _per_pass(line: Entry) -> float:
    """Wall time of decoding over target passes."""
    passes = line.stats.num_drafts
    return sum(answer.decode_seconds for answer in line.answers) / passes if passes else 0.0


def _by_case(records: Sequence[Record], values: Sequence[float]) -> list[float]:
    """Sums over the turns of each case; records of a case stand together."""
    pairs = groupby(zip(records, values, strict=True), key=lambda pair: pair[0].case)
    return [sum(value for _, value in turns) for _, turns in pairs]


def bootstrap(above: Sequence[float], below: Sequence[float], seed: int = 0) -> list[float] | None:
    """Interval of sum(above) / sum(below) over cases; None where one case alone says nothing about the others."""
    if len(above) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(0, len(above), (DRAWS, len(above)))
    top, bottom = np.asarray(above, float)[drawn].sum(1), np.asarray(below, float)[drawn].sum(1)
    ratios = top[bottom > 0] / bottom[bottom > 0]
    if not len(ratios):
        return None
    edge = (1 - LEVEL) / 2
    low, high = np.quantile(ratios, [edge, 1 - edge]).tolist()
    return [low, high]
