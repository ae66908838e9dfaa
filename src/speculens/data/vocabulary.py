"""Which tokens are worth drafting: the commonest of the target's own answers (FR-Spec, arXiv 2502.14856).

A drafter's head over the whole vocabulary costs more than its layer, and most tokens are hardly ever said. The ranking
needs answers alone, best those that the target wrote itself (`speculens respond`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from speculens.conversation import Conversation
from speculens.data.sources import JsonLines, Source
from speculens.errors import UserError
from speculens.targets import Target


@dataclass(frozen=True)
class Vocabulary:
    """The tokens to draft.

    tokens    (V',) long, ids of the target in rising order, so that equal scores rank as over the whole vocabulary
    counted   tokens in the answers
    coverage  the share of them that `tokens` holds
    """

    tokens: Tensor
    counted: int
    coverage: float


def commonest(
    source: Source, target: Target, size: int, tell: Callable[[int, int], None] = lambda _done, _total: None
) -> Vocabulary:
    """The `size` commonest tokens of all answers; tokens that end a text and other special ones are always among them.

    Where the answers hold fewer, the lowest ids fill up: tokenizers that merge pairs number the commonest first.
    `tell` hears how many rows are counted and how many there are. Raises UserError if the size or the rows cannot be
    used.
    """
    counts: Counter[int] = Counter()
    for text in _answers(source, tell):
        counts.update(target.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not counts:
        raise UserError("The rows hold no answers to count tokens of.")
    whole = range(target.vocab_size)
    always = {token for token in (*target.eos_token_ids, *target.tokenizer.all_special_ids) if token in whole}
    if not len(always) < size <= len(whole):
        raise UserError(
            f"A draft vocabulary of {size} is impossible: this target has {len(whole)} tokens, and {len(always)} "
            "special ones are always drafted."
        )
    ranked = sorted(whole, key=lambda token: (token not in always, -counts[token], token))
    tokens = sorted(ranked[:size])
    total = counts.total()
    return Vocabulary(torch.tensor(tokens), total, sum(counts[token] for token in tokens) / total)


def _answers(source: Source, tell: Callable[[int, int], None]) -> Iterator[str]:
    """The text of every answer; rows that cannot be read are passed over."""
    for index in range(len(source)):
        try:
            conversation = _read(source, index)
        except UserError:
            continue
        for message in conversation.messages:
            if message.role == "assistant":
                yield "".join(part for part in message.content if isinstance(part, str))
        tell(index + 1, len(source))


def _read(source: Source, index: int) -> Conversation:
    """Pictures are not opened: only text is counted."""
    if not isinstance(source, JsonLines):
        return source[index]
    return Conversation.from_row(source.row(index), load=lambda _: Image.new("RGB", (1, 1)))
