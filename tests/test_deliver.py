"""What unfinished training runs have come to can be taken away as drafters."""

from __future__ import annotations

import tarfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from testbed.deliver import deliver

import tiny
from speculens.checkpoints import load_drafter, save_drafter
from speculens.targets import Target
from speculens.training.config import DrafterRecipe
from speculens.training.student import make_drafter


@pytest.fixture
def scratch(tmp_path):
    """Two runs of two checkpoints each; the last one of the second run is not whole."""
    drafter = make_drafter(DrafterRecipe("eaglevlm"), Target(tiny.model("llava"), tiny.processor("llava")))
    average = {name: torch.full_like(weight, 0.5) for name, weight in drafter.state_dict().items()}
    for run in ("a", "b"):
        for step in (2, 10):
            point = save_drafter(drafter, tmp_path / f"scratch/{run}/checkpoint-{step}")
            if (run, step) != ("b", 10):
                save_file(average, point / "ema.safetensors")
        (tmp_path / f"scratch/{run}/log.jsonl").write_text("{}\n")
    return tmp_path / "scratch"


def held(file):
    with tarfile.open(file) as tar:
        return tar.getnames()


def test_every_whole_checkpoint_becomes_a_drafter_of_averaged_weights(scratch, tmp_path):
    (file,) = deliver(scratch, tmp_path / "out")
    with tarfile.open(file) as tar:
        tar.extractall(tmp_path / "taken", filter="data")
    points = sorted(str(path.parent.relative_to(tmp_path / "taken")) for path in tmp_path.glob("taken/*/*/config.json"))
    assert points == ["a/10", "a/2", "b/2"]
    assert (tmp_path / "taken/a/log.jsonl").exists()
    weights = load_file(tmp_path / "taken/a/10/model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    taken = load_drafter(tmp_path / "taken/a/10")
    assert all((weight == 0.5).all() for weight in taken.state_dict().values())


def test_files_are_no_larger_than_asked(scratch, tmp_path):
    whole = deliver(scratch, tmp_path / "whole")[0].stat().st_size
    parts = deliver(scratch, tmp_path / "parts", most=whole // 2)
    assert len(parts) > 1
    assert sorted(name for part in parts for name in held(part)) == sorted(held(tmp_path / "whole/drafters-0.tar"))
