"""What a run tells while it runs: each event is a flat dictionary; these listen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

# {"event": "start" | "step" | "eval" | "warning" | "checkpoint" | "end", "step": ..., ...}
Event = dict[str, Any]
Listener = Callable[[Event], None]


class Log:
    """JSON lines in a file. A resumed run drops what was logged after its checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text().splitlines() if step and path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._path = path

    def __call__(self, event: Event) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line).get("step", 0)
    except ValueError:  # the last line of a run that was killed
        return float("inf")


class Bar:
    """A line of progress on a terminal, on stderr; silent anywhere else."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("training", total=1.0)
        self._accepted = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        if event["event"] == "eval":
            self._accepted = f" · {event['mean_acceptance_length']:.2f} tokens/pass"
        elif event["event"] == "step":
            text = f"step {event['step']} · loss {event['loss']:.4f} · {event['steps_per_second']:.2f} steps/s"
            self._progress.update(self._task, completed=event["done"], description=text + self._accepted)
        elif event["event"] == "warning":
            self._progress.console.print(f"warning: {event['message']}")
