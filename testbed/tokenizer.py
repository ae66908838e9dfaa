"""A byte-level BPE tokenizer of 2048 entries, small enough to train in seconds and to ship with the weights."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from testbed import draw, packs

VOCAB_SIZE = 2048
LLAVA_SPECIALS = ("<pad>", "<s>", "</s>", "<image>")
QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
REAL_CHARACTERS = 3_000_000  # of packs and prose: enough for common English, not enough to drown the charts


def build(folder: Path | None, specials: Sequence[str] = LLAVA_SPECIALS, samples: int = 20_000) -> Tokenizer:
    """Trains on `samples` drawn answers and, if `folder` has them, real text. `specials` get the ids 0, 1, ...

    The vocabulary has exactly `VOCAB_SIZE` entries, specials included; if the texts give fewer (no `folder`), the rest
    is reserved. Digits stand alone, so that a value is read
    digit by digit. Deterministic. Wrap in `transformers.PreTrainedTokenizerFast(tokenizer_object=...)`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(folder, samples), trainer)
    tokenizer.add_special_tokens([f"<reserved_{i}>" for i in range(VOCAB_SIZE - tokenizer.get_vocab_size())])
    return tokenizer


def _texts(folder: Path | None, samples: int) -> Iterator[str]:
    for index in range(samples):
        yield "\n".join(draw.text(0, index))
    yield from _sampled(packs.prose(folder) + [row.answer for row in packs.rows(folder, "train")])


def _sampled(texts: list[str]) -> Iterator[str]:
    """A fixed random choice of `texts`, `REAL_CHARACTERS` long in all."""
    random.Random(0).shuffle(texts)
    left = REAL_CHARACTERS
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text
