"""Tokens to text while they arrive: whole characters only, and the stop strings."""

from __future__ import annotations

from typing import Any


class TextStream:
    """Detokenises one sequence step by step. `text` is all that was released so far."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._start = 0  # decoding starts here: one settled token back, so that leading spaces come out right
        self._shown = ""  # what the tokens from `_start` on decode to, as far as released
        self.text = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token; return the newly released text, and whether a stop string is now complete."""
        self._tokens.append(token)
        whole = self._decode(self._tokens[self._start :])
        if whole.endswith("\ufffd"):  # half a character: wait for the rest
            return "", False
        released = whole[len(self._shown) :]
        self.text += released
        self._start = len(self._tokens) - 1
        self._shown = self._decode(self._tokens[self._start :])
        reach = len(released) + max((len(stop) for stop in self._stop), default=0)
        return released, any(stop in self.text[-reach:] for stop in self._stop)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
