"""Train a drafter for each testbed target side by side, one GPU each, inside one deadline.

    python -m testbed.train_drafters --weights DIR --data DIR --out DIR --scratch DIR [section.key=value ...]

--weights holds the targets (llava/, qwen2_5_vl/), --data one data set for each (the same names, made by
`testbed.make_data`). Each run is `speculens train -c recipes/testbed/METHOD.yaml`, or with --run NAME one of
recipes/testbed/ablations.yaml; OUT/FAMILY-NAME gets the drafter and OUT/FAMILY-NAME.log what the run said.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from testbed import models

ROOT = Path(__file__).resolve().parents[1]
GRACE = 45.0  # seconds for loading, the measurement at the end and the last save


def start(family: str, gpu: int, options: argparse.Namespace, overrides: list[str]) -> subprocess.Popen[bytes]:
    """One run in its own process group."""
    command = [
        sys.executable,
        "-m",
        "speculens.cli",
        "train",
        "-c",
        str(ROOT / f"recipes/testbed/{options.method}.yaml"),
    ]
    command += [
        f"target={options.weights / family}",
        f"output={options.scratch / family}",
        f"data.train=[{options.data / family / 'data.jsonl'}]",
        f"data.val={ROOT / 'testbed/heldout/charts.jsonl'}",
        f"minutes={options.minutes}",
        *overrides,
    ]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": str(gpu),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONUNBUFFERED": "1",
    }
    with (options.out / f"{family}-{options.run}.log").open("w") as log:
        return subprocess.Popen(  # noqa: S603
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="checkpoints, emptied first")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--method", default="eaglevlm", help="a recipe of recipes/testbed")
    chosen.add_argument("--run", help="a name from recipes/testbed/ablations.yaml")
    parser.add_argument("--minutes", type=float, default=2.2, help="of one unit of training")
    parser.add_argument("--families", nargs="+", default=sorted(models.FAMILIES), choices=sorted(models.FAMILIES))
    parser.add_argument("--gpus", type=int, default=2)
    options, overrides = parser.parse_known_args()
    if options.run:
        planned = yaml.safe_load((ROOT / "recipes/testbed/ablations.yaml").read_text())[options.run]
        options.method, overrides = planned["method"], [*planned.get("set", []), *overrides]
        options.minutes *= planned.get("units", 1)
    options.run = options.run or options.method
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.scratch, ignore_errors=True)
    deadline = time.monotonic() + options.minutes * 60 + GRACE
    running = {
        family: start(family, number % max(options.gpus, 1), options, overrides)
        for number, family in enumerate(options.families)
    }
    code = 0
    while running:
        time.sleep(0.5)
        for family, process in list(running.items()):
            if process.poll() is None and time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.poll() is not None:
                running.pop(family)
                code = max(code, abs(process.returncode))
                _deliver(family, options)
    sys.exit(code)


def _deliver(family: str, options: argparse.Namespace) -> None:
    """Copy a finished run's drafter and log at once: whoever waits for the other run may be cut off."""
    name = f"{family}-{options.run}"
    print(f"{name}\n" + "\n".join((options.out / f"{name}.log").read_text().splitlines()[-4:]), flush=True)
    run = options.scratch / family
    made = next((folder for part in ("best", "last") if (folder := run / part).is_dir()), None)
    if made:
        shutil.copytree(made, options.out / name, dirs_exist_ok=True)
        shutil.copy(run / "log.jsonl", options.out / f"{name}.jsonl")


if __name__ == "__main__":
    main()
