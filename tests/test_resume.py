"""A run that is killed and resumed ends in the weights of one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
from speculens.errors import UserError
from speculens.training import checkpoint
from speculens.training.average import Average

SRC = Path(__file__).parents[1] / "src"


def start(folder: Path, workers: int) -> subprocess.Popen[bytes]:
    """`runs.py` in a process of its own."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(SRC), *sys.path])
    around = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", runs.__file__, str(folder), "killed", str(workers)]
    # No pipes: a worker that outlives its parent by some seconds would hold them open.
    return subprocess.Popen(command, env=around, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_at(process: subprocess.Popen[bytes], log: Path, step: int) -> None:
    """SIGKILL once the log has reached a step."""
    deadline = time.monotonic() + 120
    while reached(log) < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL


def reached(log: Path) -> int:
    lines = log.read_text().splitlines() if log.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | {
        f"ema {name}": weight for name, weight in load_file(folder / checkpoint.AVERAGE).items()
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are then taken in the same order here and in other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nobody kills."""
    output = tmp_path_factory.mktemp("whole")
    runs.run(output, **runs.PLANS["killed"])
    return output


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_run_ends_as_if_it_had_not_been(workers, whole, tmp_path):
    """Killed in the middle of whatever it was doing, between two steps that are drawn anew each time."""
    output, step = tmp_path / "killed", random.SystemRandom().randint(4, 25)
    kill_at(start(tmp_path, workers), output / "log.jsonl", step)
    assert not (output / "last").exists()
    runs.run(output, "latest", **runs.PLANS["killed"], workers=workers)

    last = f"checkpoint-{runs.PLANS['killed']['steps']}"
    killed, uninterrupted = weights(output / last), weights(whole / last)
    assert killed.keys() == uninterrupted.keys()
    assert all(torch.equal(killed[name], uninterrupted[name]) for name in killed), f"killed at step {step}"
    kept = [load_file(run / "last" / "model.safetensors") for run in (output, whole)]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert runs.steps(output) == runs.steps(whole)
    assert not list(output.glob(".*"))


def test_other_processes_may_go_on(whole, tmp_path):
    """How many there are is not part of the recipe, as long as an update is as large: here a checkpoint says two."""
    plan = runs.PLANS["killed"]
    runs.run(tmp_path, **plan | {"steps": 3, "optimiser": {"lr": 5e-3}})
    path = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["progress"]["processes"], state["recipe"]["accumulation"] = 2, 1
    path.write_text(json.dumps(state))
    runs.run(tmp_path, "latest", **plan | {"steps": 6, "optimiser": {"lr": 5e-3}})
    assert runs.steps(tmp_path)[-1]["epoch"] == runs.steps(whole)[5]["epoch"]
    with pytest.raises(UserError, match="another accumulation x number of processes"):
        runs.run(tmp_path, "latest", **plan | {"steps": 7, "accumulation": 4})


def test_going_on_from_an_earlier_checkpoint_removes_the_later_ones(tmp_path):
    """They are of a branch that is abandoned: they outlived what was saved next, and `latest` meant them."""
    runs.run(tmp_path, steps=4, save_every=1, keep=4)
    with pytest.raises(UserError, match="another seed"):
        runs.run(tmp_path, str(tmp_path / "checkpoint-1"), steps=2, seed=5)
    assert len(checkpoint.checkpoints(tmp_path)) == 4, "a run that does not begin removes nothing"
    runs.run(tmp_path, str(tmp_path / "checkpoint-1"), steps=2, keep=1)
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2"]


def test_the_best_drafter_is_never_one_of_a_branch_that_was_abandoned(tmp_path, monkeypatch):
    """However often a run is killed and goes on before the next one is measured."""
    lengths = iter([2.0, 3.0, None, 1.0, 1.5])

    def measure(*_: object) -> dict[str, float]:
        length = next(lengths)
        if length is None:
            raise KeyboardInterrupt
        return {"mean_acceptance_length": length}

    monkeypatch.setattr("speculens.training.measure.Exam.measure", measure)
    plan = {"save_every": 1, "keep": 4, "eval_every": 1}
    runs.run(tmp_path, steps=2, **plan)
    abandoned = load_file(tmp_path / "best" / "model.safetensors")
    with pytest.raises(KeyboardInterrupt):
        runs.run(tmp_path, str(tmp_path / "checkpoint-1"), steps=3, **plan)
    runs.run(tmp_path, "latest", steps=3, **plan)
    best = load_file(tmp_path / "best" / "model.safetensors")
    assert any(not torch.equal(best[name], abandoned[name]) for name in best)
    assert "3 updates" in (tmp_path / "best" / "README.md").read_text()


# --- what a kill may leave behind


def test_leavings_are_cleared_up(tmp_path):
    for name in (".best.partial", ".best.old", ".last.old", "last", ".checkpoint-3.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    checkpoint.tidy(tmp_path)
    left = {path.name: (path / "file").read_text() for path in tmp_path.iterdir()}
    assert left == {"best": ".best.old", "last": "last"}


# --- the running average


def test_the_average_is_kept_and_used(tmp_path):
    plan = {"steps": 6, "ema": 0.8, "log_every": 1, "save_every": 1, "keep": 6}
    runs.run(tmp_path, **plan)
    states = [weights(tmp_path / f"checkpoint-{step}") for step in range(1, 7)]
    for name in [name for name in states[0] if not name.startswith("ema ")]:
        for step in range(2, 7):
            decay = min(0.8, (1 + step) / (10 + step))
            expected = decay * states[step - 2][f"ema {name}"] + (1 - decay) * states[step - 1][name]
            torch.testing.assert_close(states[step - 1][f"ema {name}"], expected)
        assert not torch.equal(states[-1][f"ema {name}"], states[-1][name])
        kept = load_file(tmp_path / "last" / "model.safetensors")[name]
        assert torch.equal(kept, states[-1][f"ema {name}"])


def test_what_is_measured_is_the_average(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("speculens.training.measure.Exam.measure", lambda _, drafter: seen.append(drafter) or {
        "mean_acceptance_length": 1.0})  # fmt: skip
    runs.run(tmp_path, steps=3, ema=0.9, eval_every=3)
    kept = load_file(tmp_path / "best" / "model.safetensors")
    measured = dict(seen[0].named_parameters())
    assert all(torch.equal(measured[name], kept[name]) for name in kept)


def test_an_average_of_half_precision_moves():
    """In bfloat16 a step of 1 in 1000 would be rounded away."""
    layer = torch.nn.Linear(4, 4).to(torch.bfloat16)
    average = Average(layer, 0.999)
    before = average.state["weight"].clone()
    with torch.no_grad():
        layer.weight.add_(0.125)
    average.follow(100_000)
    torch.testing.assert_close(average.state["weight"] - before, torch.full((4, 4), 0.125e-3), rtol=0.1, atol=0)
    assert average.module().weight.dtype == torch.bfloat16


def test_an_average_cannot_begin_or_vanish_in_between(tmp_path):
    runs.run(tmp_path, steps=1)
    with pytest.raises(UserError, match="made with another ema"):
        runs.run(tmp_path, "latest", steps=2, ema=0.9)
    runs.run(tmp_path / "with", steps=1, ema=0.9)
    save_file({"other": torch.zeros(1)}, tmp_path / "with" / "checkpoint-1" / checkpoint.AVERAGE)
    with pytest.raises(UserError, match="no checkpoint that this run can go on from"):
        runs.run(tmp_path / "with", "latest", steps=2, ema=0.9)


def test_a_decay_outside_0_and_1_is_refused(tmp_path):
    with pytest.raises(UserError, match="ema must be between 0 and 1"):
        runs.recipe(tmp_path, steps=1, ema=1.0)
