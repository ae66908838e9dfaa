"""The drafters that training runs have come to so far: the averaged weights of their checkpoints, in bfloat16.

    python -m testbed.deliver runs/scratch runs/drafters

OUT/drafters-0.tar, drafters-1.tar, ... hold RUN/STEP/ for every checkpoint of every run below SCRATCH, and
RUN/log.jsonl. Each file is at most PART bytes, and is written as a whole.
"""

from __future__ import annotations

import argparse
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from speculens.training import checkpoint

PART = 15_000_000
COPIED = ("config.json", "README.md")


def deliver(scratch: Path, out: Path, most: int = PART) -> list[Path]:
    """Write the files and return them; a checkpoint that is being written or deleted meanwhile is left out."""
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out) as folder:
        made = Path(folder) / "made"
        for run in sorted(path for path in scratch.iterdir() if path.is_dir()):
            _take(run, made / run.name)
        files = sorted(path for path in made.rglob("*") if path.is_file())
        written = []
        for number, part in enumerate(_parts(files, most)):
            whole = Path(folder) / "whole.tar"
            with tarfile.open(whole, "w") as tar:
                for file in part:
                    tar.add(file, str(file.relative_to(made)))
            written.append(whole.replace(out / f"drafters-{number}.tar"))
        return written


def _take(run: Path, to: Path) -> None:
    """Each checkpoint of a run as a drafter, and the run's log."""
    for point in checkpoint.checkpoints(run):
        drafter = to / point.name.removeprefix(checkpoint.PREFIX)
        try:
            weights = load_file(point / checkpoint.AVERAGE)
            drafter.mkdir(parents=True)
            small = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in weights.items()}
            save_file(small, drafter / "model.safetensors", metadata={"format": "pt"})
            for name in COPIED:
                shutil.copy(point / name, drafter / name)
        except OSError:
            shutil.rmtree(drafter, ignore_errors=True)
    if to.exists() and (run / "log.jsonl").exists():
        shutil.copy(run / "log.jsonl", to / "log.jsonl")


def _parts(files: list[Path], most: int) -> Iterator[list[Path]]:
    part: list[Path] = []
    size = 0
    for file in files:
        own = file.stat().st_size + 2 * tarfile.BLOCKSIZE
        if part and size + own > most:
            yield part
            part, size = [], 0
        part.append(file)
        size += own
    if part:
        yield part


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    print(*deliver(given.scratch, given.out), sep="\n")


if __name__ == "__main__":
    main()
