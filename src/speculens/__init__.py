"""Lossless speculative decoding for vision-language models.

Names are imported when they are first used: torch takes seconds, and `speculens --help` must not wait for it.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speculens.adapter import custom_generate
    from speculens.checkpoints import load_drafter
    from speculens.conversation import Conversation, Message
    from speculens.drafters import Drafter, LookupDrafter, NoDrafter
    from speculens.engine import Engine
    from speculens.errors import UserError
    from speculens.pictures import load_image
    from speculens.sampling import Sampling
    from speculens.slot import Generation, Step
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

_HOMES = {
    "adapter": ("custom_generate",),
    "checkpoints": ("load_drafter",),
    "conversation": ("Conversation", "Message"),
    "drafters": ("LookupDrafter", "NoDrafter"),
    "engine": ("Engine",),
    "errors": ("UserError",),
    "pictures": ("load_image",),
    "sampling": ("Sampling",),
    "slot": ("Generation", "Step"),
    "stats": ("Stats",),
    "targets": ("Target", "load_target"),
    "tree": ("DraftTree", "TreeShape"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def generate(
    target: str | Target,
    text: str,
    *,
    images: list[Any] | None = None,
    drafter: str | Drafter = "none",
    **sampling: Any,
) -> Generation:
    """One call from a question and pictures to an answer. For many of them an `Engine` is faster: it is made here anew.

    target   a loaded Target, or a folder or hub id (loaded anew each time)
    images   paths, URLs or PIL pictures, shown before the question
    drafter  a loaded one, a folder or hub id, `lookup` or `none`
    sampling  fields of `Sampling`: temperature, max_new_tokens, seed, ...
    """
    from speculens.checkpoints import load_drafter
    from speculens.conversation import Conversation
    from speculens.engine import Engine
    from speculens.sampling import Sampling
    from speculens.targets import Target, load_target

    if not isinstance(target, Target):
        target = load_target(target)
    if isinstance(drafter, str):
        drafter = load_drafter(drafter, dtype=target.dtype, device=target.device, target=target)
    prompt, chosen = target.encode(Conversation.user(text, images=images or [])), Sampling(**sampling)
    capacity = min(len(prompt) + chosen.max_new_tokens, target.context)
    return Engine(target, drafter, capacity=capacity).generate(prompt, chosen)
