"""What a step costs on this machine, by the shape of its tree and by how much runs: learnt from steps, kept on disk.

Nothing is run for measurement's sake. While a scale (so many slots, so many columns) is new, its shapes take turns in
real steps, which emit real tokens; when each has its time, the table is written, and later processes start from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch

from speculens.tree import TreeShape

TIMINGS = 4  # a shape's first steps at a scale: the first one is slower than all later ones and does not count
WORTH_KEEPING = 64  # later timings of a shape after which what they have corrected goes to disk
DRIFT, PACE = 0.05, 0.2  # shares of a late timing in a shape's own cost, and in what all of them have in common

# Nodes of all slots together that a pass may have: more of them would cost arithmetic on any device.
MOST_NODES = 256

# slots and columns, each as the exponent of its bucket
Scale = tuple[int, int]


def scale_of(slots: int, columns: int) -> Scale:
    """Slots by powers of 2; columns of KV by powers of 4, from 1,024 on."""
    return (slots - 1).bit_length(), max((columns - 1).bit_length() - 9, 0) // 2


def within(shapes: Sequence[TreeShape], scale: Scale) -> list[TreeShape]:
    """Those that so many slots may have at once; a tree of one node always."""
    return [shape for shape in shapes if shape.nodes == 1 or shape.nodes << scale[0] <= MOST_NODES]


class Stopwatch:
    """Times one step at a time: by the device's clock on a GPU, for the host may do other things meanwhile.

    Elsewhere a step has lasted until `seconds` is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self._begun = 0.0

    def start(self) -> None:
        """What is given to the device from now on is timed."""
        self._begun = time.perf_counter()
        if self._events:
            self._events[0].record(torch.cuda.current_stream(self._device))

    def stop(self) -> None:
        """All of it was given."""
        if self._events:
            self._events[1].record(torch.cuda.current_stream(self._device))

    @property
    def seconds(self) -> float:
        """Of the step, once it is over."""
        if self._events:
            return float(self._events[0].elapsed_time(self._events[1])) / 1e3
        return time.perf_counter() - self._begun


class Costs:
    """Seconds of a step of each shape at each scale.

    Timings of one process have much in common that is no shape's doing, such as other work on the machine. It goes into
    one `pace` for all, so that the shape in use does not look worse than those that rest.
    """

    def __init__(self, shapes: Sequence[TreeShape], store: Store | None = None) -> None:
        self._shapes, self._store = shapes, store
        self._seconds: dict[Scale, dict[TreeShape, float]] = store.read(shapes) if store else {}
        self._timings: dict[Scale, dict[TreeShape, list[float]]] = {}
        self._pace = 1.0
        self._looks: Counter[tuple[Scale, TreeShape]] = Counter()

    def untimed(self, scale: Scale) -> TreeShape | None:
        """The shape whose turn it is while this scale is new; None once each has its time."""
        if scale in self._seconds:
            return None
        timings = self._timings.setdefault(scale, {shape: [] for shape in within(self._shapes, scale)})
        return min(timings, key=lambda shape: len(timings[shape]))

    def of(self, scale: Scale) -> Mapping[TreeShape, float]:
        """Seconds by shape. Only their ratios mean something: the pace of the moment is not in them."""
        return self._seconds[scale]

    def looks(self, scale: Scale, shape: TreeShape) -> int:
        """Steps of this shape that this process has timed since its cost was known."""
        return self._looks[scale, shape]

    def learn(self, scale: Scale, shape: TreeShape, seconds: float) -> float:
        """A step of this shape took so long. Returns how many times as long as was expected, pauses left out.

        The first costs are soon corrected, for they may have been told wrongly.
        """
        if scale in self._seconds:
            surprise = seconds / (self._seconds[scale][shape] * self._pace)
            surprise = min(max(surprise, 0.5), 2.0)  # a pause is no cost
            self._pace *= surprise**PACE
            self._seconds[scale][shape] *= surprise ** max(DRIFT, 1 / (TIMINGS + self._looks[scale, shape]))
            self._looks[scale, shape] += 1
            if self._looks[scale, shape] == WORTH_KEEPING:
                self._keep()
            return surprise
        timings = self._timings.setdefault(scale, {each: [] for each in within(self._shapes, scale)})
        timings[shape].append(seconds)
        if all(len(each) >= TIMINGS for each in timings.values()):
            self._seconds[scale] = _settled(self._timings.pop(scale))
            self._keep()
        return 1.0

    def _keep(self) -> None:
        if self._store:
            self._store.write(self._seconds)


def _settled(timings: Mapping[TreeShape, Sequence[float]]) -> dict[TreeShape, float]:
    """A cost from each shape's timings: its usual share of a round, at the pace of the fastest round.

    A round has one timing of every shape. Machines that are shared change their speed from round to round, which leaves
    the shares as they are; a pause spoils one share of one round.
    """
    rounds = list(zip(*timings.values(), strict=False))[1:]
    paces = [geometric_mean(each) for each in rounds]
    shares = [[seconds / pace for seconds in each] for each, pace in zip(rounds, paces, strict=True)]
    return {shape: min(paces) * median(own) for shape, own in zip(timings, zip(*shares, strict=True), strict=True)}


class Store:
    """One file of costs for one set of facts (device, target, drafter, ...) below the user's cache folder.

    A file that is missing, broken or of other shapes is as good as none, and one that cannot be written is not written.
    """

    def __init__(self, facts: Mapping[str, Any], folder: Path | None = None) -> None:
        self._facts = json.loads(json.dumps(facts, default=str, sort_keys=True))
        name = hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()[:24]
        self.path = (folder or cache_folder()) / "costs" / f"{name}.json"

    def read(self, shapes: Sequence[TreeShape]) -> dict[Scale, dict[TreeShape, float]]:
        """The costs of all scales that know each of these shapes that is open to them."""
        try:
            scales = json.loads(self.path.read_text(encoding="utf-8"))["seconds"]
            return {
                _scale(name): {shape: _positive(row[_word(shape)]) for shape in within(shapes, _scale(name))}
                for name, row in scales.items()
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return {}

    def write(self, seconds: Mapping[Scale, Mapping[TreeShape, float]]) -> None:
        """Replace the file, whole or not at all."""
        scales = {
            f"{slots},{columns}": {_word(shape): value for shape, value in row.items()}
            for (slots, columns), row in seconds.items()
        }
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump({"facts": self._facts, "seconds": scales}, file, indent=1)
                Path(name).replace(self.path)
            finally:
                Path(name).unlink(missing_ok=True)  # it is there only if that failed


def cache_folder() -> Path:
    """Ours below $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speculens"


def _word(shape: TreeShape) -> str:
    return f"{shape.num_steps}/{shape.topk}/{shape.num_draft_tokens}"


def _scale(word: str) -> Scale:
    slots, columns = word.split(",")
    return int(slots), int(columns)


def _positive(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(value)
    return value
