"""A target by folder or hub id."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText

from speculens.errors import UserError
from speculens.targets.attention import install_attention
from speculens.targets.base import Target
from speculens.targets.patches import multiply_patches
from speculens.targets.processing import load_processor
from speculens.targets.segments import join_segments


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
    if type(config) not in AutoModelForImageTextToText._model_mapping:  # noqa: SLF001 - there is no public list
        raise UserError(
            f"{name} is a '{config.model_type}' model, which takes no pictures and writes no text from them."
        )
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            device_map=device_map,
            revision=revision,
            ignore_mismatched_sizes=True,  # so that they are reported here, in one sentence
            output_loading_info=True,
            **kwargs,
        )
    except SafetensorError as error:
        raise UserError(f"The weights of {name} are broken ({_first_line(error)}): fetch them again.") from None
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{name} could not be loaded: {_first_line(error)}") from None
    model, found = loaded
    # transformers would go on with random numbers in their place.
    wrong = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
    if wrong:
        raise UserError(
            f"{len(wrong)} weights of {name} are missing or of another shape than its config says: {wrong[0]}, ..."
        )
    if device_map is None and not getattr(model, "is_quantized", False):
        model = model.to(device)
    if not all(torch.isfinite(p).all() for p in model.parameters() if p.is_floating_point()):
        raise UserError(f"The weights of {name} hold numbers that are not finite: fetch the checkpoint again.")
    install_attention(model)
    join_segments(model)
    multiply_patches(model)
    return Target(model, load_processor(name, config, revision=revision))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
