"""The target's own answers to the questions of a data set, sampled at T = 1, by several processes on one GPU.

    python -m testbed.own_answers --data DATA/llava --weights testbed/weights/llava --processes 6 --gpu 0

Asked are all real pictures and the first drawn ones of DATA/data.jsonl; DATA/own.jsonl gets the answers. Each process
is `speculens respond` on its share, so a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("verify",)  # tasks whose answers are a word or two: nothing to draft


def questions(file: Path, drawn: int) -> list[str]:
    """The lines to ask: the first `drawn` drawn pictures and all real ones, in an order that mixes their lengths."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    about = [json.loads(line)["metadata"] for line in lines]
    drawings = [line for line, said in zip(lines, about, strict=True) if "facts" in said][:drawn]
    real = [line for line, said in zip(lines, about, strict=True) if "facts" not in said and said["task"] not in SHORT]
    chosen = drawings + real
    random.Random(0).shuffle(chosen)
    return chosen


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--drawn", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--slots", type=int, default=96, help="of each process")
    parser.add_argument("--gpu", default="0")
    parser.add_argument("--max-new-tokens", type=int, default=320)
    given = parser.parse_args()
    lines = questions(given.data / "data.jsonl", given.drawn)
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": given.gpu,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"),
    }
    running = []
    for share in range(given.processes):
        asked, answers = (given.data / f"{word}-{share}.jsonl" for word in ("ask", "own"))
        asked.write_text("".join(lines[share :: given.processes]), encoding="utf-8")
        command = [sys.executable, "-m", "speculens", "respond", str(asked), "--out", str(answers)]
        command += ["--target", str(given.weights), "--slots", str(given.slots)]
        command += ["--max-new-tokens", str(given.max_new_tokens), "--temperature", "1"]
        running.append((answers, subprocess.Popen(command, env=environment)))  # noqa: S603
    failed = max(process.wait() for _, process in running)
    answered = [line for answers, _ in running if answers.exists() for line in answers.open(encoding="utf-8")]
    (given.data / "own.jsonl").write_text("".join(answered), encoding="utf-8")
    print(f"{len(answered)} of {len(lines)} questions are answered in {given.data / 'own.jsonl'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
