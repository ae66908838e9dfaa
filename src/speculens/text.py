"""Tokens to text while they arrive: whole characters only, and the stop strings; and how a token alone is spelt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

HALF = "\ufffd"  # what a decoder writes for bytes that are no whole character
_ONE_BYTE = re.compile("<0x([0-9A-F]{2})>")  # how SentencePiece names a byte that is a token


class TextStream:
    """Detokenises one sequence step by step. `text` is all that was released so far; with `finish`, all of it.

    It is what the tokenizer makes of all tokens together, but for one thing: where tokens are bytes, a decoder may give
    up whole characters for a broken one behind them, and what was released stays.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._held: list[int] = []  # tokens that may be half a character
        self._begun = False
        self.text = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token; return the newly released text, and whether a stop string is now complete."""
        self._held.append(token)
        text = _behind(self._tokenizer, self._held)
        if text.endswith(HALF):  # wait for the rest
            return "", False
        released = self._release(text)
        reach = len(released) + max((len(stop) for stop in self._stop), default=0)
        return released, any(stop in self.text[-reach:] for stop in self._stop)

    def finish(self) -> str:
        """No token comes any more: release what was held back, be it half a character."""
        return self._release(_behind(self._tokenizer, self._held))

    def _release(self, text: str) -> str:
        if text and not self._begun:  # here a tokenizer may strip a space of its own
            text, self._begun = _decode(self._tokenizer, self._held), True
        self._held.clear()
        self.text += text
        return text


def spell(tokenizer: Any, token: int) -> tuple[str, bytes]:
    """What a token adds to a text, as text and as bytes: of half a character only the bytes are right.

    Special tokens are spelt as they are written.
    """
    text = _behind(tokenizer, [token], special=True)
    return text, _bytes(tokenizer.convert_ids_to_tokens(token), text) if HALF in text else text.encode()


def _bytes(piece: str, text: str) -> bytes:
    """Of a piece of the vocabulary that is no whole text."""
    if byte := _ONE_BYTE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return bytes(_BYTES[letter] for letter in piece) if _BYTES.keys() >= {*piece} else text.encode()


def _byte_letters() -> dict[str, int]:
    """How byte-level vocabularies write a byte (GPT-2): as its Latin-1 character; from U+0100 on if it has none."""
    shown = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()


def _behind(tokenizer: Any, tokens: Sequence[int], *, special: bool = False) -> str:
    """The text of tokens that do not begin it: at the beginning, a decoder may strip a space."""
    anchor, length = _anchor(tokenizer)
    return _decode(tokenizer, [anchor, *tokens], special=special)[length:]


@lru_cache(8)
def _anchor(tokenizer: Any) -> tuple[int, int]:
    """A token that is a letter or several, and how many."""
    texts = ((token, _decode(tokenizer, [token])) for token in range(len(tokenizer)))
    return next((token, len(text)) for token, text in texts if text.isalpha())


def _decode(tokenizer: Any, tokens: Sequence[int], *, special: bool = False) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False))
