"""Train both families side by side, one GPU each, inside one deadline.

    python -m testbed.launch --out OUT --packs DIR --state STATE --minutes 9.2            # the first run
    python -m testbed.launch --out OUT --packs DIR --state STATE --minutes 9.2 --final    # goes on, and ends

Each family's training lives in `STATE/FAMILY` (see `testbed.train`), so a later run on the same machine goes on from
there. OUT gets a log of each family and its checkpoint as an archive in parts of at most 15 MiB. Put it together with

    cat OUT/llava.tar.part* | tar x

Ends with 3 if a family fails before its first update, and then stops the other one too; with 1 if one fails later.
"""

import argparse
import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from testbed import models

PART = 15 * 2**20  # bytes of one part of an archive
SHARED_MEMORY = 10 * 2**30  # bytes: batches under way between the workers and two trainings
GRACE = 25.0  # seconds a training may overrun before it is killed


def start(family: str, gpu: int, options: argparse.Namespace, extra: list[str]) -> subprocess.Popen:
    """One training in its own process group, writing to OUT/FAMILY.log."""
    state = options.state / family
    (state / "checked").unlink(missing_ok=True)
    command = [sys.executable, "-m", "testbed.train", "--family", family, "--out", str(state)]
    command += ["--minutes", str(options.minutes), *(["--packs", str(options.packs)] if options.packs else []), *extra]
    if (state / "state.pt").exists():
        command += ["--resume", str(state)]
    elif options.weights:  # another machine's checkpoints
        command += ["--resume", str(options.weights / family)]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": str(gpu),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(options.state / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "8",
        "PYTHONUNBUFFERED": "1",
    }
    with (options.out / f"{family}.log").open("w") as log:
        return subprocess.Popen(  # noqa: S603
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def watch(running: dict[str, subprocess.Popen], options: argparse.Namespace, deadline: float) -> int:
    """Wait for all; 0, 1 or 3 as the module says."""
    said, code = time.monotonic(), 0
    while any(process.poll() is None for process in running.values()):
        time.sleep(1)
        unready = [family for family in running if not (options.state / family / "checked").exists()]
        if any(running[family].poll() not in (None, 0) for family in unready):
            code = 3
        if code or time.monotonic() > deadline:
            print("stopping: a check failed" if code else "stopping: past the deadline", flush=True)
            for process in running.values():
                stop(process)
            break
        if time.monotonic() - said > 30:
            said = time.monotonic()
            report(running, options.out, 1)
    return code or int(any(process.wait() != 0 for process in running.values()))


def stop(process: subprocess.Popen) -> None:
    """Kill a training and its workers."""
    with contextlib.suppress(ProcessLookupError):  # its group is its own, and outlives it while workers run
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def report(running: dict[str, subprocess.Popen], out: Path, lines: int) -> None:
    """The last lines of each log."""
    for family in running:
        for line in (out / f"{family}.log").read_text(errors="replace").splitlines()[-lines:]:
            print(f"{family}: {line}", flush=True)


def pack(checkpoint: Path, family: str, out: Path) -> None:
    """Archive a checkpoint under OUT in parts, with the folder name FAMILY inside."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(checkpoint, family)
    whole = archive.getvalue()
    for number, at in enumerate(range(0, len(whole), PART)):
        (out / f"{family}.tar.part{number}").write_bytes(whole[at : at + PART])


def main() -> None:
    """The command line."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Anything else is handed to testbed.train.",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--packs", type=Path)
    parser.add_argument("--state", type=Path, required=True, help="folder that lasts between runs")
    parser.add_argument("--weights", type=Path, help="folder of checkpoints FAMILY/ to begin from if there is no state")
    parser.add_argument("--minutes", type=float, default=9.2)
    parser.add_argument("--families", nargs="+", default=sorted(models.FAMILIES), choices=sorted(models.FAMILIES))
    parser.add_argument("--gpus", type=int, default=2)
    options, extra = parser.parse_known_args()

    options.out.mkdir(parents=True, exist_ok=True)
    for family in options.families:
        (options.state / family).mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage("/dev/shm").free < SHARED_MEMORY:  # noqa: S108
        print("little shared memory: if workers die, run mount -o remount,size=64G /dev/shm first", flush=True)
    running = {
        family: start(family, number % options.gpus, options, extra) for number, family in enumerate(options.families)
    }
    code = 1
    try:
        code = watch(running, options, began + options.minutes * 60 + GRACE)
    finally:
        for process in running.values():
            stop(process)
        report(running, options.out, 12)
        for family in options.families:
            state = options.state / family
            if (state / "checkpoint" / "config.json").exists():
                pack(state / "checkpoint", family, options.out)
            if (state / "log.jsonl").exists():
                shutil.copy(state / "log.jsonl", options.out / f"{family}.jsonl")
    sys.exit(code)


if __name__ == "__main__":
    main()
