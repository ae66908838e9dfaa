"""Everything that drafters for the testbed's targets need, from pictures to weights, inside one deadline.

    python -m testbed.grow_drafters qwen2_5_vl:shipped llava:ablations --packs PACKS --answers ANSWERS \
        --out OUT --scratch /dev/shm/drafters --minutes 8

Each FAMILY:PART (a part of recipes/testbed/runs.yaml) has a GPU of its own, in this order: its data set is drawn, the
target's own answers are taken from ANSWERS/FAMILY.jsonl or else sampled, rows are encoded, and its runs are trained
side by side. What words stand after `--` goes over every recipe. OUT/FAMILY-PART has the logs and, from the first
checkpoint on, the drafters (`testbed.train_drafters`). What SCRATCH holds already is not made again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from testbed import models

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {"llava": ["--size", "256x256"], "qwen2_5_vl": []}
UNMEASURED = ("data.val=null", "eval_every=null", "keep=99")  # measuring would take longer than learning


@dataclass(frozen=True)
class Job:
    """One part of the runs of one family, on one GPU, until `deadline` (of time.monotonic)."""

    family: str
    part: str
    gpu: int
    deadline: float
    given: argparse.Namespace
    overrides: Sequence[str]

    @property
    def out(self) -> Path:
        return self.given.out / f"{self.family}-{self.part}"

    @property
    def data(self) -> Path:
        return self.given.scratch / "data" / self.family

    def work(self) -> int:
        """The exit code of the first step that fails, or 0; each tells when it is over."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name, command in self._steps():
            begun = time.monotonic()
            with (self.out / f"{name}.log").open("a") as log:
                code = subprocess.run(  # noqa: S603
                    [sys.executable, "-m", *command], stdout=log, stderr=log, env=self._environment(), check=False
                ).returncode
            print(f"{self.family}:{self.part}: {name} took {time.monotonic() - begun:.0f} s", flush=True)
            if code:
                return code
        return 0

    def _steps(self) -> Iterator[tuple[str, list[str]]]:
        given, target = self.given, ROOT / "testbed/weights" / self.family
        if not (self.data / "data.jsonl").exists():
            packs = ["--packs", str(given.packs)] if given.packs else []
            drawn = ["--count", str(given.count), "--seed", "2", *PICTURES[self.family], *packs]
            yield "data", ["testbed.make_data", "--out", str(self.data), *drawn, "--workers", str(given.workers)]
        own = self.data / "own.jsonl"
        if given.answers and not own.exists():
            shutil.copy(given.answers / f"{self.family}.jsonl", own)
        if not own.exists():
            asked = ["--data", str(self.data), "--weights", str(target), "--gpu", str(self.gpu), "--processes", "6"]
            yield "answers", ["testbed.own_answers", *asked]
        yield "encode", ["speculens", "train", "-c", str(ROOT / "recipes/testbed/eaglevlm.yaml"), *self._encoding()]
        minutes = (self.deadline - time.monotonic()) / 60
        folders = ["--data", self.data.parent, "--out", self.out, "--scratch", given.scratch / self.out.name]
        options = ["--families", self.family, "--parallel", given.parallel, "--minutes", minutes]
        words = [self.part, *UNMEASURED, *self.overrides, *folders, *options]
        yield "train", ["testbed.train_drafters", *map(str, words)]

    def _encoding(self) -> list[str]:
        files = f"[{self.data / 'data.jsonl'}, {self.data / 'own.jsonl'}]"
        target = ROOT / "testbed/weights" / self.family
        said = {"target": target, "data.cache": self.data / "encoded", "data.train": files}
        return [*(f"{key}={value}" for key, value in said.items()), f"workers={self.given.workers}", "--encode-only"]

    def _environment(self) -> dict[str, str]:
        own = {"CUDA_VISIBLE_DEVICES": str(self.gpu), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        return os.environ | own | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


def main() -> None:
    """The command line."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", metavar="FAMILY:PART")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="a fast disk: encoded rows take tens of gigabytes")
    parser.add_argument("--packs", type=Path, help="real pictures, as for testbed.make_data")
    parser.add_argument("--answers", type=Path, help="folder of FAMILY.jsonl, made before from the same data set")
    parser.add_argument("--count", type=int, default=24_000, help="drawn pictures")
    parser.add_argument("--workers", type=int, default=14, help="processes that draw and encode, for each job")
    parser.add_argument("--parallel", type=int, default=4, help="runs on one GPU at a time")
    parser.add_argument("--minutes", type=float, default=60.0)
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    given = parser.parse_args(words[:cut])
    pairs = [tuple(job.split(":", 1)) for job in given.jobs]
    if any(len(pair) != 2 or pair[0] not in models.FAMILIES for pair in pairs):
        parser.error(f"a job is FAMILY:PART, and the families are {', '.join(sorted(models.FAMILIES))}")
    deadline = begun + 60 * given.minutes
    jobs = [Job(*pair, gpu, deadline, given, words[cut + 1 :]) for gpu, pair in enumerate(pairs)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        sys.exit(max(abs(code) for code in pool.map(Job.work, jobs)))


if __name__ == "__main__":
    main()
