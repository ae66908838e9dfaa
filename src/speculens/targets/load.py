"""A target by folder or hub id."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from speculens.errors import UserError
from speculens.targets.base import Target
from speculens.targets.processing import load_processor


def load_target(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Target:
    """Load a frozen vision-language model and its processor.

    dtype       `auto` is the checkpoint's own on a GPU and float32 on a CPU, where half precision is slow
    device      where the whole model goes; the default is the GPU if there is one
    device_map  spreads a large model, as transformers does; then `device` is not used
    kwargs      go to `from_pretrained`: `quantization_config`, `attn_implementation`, ...
    Raises UserError if there is no such model here or it is of a kind that cannot be a target.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto" and device.type == "cpu" and device_map is None:
        dtype = torch.float32
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"There is no model at {name}: {_first_line(error)}") from None
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise UserError(f"{name} is a '{config.model_type}' model, which takes no pictures and writes no text from them.")
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            name, config=config, dtype=dtype, device_map=device_map, revision=revision, **kwargs
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{name} could not be loaded: {_first_line(error)}") from None
    if device_map is None and not getattr(model, "is_quantized", False):
        model = model.to(device)
    if not all(torch.isfinite(p).all() for p in model.parameters() if p.is_floating_point()):
        raise UserError(f"The weights of {name} hold numbers that are not finite: fetch the checkpoint again.")
    return Target(model, load_processor(name, config, revision=revision))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
