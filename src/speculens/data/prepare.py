"""Rows of any known form to one file in one form, every picture opened once; what cannot be used is named and counted.

Known forms are those of `Conversation.from_row`: messages, LLaVA's and ShareGPT's conversations, MMSpec's turns.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from speculens.conversation import Conversation
from speculens.data.rows import Names, OnRow, Pictures, line, outputs, reason, refusal, rest
from speculens.data.sources import JsonLines
from speculens.errors import UserError
from speculens.targets import Target

QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Selection:
    """Which rows to take, and how.

    limit         rows written at most; None takes all
    shuffle_seed  order of the rows, before the limit; None leaves them as they are
    copy_images   copy every picture into a folder beside the output, `NAME_images`
    max_length    tokens of text and picture that a row may have (needs a target); a longer one is refused, never cut
    overwrite     replace an output or its error file that exists
    """

    limit: int | None = None
    shuffle_seed: int | None = None
    copy_images: bool = False
    max_length: int | None = None
    overwrite: bool = False

    def order(self, rows: int) -> list[int]:
        """The numbers of the rows in the order in which they are read."""
        numbers = list(range(rows))
        if self.shuffle_seed is not None:
            random.Random(self.shuffle_seed).shuffle(numbers)
        return numbers


@dataclass
class Summary:
    """What the rows came to. Counts are of written rows, but for `read` and `refused`.

    refused    by reason
    questions  messages of the user; `answers` those of the assistant
    with_pictures, without_answer   rows
    tokens, image_tokens            of each row, if a target counted them; image tokens are among the tokens
    """

    read: int = 0
    rows: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    questions: int = 0
    answers: int = 0
    pictures: int = 0
    with_pictures: int = 0
    without_answer: int = 0
    tokens: list[int] = field(default_factory=list)
    image_tokens: list[int] = field(default_factory=list)

    def add(self, conversation: Conversation, lengths: tuple[int, int] | None) -> None:
        """Count a row that is written."""
        roles = Counter(message.role for message in conversation.messages)
        self.rows += 1
        self.questions += roles["user"]
        self.answers += roles["assistant"]
        self.without_answer += not roles["assistant"]
        self.pictures += len(conversation.images)
        self.with_pictures += bool(conversation.images)
        if lengths:
            self.tokens.append(lengths[0])
            self.image_tokens.append(lengths[1])

    def to_dict(self) -> dict[str, Any]:
        """All figures in plain JSON types; lengths as mean and quantiles, None where nothing was counted."""
        lengths = {name: spread(getattr(self, name)) for name in ("tokens", "image_tokens")}
        return {**asdict(self), "refused": self.refused.total(), "reasons": dict(self.refused.most_common()), **lengths}


def spread(values: list[int]) -> dict[str, float] | None:
    """Mean and quantiles; None of nothing."""
    if not values:
        return None
    cuts = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf").tolist()
    return {"mean": round(float(np.mean(values)), 2), **dict(zip(QUANTILES, cuts, strict=True))}


def prepare(
    source: JsonLines,
    output: Path,
    selection: Selection | None = None,
    target: Target | None = None,
    on_row: OnRow | None = None,
) -> Summary:
    """Write the rows of `source` to `output`, and the refused ones to its error file, both only when all are done.

    target  counts tokens, with its processor alone; a row that it refuses is refused here
    Raises UserError if no row can be used.
    """
    selection, files = selection or Selection(), outputs(source, output)
    if selection.max_length is not None and target is None:
        raise UserError("max_length counts the tokens of a target: name one with --target.")
    for file in files:
        if file.exists() and not selection.overwrite:
            raise UserError(f"{file} exists already: choose another output, or replace it with --overwrite.")
    summary, first = Summary(), ""
    with ExitStack() as stack:
        rows, refusals = (stack.enter_context(_WholeFile(path)) for path in files)
        for name, row in _prepared(source, output, selection, target, summary):
            if isinstance(row, UserError):
                first = first or str(row)
                summary.refused[reason(row)] += 1
                refusals.add(refusal(name, row))
            else:
                rows.add(row)
            if on_row:
                on_row(*((summary.read, len(source)) if selection.limit is None else (summary.rows, selection.limit)))
        if not summary.rows:
            raise UserError(f"None of the {summary.read} rows can be used. The first: {first or 'there is none.'}")
    return summary


def _prepared(
    source: JsonLines, output: Path, selection: Selection, target: Target | None, summary: Summary
) -> Iterator[tuple[str | int, dict[str, Any] | UserError]]:
    names = Names()
    copies = output.with_name(f"{output.stem}_images") if selection.copy_images else None
    for number in selection.order(len(source)):
        if summary.rows == selection.limit:
            return
        summary.read += 1
        row: Any = None
        try:
            row = source.row(number)
            pictures = Pictures(source.root(number), output, copies)
            conversation = pictures.read(row)
            lengths = _lengths(conversation, target, selection.max_length) if target else None
        except UserError as error:
            yield names.name(row, number), error
            continue
        summary.add(conversation, lengths)
        yield (name := names.name(row, number)), {"id": name, "messages": pictures.messages(conversation), **rest(row)}


def _lengths(conversation: Conversation, target: Target, most: int | None) -> tuple[int, int]:
    """Tokens in all, and image tokens."""
    answered = conversation.messages[-1].role == "assistant"
    prompt = target.encode(conversation, add_generation_prompt=not answered)
    if most is not None and len(prompt) > most:
        raise UserError(f"its {len(prompt)} tokens are more than the {most} allowed.")
    return len(prompt), int(prompt.image.sum())


class _WholeFile:
    """Rows of a file that appears when it is complete: an interrupted run leaves what was there before."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._rows = 0

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("wb")
        return self

    def add(self, row: dict[str, Any]) -> None:
        self._file.write(line(row))
        self._rows += 1

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is None and self._rows:
            self._partial.replace(self._path)
        else:
            self._partial.unlink()
            if kind is None:
                self._path.unlink(missing_ok=True)
