"""Our own drafter layout: a folder with config.json, model.safetensors and README.md (the model card).

The target's embedding and head are not stored: the drafter borrows them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from speculens.drafters import METHODS, Drafter, DrafterConfig, EagleDrafter, LookupDrafter, NoDrafter
from speculens.errors import UserError


def save_drafter(drafter: EagleDrafter, folder: str | Path, card: Mapping[str, Any] | None = None) -> Path:
    """Write a drafter; `card` (target, recipe, data, metrics) becomes its model card. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(drafter.config.to_dict(), indent=2) + "\n")
    (folder / "README.md").write_text(_model_card(drafter.config, card or {}))
    return folder


def load_drafter(
    name: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Drafter:
    """A drafter by folder, hub id, `none` or `lookup`, ready for a target of this dtype and device.

    Raises UserError if it is missing, broken, or holds numbers that are not finite.
    """
    if str(name) == NoDrafter.name:
        return NoDrafter()
    if str(name) == LookupDrafter.name:
        return LookupDrafter()
    folder = _folder(str(name))
    config = read_config(folder)
    if config.speculator_type not in METHODS:
        raise UserError(
            f"{name} is a '{config.speculator_type}' drafter; known methods are {', '.join(sorted(METHODS))}."
        )
    drafter = METHODS[config.speculator_type](config)
    state = _read_weights(folder)
    own = {name: tensor.shape for name, tensor in drafter.state_dict().items()}
    given = {name: tensor.shape for name, tensor in state.items()}
    if wrong := sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name)):
        raise UserError(
            f"The weights in {folder} do not fit its config: missing, unknown or of another shape: {', '.join(wrong)}."
        )
    drafter.load_state_dict(state)
    return drafter.to(device=device, dtype=dtype).eval().requires_grad_(False)


def read_config(folder: Path) -> DrafterConfig:
    """The config of a drafter folder."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no drafter: config.json is missing.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(values, dict) or "speculator_type" not in values:
        raise UserError(f"{folder} holds no drafter of ours: its config.json names no speculator_type.")
    return DrafterConfig.from_dict(values)


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        raise UserError(
            f"There is no drafter at {name}: it is neither a folder here nor a hub id within reach."
        ) from None


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "model.safetensors"
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no weights: model.safetensors is missing.") from None
    except SafetensorError as error:
        raise UserError(f"{path} is broken ({error}): copy or train it again.") from None
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path} holds numbers that are not finite (in {name}): train it again with a lower rate.")
    return state


def _model_card(config: DrafterConfig, card: Mapping[str, Any]) -> str:
    lines = [
        f"# {config.speculator_type} drafter",
        "",
        (
            f"Speculative drafter for a `{config.target_family}` target of hidden size {config.target_hidden_size} and "
            f"{config.target_vocab_size} tokens. It sees of the picture: `{config.image_contract}`."
        ),
        "",
        *(f"- **{key}**: {value}" for key, value in card.items()),
    ]
    return "\n".join(lines).rstrip() + "\n"
