"""Lossless speculative decoding for vision-language models."""

from __future__ import annotations

from typing import Any

from speculens.adapter import custom_generate
from speculens.checkpoints import load_drafter
from speculens.conversation import Conversation, Message, load_image
from speculens.drafters import LookupDrafter, NoDrafter
from speculens.engine import Engine, Generation, Step
from speculens.errors import UserError
from speculens.sampling import Sampling
from speculens.stats import Stats
from speculens.targets import Target, load_target
from speculens.tree import DraftTree, TreeShape

__version__ = "0.1.0"

__all__ = [
    "Conversation",
    "DraftTree",
    "Engine",
    "Generation",
    "LookupDrafter",
    "Message",
    "NoDrafter",
    "Sampling",
    "Stats",
    "Step",
    "Target",
    "TreeShape",
    "UserError",
    "custom_generate",
    "generate",
    "load_drafter",
    "load_image",
    "load_target",
]


def generate(target: str | Target, text: str, *, images: list[Any] | None = None, drafter: str = "none", **sampling: Any) -> Generation:
    """One call from a question and pictures to an answer.

    target   a loaded Target, or a folder or hub id (loaded anew each time)
    images   paths, URLs or PIL pictures, shown before the question
    drafter  a folder or hub id, `lookup` or `none`
    sampling  fields of `Sampling`: temperature, max_new_tokens, seed, ...
    """
    if not isinstance(target, Target):
        target = load_target(target)
    guesser = load_drafter(drafter, dtype=target.dtype, device=target.device)
    conversation = Conversation.user(text, images=[load_image(image) for image in images or []])
    return Engine(target, guesser).generate(conversation, Sampling(**sampling))
