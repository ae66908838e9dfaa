"""A target by folder or hub id: the whole model, or its outline without weights."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedConfig, PreTrainedModel

from speculens.errors import UserError, first_line
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
    Raises UserError if there is no such model or device here, or the model is of a kind that cannot be a target.
    """
    device = _usable(device)
    if dtype == "auto" and device.type == "cpu" and device_map is None:
        dtype = torch.float32
    config = _config(name, revision)
    model = _weights(name, config, dtype=dtype, device_map=device_map, revision=revision, **kwargs)
    if device_map is None and not getattr(model, "is_quantized", False):
        model = model.to(device)
    if any(weight.is_meta for weight in model.parameters()):
        raise UserError(
            f"{name} does not fit on the GPUs here, and offloading to the CPU is not supported: use more or larger "
            "GPUs, a smaller dtype or a smaller model."
        )
    if not all(torch.isfinite(p).all() for p in model.parameters() if p.is_floating_point()):
        raise UserError(f"The weights of {name} hold numbers that are not finite: fetch the checkpoint again.")
    prepare(model)
    return Target(model, load_processor(name, config, revision=revision))


def prepare(model: PreTrainedModel) -> None:
    """Give a model what makes it faster as it is: attention of ours, and towers without waits."""
    install_attention(model)
    join_segments(model)
    multiply_patches(model)


def outline_target(name: str, *, revision: str | None = None) -> Target:
    """A target without its weights, on the meta device: all shapes, no memory. Raises UserError as `load_target`."""
    config = _config(name, revision)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=config.dtype)
    except (ValueError, ImportError) as error:
        raise UserError(f"{name} cannot be built: {first_line(error)}") from None
    with contextlib.suppress(OSError):  # without one, the end-of-sequence ids are those of the model's config
        model.generation_config = GenerationConfig.from_pretrained(name, revision=revision or "main")
    return Target(model, load_processor(name, config, revision=revision))


def _usable(device: str | torch.device | None) -> torch.device:
    try:
        place = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        place.cpu()  # the meta device can be allocated on, and holds no numbers
        return place.device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"The device {device} cannot be used here: {first_line(error)}") from None


def _config(name: str, revision: str | None) -> PreTrainedConfig:
    """Of a model that takes pictures and writes text from them."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"There is no model at {name}: {first_line(error)}") from None
    except (StrictDataclassError, TypeError, AttributeError, LookupError) as error:  # JSON, but not of a config
        raise UserError(f"The config.json of {name} is broken: {' '.join(str(error).split())}") from None
    if type(config) not in AutoModelForImageTextToText._model_mapping:  # noqa: SLF001 - there is no public list
        raise UserError(
            f"{name} is a '{config.model_type}' model, which takes no pictures and writes no text from them."
        )
    return config


def _weights(name: str, config: PreTrainedConfig, **options: Any) -> Any:
    """The model with all of its weights. transformers would go on with random numbers in place of missing ones."""
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            name,
            config=config,
            ignore_mismatched_sizes=True,  # so that they are reported here, in one sentence
            output_loading_info=True,
            **options,
        )
    except SafetensorError as error:
        raise UserError(f"The weights of {name} are broken ({first_line(error)}): fetch them again.") from None
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{name} could not be loaded: {first_line(error)}") from None
    model, found = loaded
    wrong = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
    if wrong:
        raise UserError(
            f"{len(wrong)} weights of {name} are missing or of another shape than its config says: {wrong[0]}, ..."
        )
    return model
