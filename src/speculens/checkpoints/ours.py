"""Our own drafter layout: a folder with config.json, model.safetensors and README.md (the model card).

The target's embedding and head are not stored: the drafter borrows them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from speculens.checkpoints.files import find_folder, load_state, read_values, read_weights
from speculens.checkpoints.published import is_published, load_published
from speculens.drafters import METHODS, Drafter, DrafterConfig, LookupDrafter, NoDrafter, TrainedDrafter
from speculens.errors import UserError
from speculens.int8 import pressed, restored
from speculens.targets.base import Target
from speculens.targets.processing import pixel_bounds

log = logging.getLogger(__name__)


def save_drafter(
    drafter: TrainedDrafter, folder: str | Path, card: Mapping[str, Any] | None = None, *, int8: bool = False
) -> Path:
    """Write a drafter; `card` (target, recipe, data, metrics) becomes its model card. Returns the folder.

    int8  store matrices in 8 bits (`int8.py`)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    save_file(pressed(state) if int8 else state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(drafter.config.to_dict(), indent=2) + "\n")
    (folder / "README.md").write_text(_model_card(drafter.config, card or {}))
    return folder


def load_drafter(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    target: Target | None = None,
    int8: bool | None = None,
) -> Drafter:
    """A drafter by folder, hub id, `none` or `lookup`, ready for a target of this dtype and device.

    target  the one that it will draft for; drafters in a published layout need it, because they do not name their own
    int8    hold matrices in 8 bits (`TrainedDrafter.press`); by default where they are stored so and that is faster
    Raises UserError if it is missing, broken, or holds numbers that are not finite.
    """
    if str(name) == NoDrafter.name:
        return NoDrafter()
    if str(name) == LookupDrafter.name:
        return LookupDrafter()
    folder = find_folder(str(name))
    if is_published(folder):
        drafter, stored = load_published(folder, target), False
    else:
        drafter, stored = _load_ours(folder)
    if int8 or (int8 is None and stored and _reads_int8(device, dtype)):
        drafter.press()
    if target is not None:
        _compare_pictures(drafter.config, target)
    return drafter.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _compare_pictures(config: DrafterConfig, target: Target) -> None:
    """Say so where a drafter learnt from pictures of another size: that costs acceptance, and nothing else tells it."""
    learnt, given = (config.min_pixels, config.max_pixels), pixel_bounds(target.processor)
    if None not in (*learnt, *given) and learnt != given:
        log.warning(
            "The drafter learnt from pictures of %s to %s pixels, and the target's processor makes them %s to %s: "
            "expect fewer accepted tokens.",
            *(f"{bound:,}" for bound in (*learnt, *given)),
        )


def _load_ours(folder: Path) -> tuple[TrainedDrafter, bool]:
    """The drafter, and whether its matrices are stored in 8 bits."""
    config = read_config(folder)
    if config.speculator_type not in METHODS:
        raise UserError(
            f"{folder} is a '{config.speculator_type}' drafter; known methods are {', '.join(sorted(METHODS))}."
        )
    state = read_weights(folder)
    drafter = load_state(METHODS[config.speculator_type](config), restored(state), folder)
    return drafter, any(tensor.dtype == torch.int8 for tensor in state.values())


def _reads_int8(device: torch.device | str | None, dtype: torch.dtype | None) -> bool:
    """Whether our kernels read 8 bits there; elsewhere each pass would make the whole matrices anew."""
    return device is not None and torch.device(device).type == "cuda" and dtype is not None and dtype.itemsize == 2


def read_config(folder: Path) -> DrafterConfig:
    """The config of a drafter folder."""
    values = read_values(folder)
    if "speculator_type" not in values:
        raise UserError(f"{folder} holds no drafter of ours: its config.json names no speculator_type.")
    return DrafterConfig.from_dict(values)


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
