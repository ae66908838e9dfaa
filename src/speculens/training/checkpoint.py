"""The state from which a run goes on bit for bit, in folders that are there whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from speculens.checkpoints import save_drafter, whole
from speculens.drafters import TrainedDrafter
from speculens.errors import UserError, first_line

PREFIX = "checkpoint-"
AVERAGE = "ema.safetensors"
MADE_AT = "updates.txt"
GO_ON = "Earlier checkpoints are intact: make room and go on with --resume-from latest."


@dataclass
class Progress:
    """Where a run stands.

    step       updates done
    position   passes done by all processes together, which is also the number of the next batch
    rows       conversations seen
    refused    conversations that could not be used
    seconds    spent, all sessions of the run together
    best       largest acceptance length measured so far
    processes  that share the passes of an update
    """

    step: int = 0
    position: int = 0
    rows: int = 0
    refused: int = 0
    seconds: float = 0.0
    best: float = 0.0
    processes: int = 1


def save(
    output: Path,
    drafter: TrainedDrafter,
    optimizer: Optimizer,
    progress: Progress,
    recipe: Mapping[str, Any],
    card: Mapping[str, Any],
    keep: int,
    average: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `checkpoint-STEP`, itself a drafter folder, and delete all but the `keep` newest.

    average  the running average of the weights, beside the weights themselves
    """
    folder = output / f"{PREFIX}{progress.step}"
    with whole(folder, GO_ON) as partial:
        save_drafter(drafter, partial, card)
        _write(optimizer.state_dict(), partial / "optimizer.pt")
        _write(_rng(), partial / "rng.pt")
        if average is not None:
            save_file({name: tensor.cpu() for name, tensor in average.items()}, partial / AVERAGE)
        state = {"progress": asdict(progress), "recipe": dict(recipe)}
        (partial / "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n")
    for old in checkpoints(output)[:-keep]:
        shutil.rmtree(old)
    return folder


def _write(state: Mapping[str, Any], file: Path) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # which is how torch reports a full disk
        raise OSError(first_line(error)) from error


def about(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """The progress of a saved state and the recipe it was made with. Raises UserError, as `load`."""
    with _readable(folder):
        state = json.loads((folder / "trainer_state.json").read_text())
        return Progress(**state["progress"]), state["recipe"]


def load(folder: Path, drafter: nn.Module, optimizer: Optimizer, average: Mapping[str, Tensor] | None = None) -> None:
    """Put a saved state back in place."""
    with _readable(folder):
        device = next(drafter.parameters()).device
        drafter.load_state_dict(load_file(folder / "model.safetensors"))
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))
        _set_rng(torch.load(folder / "rng.pt", weights_only=True))
        saved = load_file(folder / AVERAGE) if average is not None else {}
        for name, tensor in (average or {}).items():
            tensor.copy_(saved[name])


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # reading broken files raises nearly anything
        raise UserError(f"{folder} is no checkpoint that this run can go on from: {first_line(error)}.") from error


def tidy(output: Path) -> None:
    """Clear up after a kill: unfinished folders go, and one that was moved aside comes back if none replaced it."""
    for partial in output.glob(".*.partial"):
        shutil.rmtree(partial)
    for old in output.glob(".*.old"):
        folder = output / old.name.removeprefix(".").removesuffix(".old")
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)


def drop_after(output: Path, step: int) -> None:
    """Remove later checkpoints, which a run that goes on from an earlier one abandons: they would pass for its own."""
    for folder in checkpoints(output):
        if _step(folder) > step:  # renamed first, so that a kill leaves no half of one that `latest` would mean
            shutil.rmtree(folder.rename(output / f".{folder.name}.partial"))


def sign(folder: Path, step: int) -> None:
    """Note in a drafter's folder after how many updates it was made."""
    (folder / MADE_AT).write_text(f"{step}\n")


def made_at(folder: Path) -> int:
    """What `sign` noted; 0 where it did not."""
    return int((folder / MADE_AT).read_text()) if (folder / MADE_AT).exists() else 0


def checkpoints(output: Path) -> list[Path]:
    """Those of a run, oldest first."""
    found = [path for path in output.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def find(output: Path, resume_from: str | Path) -> Path:
    """The folder that `--resume-from` means: `latest` is the newest of this run."""
    if str(resume_from) != "latest":
        return Path(resume_from)
    found = checkpoints(output)
    if not found:
        raise UserError(f"{output} holds no checkpoint to resume from: leave --resume-from out to begin anew.")
    return found[-1]


def _rng() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_rng(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
