"""A run's summary as lines and cells of text, for the terminal and for the page alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speculens.bench.figures import POOLED
from speculens.bench.measure import OWN_LOOP
from speculens.bench.record import NONE

SPEED_HEADINGS = (
    "drafter",
    "exact",
    "speedup",
    "95\u00a0% interval",
    "median (quartiles)",
    "decoding alone",
    "tokens/s",
)
# Length is tokens per pass, bonus included; draft share that of decoding time; prefill share the rows of the drafter's
# prefill over those of the target's.
PASS_HEADINGS = (
    "drafter",
    "length",
    "without bonus",
    "efficiency",
    "ms a\u00a0pass",
    "first token",
    "draft share",
    "prefill share",
    "peak memory",
)
TOPIC_HEADINGS = ("topic", "drafter", "questions", "exact", "speedup", "decoding alone", "length", "without bonus")
MARK = "*"
OTHER_LOOP = f"{MARK} in a loop of its own, so its speedup is not against the same loop."
UNKNOWN = "–"
MOST = 5  # differences that are told one by one

Summary = Mapping[str, Any]


def labels(names: Sequence[str]) -> dict[str, str]:
    """Short names for tables: the last part of a path, as long as no two are alike."""
    short = {name: Path(name).name if ":" not in name else name for name in names}
    counts = Counter(short.values())
    return {name: label if counts[label] == 1 else name for name, label in short.items()}


def exactness(summary: Summary) -> list[str]:
    """First of all: whether everybody said what the target says, and if not, where they part."""
    lines = []
    for name, label in labels(list(summary["drafters"])).items():
        about = summary["drafters"][name]
        if name == NONE or not about[POOLED]:
            continue
        questions, parted = about[POOLED]["questions"], about["differences"]
        lines.append(f"{label}: {questions - len(parted)} of {questions} answers equal the target's own")
        lines += [f"  {_difference(one)}" for one in parted[:MOST]]
        if len(parted) > MOST:
            lines.append(f"  and {len(parted) - MOST} more")
    return lines


def _difference(one: Mapping[str, Any]) -> str:
    turn = f", turn {one['turn'] + 1}" if one["turn"] else ""
    gap = f"{one['gap']:.2g}"
    return f"{one['case']}{turn}: parts at token {one['token']}, where the target's two best choices are {gap} apart"


def failures(summary: Summary) -> list[str]:
    """What could not be asked or answered."""
    names = labels(list(summary["drafters"]))
    lines = [f"{case} was left out: {why}" for case, why in summary["errors"].items()]
    for name, about in summary["drafters"].items():
        lines += [f"{names[name]} could not answer {count}: {why}" for why, count in about["failures"].items()]
    return lines


def speed_rows(summary: Summary) -> list[tuple[str, ...]]:
    """How fast, under `SPEED_HEADINGS`."""
    return [_speed(label, line) for label, line in _lines(summary)]


def pass_rows(summary: Summary) -> list[tuple[str, ...]]:
    """What a pass brings and costs, under `PASS_HEADINGS`."""
    return [_pass(label, line) for label, line in _lines(summary)]


def _lines(summary: Summary) -> list[tuple[str, Mapping[str, Any]]]:
    names = labels(list(summary["drafters"]))
    return [
        (_marked(names[name], about), about[POOLED]) for name, about in summary["drafters"].items() if about[POOLED]
    ]


def topic_rows(summary: Summary) -> list[tuple[str, ...]]:
    """The same by topic, under `TOPIC_HEADINGS`; `none` is left out, being 1 everywhere."""
    names = labels(list(summary["drafters"]))
    return [
        (
            topic,
            _marked(names[name], about),
            f"{line['questions']}",
            f"{line['exact']:.3f}",
            f"{line['walltime_speedup']:.2f}×",
            f"{line['decode_speedup']:.2f}×",
            f"{line['mean_acceptance_length']:.2f}",
            f"{line['mean_accepted_tokens']:.2f}",
        )
        for topic in summary["topics"]
        for name, about in summary["drafters"].items()
        if name != NONE and (line := about["topics"].get(topic))
    ]


def has_peers(summary: Summary) -> bool:
    """Whether anybody ran in another loop than ours."""
    return any(about["loop"] != OWN_LOOP for about in summary["drafters"].values())


def about(summary: Summary) -> str:
    """One line: what was measured on what."""
    setting, asking = summary["setting"], summary["setting"]["asking"]
    drawn = "greedy" if not asking["temperature"] else f"temperature {asking['temperature']:g}, seed {asking['seed']}"
    steps = "eager steps, " if setting.get("capture") == "off" else ""
    return (
        f"{Path(setting['target']).name}, {summary['questions']} questions of {setting['suite']}, {drawn}, at most "
        f"{asking['max_new_tokens']} new tokens; {steps}{setting['device']}, {setting['dtype']}, "
        f"torch {setting['torch']}, transformers {setting['transformers']}"
    )


def _marked(label: str, about: Mapping[str, Any]) -> str:
    return label if about["loop"] == OWN_LOOP else f"{label}{MARK}"


def _speed(label: str, line: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = line["walltime_speedup_quartiles"]
    interval = line["walltime_speedup_interval"]
    return (
        label,
        f"{line['exact']:.3f}",
        f"{line['walltime_speedup']:.2f}×",
        f"{interval[0]:.2f}–{interval[1]:.2f}" if interval else UNKNOWN,
        f"{line['walltime_speedup_median']:.2f} ({low:.2f}–{high:.2f})",
        f"{line['decode_speedup']:.2f}×",
        f"{line['tokens_per_second']:.1f}",
    )


def _pass(label: str, line: Mapping[str, Any]) -> tuple[str, ...]:
    share, memory = line.get("draft_time_fraction"), line["peak_memory"]
    prefill = line["drafter_prefill_ratio"] if line["num_prompt_tokens"] else None  # other loops do not tell
    return (
        label,
        f"{line['mean_acceptance_length']:.2f}",
        f"{line['mean_accepted_tokens']:.2f}",
        f"{line['efficiency']:.2f}",
        f"{1e3 * line['seconds_per_pass']:.1f}",
        f"{1e3 * line['time_to_first_token']:.0f} ms",
        UNKNOWN if share is None else f"{share:.0%}",
        UNKNOWN if prefill is None else f"{prefill:.1%}",
        UNKNOWN if memory is None else f"{memory / 2**30:.2f} GiB",
    )
