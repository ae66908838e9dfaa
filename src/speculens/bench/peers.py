"""What transformers itself offers, in the same harness: `generate` plain, with prompt lookup, with an assistant model.

These run in a loop of their own, so their speedup over our `none` says which loop is faster, not what a drafter is
worth; tables label them. An assistant drafts without the picture: transformers gives it the token ids alone. And a
prompt of PaliGemma, whose attention is bidirectional, comes out wrong under assistance; `exact` shows it as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from speculens.answer import Answer
from speculens.bench.measure import Contender
from speculens.errors import UserError, first_line
from speculens.sampling import Sampling
from speculens.slot import Generation
from speculens.stats import Stats
from speculens.targets import Prompt, Target, load_target
from speculens.targets.processing import image_token_id

PREFIX = "hf"
LOOP = "transformers"
LOOKUP_TOKENS = 10  # the number that transformers' documentation of prompt lookup uses


def is_peer(name: str) -> bool:
    """Whether a drafter's name asks for a loop of transformers."""
    return name == PREFIX or name.startswith(f"{PREFIX}:")


def load_peer(name: str, target: Target, temperature: float) -> Contender:
    """`hf`, `hf:lookup` or `hf:assistant=FOLDER_OR_HUB_ID`. Raises UserError for other names and for sampling."""
    if temperature > 0:
        raise UserError(f"{name} draws its own random numbers, so it can be compared at --temperature 0 only.")
    kind, _, value = name.partition(":")[2].partition("=")
    options: Mapping[str, Any]
    match kind, value:
        case "", "":
            options = {}
        case "lookup", "":
            # Lookup would also copy the marks of picture rows, and the model's forward refuses those without a picture.
            marks = [image_token_id(target.model.config)]
            options = {"prompt_lookup_num_tokens": LOOKUP_TOKENS, "suppress_tokens": marks}
        case "assistant", path if path:
            options = {"assistant_model": load_target(path, dtype=target.dtype, device=target.device).model}
        case _:
            raise UserError(f"There is no peer {name!r}: known are hf, hf:lookup and hf:assistant=FOLDER_OR_HUB_ID.")
    return Contender(name, partial(generate, target, options), LOOP)


def generate(target: Target, options: Mapping[str, Any], prompt: Prompt, sampling: Sampling) -> Answer:
    """One greedy answer of transformers' own loop, with the time of each pass."""
    inputs = target.fitted(prompt.inputs)
    watch = _Watch()
    begun = time.perf_counter()
    try:
        target.model.generate(
            **inputs,
            **options,
            streamer=watch,
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=sampling.max_new_tokens,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"transformers cannot decode this prompt with {', '.join(options) or 'no options'}: {first_line(error)}"
        ) from error
    tokens = watch.tokens
    text = target.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    reason = "stop" if tokens[-1] in target.eos_token_ids else "length"
    done = Generation(tokens, text, reason, watch.stats)
    return Answer(done, (), watch.times[-1] - begun, watch.times[0] - begun)


class _Watch:
    """A streamer: it is given the prompt, then what each pass brought."""

    def __init__(self) -> None:
        self.chunks: list[list[int]] = []
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self.chunks.append(value.flatten().tolist())
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None: ...

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk]

    @property
    def stats(self) -> Stats:
        """Passes after the first, which is the prefill; how many nodes were drafted is not told."""
        stats = Stats()
        for chunk in self.chunks[1:]:
            stats.add_pass(len(chunk), len(chunk) - 1, 0)
        return stats


def split(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Drafters of our own loop, and peers."""
    return [name for name in names if not is_peer(name)], [name for name in names if is_peer(name)]
