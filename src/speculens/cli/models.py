"""A target and a drafter as the options name them, loaded without a word from the libraries below."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from speculens.cli.options import Dtype

if TYPE_CHECKING:
    from speculens.drafters import Drafter
    from speculens.targets import Target


def load(
    target: str,
    drafter: str = "none",
    *,
    dtype: Dtype = Dtype.auto,
    device: str | None = None,
    device_map: str | None = None,
    revision: str | None = None,
) -> tuple[Target, Drafter]:
    """Both, the drafter in the target's dtype and beside it."""
    from speculens.checkpoints import load_drafter
    from speculens.targets import load_target

    hush()
    model = load_target(target, dtype=dtype.value, device=device, device_map=device_map, revision=revision)
    return model, load_drafter(drafter, dtype=model.dtype, device=model.device, target=model)


def hush() -> None:
    """Neither loading bars nor advice from the libraries below; downloads keep their bar on a terminal."""
    import huggingface_hub.utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # a hub out of reach is told once, not at every try
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
