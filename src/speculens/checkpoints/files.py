"""What every drafter folder has in common: where it is, its config.json, its tensors."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from speculens.drafters import TrainedDrafter
from speculens.errors import UserError, first_line

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the second is how older published drafters are stored


def find_folder(name: str) -> Path:
    """A folder here, or a hub id within reach. Raises UserError if it is neither."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.md", *WEIGHTS]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        raise UserError(
            f"There is no drafter at {name}: it is neither a folder here nor a hub id within reach."
        ) from None


def read_values(folder: Path) -> dict[str, Any]:
    """The values of config.json. Raises UserError if there are none."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no drafter: config.json is missing.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{folder} holds no drafter: its config.json is no table of keys and values.")
    return values


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, on the CPU, as it is stored.

    Raises UserError if they are missing, broken or not finite.
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise UserError(f"{folder} holds no weights: {WEIGHTS[0]} is missing.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except (SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is broken ({first_line(error)}): copy or train it again.") from None
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path} holds numbers that are not finite (in {name}): train it again with a lower rate.")
    return state


def stored_bytes(name: str) -> int | None:
    """Size of a drafter's weights on disk; None if they are not here."""
    for weights in WEIGHTS:
        file = Path(name) / weights if Path(name).is_dir() else try_to_load_from_cache(name, weights)
        if isinstance(file, (str, Path)) and Path(file).exists():
            return Path(file).stat().st_size
    return None


def load_state(drafter: TrainedDrafter, state: Mapping[str, Tensor], folder: Path) -> TrainedDrafter:
    """Give a drafter its tensors. Raises UserError unless they fit name by name."""
    own = {name: tensor.shape for name, tensor in drafter.state_dict().items()}
    given = {name: tensor.shape for name, tensor in state.items()}
    if wrong := sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name)):
        raise UserError(
            f"The weights in {folder} do not fit its config: missing, unknown or of another shape: {', '.join(wrong)}."
        )
    drafter.load_state_dict(state)
    return drafter


@contextmanager
def whole(folder: Path, then: str = "Make room and run the same command again.") -> Iterator[Path]:
    """A folder to fill; it takes the place of `folder` once all of it is on disk. Failing leaves `folder` as it was.

    Raises UserError if it cannot be written, and `then` is what it tells the user to do.
    """
    place = folder.absolute()
    partial, old = (place.with_name(f".{place.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        partial.rename(place)
        _sync(place.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        raise UserError(
            f"{folder} could not be written ({first_line(error)}; {_free(place.parent)} free there). {then}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Tensors only: a pickle that would run code is refused by torch."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no table of tensors.")
    return state


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"
