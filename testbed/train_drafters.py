"""Train the drafters of recipes/testbed/runs.yaml side by side on one or more GPUs, inside one deadline.

    python -m testbed.train_drafters shipped --data DATA --out OUT --scratch SCRATCH --minutes 9
    python -m testbed.train_drafters ablations --families llava --data DATA --out OUT --scratch SCRATCH

DATA/FAMILY is a data set of `testbed.make_data`, with the answers of `testbed.own_answers`. Each run is `speculens
train -c recipes/testbed/RECIPE.yaml`; whatever else stands on the command line goes over every recipe. SCRATCH keeps
checkpoints, from which a later start goes on. OUT/FAMILY-NAME.log is what a run said, and OUT/drafters-*.tar hold every
checkpoint's drafter with the log of its training (`testbed.deliver`); they are written anew after each run and every
minute, so that a start that is killed leaves what it had.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from testbed import models
from testbed.deliver import deliver

ROOT = Path(__file__).resolve().parents[1]
PLAN = ROOT / "recipes/testbed/runs.yaml"
DELIVERY = 60.0  # seconds


@dataclass(frozen=True)
class Run:
    """One drafter to train; the keys of runs.yaml are explained there."""

    family: str
    name: str
    recipe: str
    steps: int
    unit: int
    set: Sequence[str] = ()
    after: str | None = None
    given: bool = False
    claim: str = ""

    @property
    def folder(self) -> str:
        """What its drafter is called."""
        return f"{self.family}-{self.name}"

    def command(self, data: Path, scratch: Path, weights: Path, overrides: Sequence[str]) -> list[str]:
        """`speculens train`, going on where an earlier start was stopped."""
        folder, output = data / self.family, scratch / self.folder
        files = [folder / "data.jsonl", *([] if self.given else [folder / "own.jsonl"])]
        values = {
            "target": weights / self.family,
            "output": output,
            "data.train": f"[{', '.join(map(str, files))}]",
            "data.val": folder / "val/data.jsonl",
            "data.cache": folder / "encoded",
            "steps": self.steps,
            "eval_every": self.unit,
            "save_every": self.unit,
        }
        if self.after:
            values["drafter.init_from"] = scratch / f"{self.family}-{self.after}" / "last"
        command = [
            sys.executable,
            "-m",
            "speculens",
            "train",
            "-c",
            str(ROOT / f"recipes/testbed/{self.recipe}.yaml"),
        ]
        command += [*(f"{key}={value}" for key, value in values.items()), *self.set, *overrides]
        return command + (["--resume-from", "latest"] if any(output.glob("checkpoint-*")) else [])


def runs(part: str, families: Iterable[str], unit: int | None = None) -> list[Run]:
    """The runs of `shipped` or `ablations` for each family in turn; `unit` takes the place of the plan's."""
    plan = yaml.safe_load(PLAN.read_text())
    unit = unit or int(plan["unit"])
    named = itertools.product(plan[part].items(), families)
    return [
        Run(family, name, **{key: value for key, value in said.items() if key != "units"}, steps=said["units"] * unit,
            unit=unit)
        for (name, said), family in named
    ]  # fmt: skip


class Launcher:
    """Starts runs as places on the GPUs come free, delivers what they made, and ends by the deadline."""

    def __init__(self, planned: Sequence[Run], options: argparse.Namespace, overrides: Sequence[str]) -> None:
        self.options, self.overrides = options, overrides
        self.waiting = [run for run in planned if not (options.scratch / run.folder / "last").is_dir()]
        self.running: dict[subprocess.Popen[bytes], tuple[Run, int]] = {}
        self.code = 0
        self._delivered = time.monotonic()

    def work(self, deadline: float) -> int:
        """0 if every run came to its end."""
        while self.waiting or self.running:
            for run in [run for run in self.waiting if self._ready(run)]:
                busy = [gpu for _, gpu in self.running.values()]
                gpu = min(range(max(self.options.gpus, 1)), key=busy.count)
                if busy.count(gpu) < self.options.parallel:
                    self.waiting.remove(run)
                    self.running[self._start(run, gpu)] = run, gpu
            time.sleep(0.3)
            late = time.monotonic() > deadline
            if time.monotonic() > self._delivered + DELIVERY:
                self._deliver()
            for process in [process for process in self.running if late or process.poll() is not None]:
                self._end(process)
            if late or (self.waiting and not self.running and not any(map(self._ready, self.waiting))):
                return 1
        return self.code

    def _ready(self, run: Run) -> bool:
        return run.after is None or (self.options.scratch / f"{run.family}-{run.after}" / "last").is_dir()

    def _start(self, run: Run, gpu: int) -> subprocess.Popen[bytes]:
        """One run in its own process group."""
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": str(gpu),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT / "src"),
            "PYTHONUNBUFFERED": "1",
        }
        options = self.options
        command = run.command(options.data, options.scratch, options.weights, self.overrides)
        with (options.out / f"{run.folder}.log").open("a") as log:
            return subprocess.Popen(  # noqa: S603
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        run, _ = self.running.pop(process)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        self.code = max(self.code, abs(process.wait()))
        said = (self.options.out / f"{run.folder}.log").read_text(errors="replace").splitlines()
        print(f"{run.folder}: {said[-1][:300] if said else 'said nothing'}", flush=True)
        self._deliver()

    def _deliver(self) -> None:
        deliver(self.options.scratch, self.options.out)
        self._delivered = time.monotonic()


def main() -> None:
    """The command line."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["shipped", "ablations"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=ROOT / "testbed/weights")
    parser.add_argument("--families", nargs="+", default=sorted(models.FAMILIES), choices=sorted(models.FAMILIES))
    parser.add_argument("--only", nargs="+", help="names of runs")
    parser.add_argument("--unit", type=int, help="updates of a unit of training time, instead of the plan's")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=4, help="runs on one GPU at a time")
    parser.add_argument("--minutes", type=float, default=1e6, help="when to stop what still runs")
    options, overrides = parser.parse_known_args()
    for folder in (options.out, options.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    planned = runs(options.part, options.families, options.unit)
    if unknown := set(options.only or ()) - {run.name for run in planned}:
        parser.error(f"no run is called {', '.join(sorted(unknown))}; overrides stand before --only")
    planned = [run for run in planned if not options.only or run.name in options.only]
    sys.exit(Launcher(planned, options, overrides).work(begun + options.minutes * 60))


if __name__ == "__main__":
    main()
