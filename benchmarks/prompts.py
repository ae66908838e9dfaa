"""What is asked in measurements: held-out questions, alone or at the end of a longer conversation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from speculens import Conversation, Message
from speculens.bench.suites import from_files

HELDOUT = Path(__file__).parents[1] / "testbed" / "heldout"


def questions(files: Sequence[Path], limit: int) -> list[Conversation]:
    """The first question of each row, taken from the files in turn."""
    return [Conversation(case.conversation().messages[:1]) for case in from_files(files)[:limit]]


def with_pictures(asked: Sequence[Conversation], pictures: int) -> list[Conversation]:
    """Each question with so many pictures, its own the last: those before are other questions'."""
    shown = [[part for part in one.messages[0].content if not isinstance(part, str)] for one in asked]
    return [
        Conversation(
            (
                Message(
                    "user",
                    (*chain(*(shown[(i - k) % len(asked)] for k in range(1, pictures))), *one.messages[0].content),
                ),
            )
        )
        for i, one in enumerate(asked)
    ]
