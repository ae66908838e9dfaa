"""Several processes, several passes, one pass: the same updates. Float64, so that only the order of sums differs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import runs
import tiny
from speculens.errors import UserError
from speculens.training.batches import Encoder, Order, trains
from speculens.training.parallel import make_accelerator

LAUNCH = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
LAUNCH += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]  # port 0: a free one
NAMES = ("plain", "many", "unused", "sharded")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Folder of the runs of `NAMES` by two processes under torchrun."""
    folder = tmp_path_factory.mktemp("two")
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src"), *sys.path]
    around = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *LAUNCH, runs.__file__, str(folder), ",".join(NAMES)]
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def alike(one: Path, other: Path) -> None:
    for first, second in zip(runs.steps(one), runs.steps(other), strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            same = pytest.approx(second[key], rel=1e-9, abs=1e-12) if key != "event" else second[key]
            assert value == same, key
    weights = [load_file(folder / "last" / "model.safetensors") for folder in (one, other)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one_does(name, two, tmp_path):
    """Losses, gradients, measurements and weights; ragged answers, refused batches, weights that only pictures use."""
    plan = runs.PLANS[name]
    runs.run(tmp_path, **plan | {"accumulation": 2 * plan["accumulation"], "shard_target": False})
    alike(two / name, tmp_path)
    assert any(line.get("refused") for line in runs.steps(two / name))


def test_only_one_process_writes(two):
    assert sorted(path.name for path in (two / "plain").iterdir()) == [
        "best", "checkpoint-7", "last", "log.jsonl", "recipe.yaml"
    ]  # fmt: skip
    numbers = [line["step"] for line in runs.steps(two / "plain") if "loss" in line]
    assert numbers == list(range(1, 8))


@pytest.mark.parametrize("practice", [{}, {"unroll": {"steps": 2}}])
def test_many_passes_are_one_large_one(practice, tmp_path):
    """Every update sees every row, whose numbers of answer positions go from a few to many."""
    changes = {"steps": 5, **practice}
    runs.run(tmp_path / "one", **changes, batch_size=len(runs.ANSWERS))
    runs.run(tmp_path / "many", **changes, accumulation=len(runs.ANSWERS))
    alike(tmp_path / "one", tmp_path / "many")


def test_the_rows_would_show_an_average_of_averages():
    encoder = Encoder(runs.target(), 4096)
    counts = [int(trains(encoder.row(row).answer).sum()) for row, text in zip(runs.rows(), runs.ANSWERS, strict=True)
              if text]  # fmt: skip
    assert max(counts) > 5 * min(counts)


# --- the order of the data


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_together_take_the_batches_of_one(world):
    sizes = list(range(13))
    whole, shares = iter(Order(sizes, 2, 7)), [iter(Order(sizes, 2, 7, rank, world)) for rank in range(world)]
    taken = [next(share) for _ in range(8) for share in shares]
    assert taken == [next(whole) for _ in range(8 * world)]


def test_an_order_is_taken_up_where_it_was_left():
    one, other = Order(range(13), 2, 7, 1, 2), Order(range(13), 2, 7, 1, 2)
    other.start = 9
    left, right = iter(one), iter(other)
    assert [next(left) for _ in range(14)][9:] == [next(right) for _ in range(5)]


def test_fewer_batches_than_processes_are_refused():
    with pytest.raises(UserError, match="do not make one batch for each of 3 processes"):
        Order([1, 1], 1, 0, 0, 3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_batch_without_rows_is_still_a_pass(family):
    """The target must take it, whatever it insists on."""
    made = tiny.model(family, torch.float32)
    target = runs.Target(made, tiny.processor(family))
    batch = Encoder(target, 4096).batch([UserError("broken")])
    assert batch.positions == 0
    assert batch.refused == ("broken",)
    assert torch.isfinite(target.teach(batch.inputs, batch.image).hidden).all()


# --- mistakes


def test_sharding_needs_several_processes(tmp_path):
    with pytest.raises(UserError, match="shard_target needs several processes"):
        runs.run(tmp_path, steps=1, shard_target=True)


def test_another_launcher_is_refused(monkeypatch):
    launched = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr("speculens.training.parallel.Accelerator", lambda **_: launched)
    with pytest.raises(UserError, match="asks for FSDP, but drafters train by data parallelism"):
        make_accelerator(on_cpu=True)
