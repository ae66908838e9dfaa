"""Training runs of a tiny target that tests compare with each other: `python runs.py FOLDER NAMES` makes some.

Rows differ much in the number of their answer positions, and some cannot train at all: an average of averages, or a
process that is left without work, shows.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import tiny
from speculens.conversation import Conversation
from speculens.targets import Target
from speculens.training import disband, train
from speculens.training.config import Recipe, read_recipe

ANSWERS = ["Yes.", "No, " * 20, "Three bars and a legend.", None, "Two. " * 9, None, "A small red square."]
TREE = {"num_steps": 2, "topk": 2, "num_draft_tokens": 6}
PLANS: dict[str, dict[str, Any]] = {
    "plain": {"accumulation": 1, "steps": 7, "eval_every": 3},
    "many": {"accumulation": 2, "steps": 4, "ema": 0.9, "unroll": {"steps": 2}, "feature_noise": 0.2},
    "unused": {"accumulation": 1, "steps": 7, "drafter": {"method": "specvlm", "tree": TREE}},
    "sharded": {"accumulation": 1, "steps": 4, "eval_every": 2, "shard_target": True},
    "killed": {"batch_size": 2, "steps": 40, "save_every": 3, "ema": 0.9, "accumulation": 2, "feature_noise": 0.2},
}


def target(dtype: torch.dtype = torch.float64) -> Target:
    """A copy, because sharding changes it in place."""
    return Target(copy.deepcopy(tiny.model("llava", dtype)), tiny.processor("llava"))


def rows() -> list[Conversation]:
    """With one row a batch, two batches have nothing to learn from, and one has no picture."""
    asked = [tiny.conversation("llava", images=int(seed != 2), seed=seed) for seed in range(len(ANSWERS))]
    return [one.then("assistant", text) if text else one for one, text in zip(asked, ANSWERS, strict=True)]


def recipe(output: Path, **changes: Any) -> Recipe:
    """A run in float64, so that nothing but the mathematics can differ."""
    values = {
        "target": "tiny",
        "drafter": {"method": "eaglevlm", "tree": TREE},
        "output": str(output),
        "optimiser": {"lr": 5e-3, "warmup": 2, "schedule": "linear", "weight_decay": 0.01},
        "batch_size": 1,
        "dtype": "float64",
        "workers": 0,
        "log_every": 1,
        "save_every": None,
        "eval_every": None,
        "eval_prompts": 2,
        "eval_tokens": 8,
    }
    return read_recipe(values | changes)


def run(output: Path, resume_from: str | None = None, **changes: Any) -> Path:
    """Train with `changes`."""
    plan = recipe(output, **changes)
    made, val = target(), rows()[:2] if plan.eval_every else None
    folder = train(plan, target=made, rows=rows(), val=val, resume_from=resume_from)
    if plan.shard_target:
        assert all(isinstance(weight, DTensor) for weight in made.decoder.layers.parameters())  # given back after use
    return folder


def steps(output: Path) -> list[dict[str, Any]]:
    """What the log says of each update, without what the clock decides."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["event"] in ("step", "eval")]
    return [{key: value for key, value in line.items() if key != "steps_per_second"} for line in told]


def main(folder: str, names: str, workers: str = "0") -> None:
    """Runs one after another, as a process of its own."""
    torch.set_num_threads(1)
    for name in names.split(","):
        run(Path(folder) / name, **PLANS[name], workers=int(workers))
    disband()


if __name__ == "__main__":
    main(*sys.argv[1:])
