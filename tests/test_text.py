"""Text while it arrives: whole characters, nothing lost, stop strings found where they end."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tiny
from speculens.text import TextStream

WORDS = tiny.tokenizer("llava")
IDS = st.lists(st.integers(0, len(WORDS) - 1), max_size=30)
SNOWMAN = "A snowman ☃, a rocket 🚀 and a café."


def decode(tokens):
    return WORDS.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(tokens, stop=()):
    """The pieces released, and the number of tokens after which a stop string was complete (or None)."""
    flow, pieces, ended = TextStream(WORDS, stop), [], None
    for count, token in enumerate(tokens, 1):
        piece, complete = flow.push(token)
        pieces.append(piece)
        if complete and ended is None:
            ended = count
    assert flow.text == "".join(pieces)
    return pieces, ended


@given(st.text(max_size=40))
@example(SNOWMAN)
@example("  two  spaces\n\n\tand more ")
def test_any_text_comes_out_as_it_was(text):
    tokens = WORDS.encode(text, add_special_tokens=False)
    assert "".join(stream(tokens)[0]) == decode(tokens)


@given(IDS)
def test_any_tokens_come_out_as_the_tokenizer_decodes_them(tokens):
    """Also bytes that are no text. Half a character at the end is held back."""
    released, whole = "".join(stream(tokens)[0]), decode(tokens)
    assert whole.startswith(released)
    assert set(whole[len(released) :]) <= {"\ufffd"}


@given(st.text(max_size=20))
@example(SNOWMAN)
def test_no_piece_holds_half_a_character(text):
    tokens = WORDS.encode(text, add_special_tokens=False)
    pieces, _ = stream(tokens)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_every_character_is_released_with_its_last_token():
    tokens = WORDS.encode(SNOWMAN, add_special_tokens=False)
    pieces, _ = stream(tokens)
    for count in range(1, len(tokens) + 1):
        whole = decode(tokens[:count])
        assert "".join(pieces[:count]) == whole.rstrip("\ufffd")


def test_special_tokens_are_not_shown():
    assert stream([WORDS.bos_token_id, *WORDS.encode("so", add_special_tokens=False), WORDS.eos_token_id])[0][-1] == ""


@given(IDS, st.data())
def test_stop_strings_are_found_when_their_last_character_is_released(tokens, data):
    text = "".join(stream(tokens)[0])
    cuts = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 6))
    stops = tuple(text[start : start + size] for start, size in data.draw(st.lists(cuts, max_size=3)))
    stops = tuple(stop for stop in stops if stop) or ("no such string",)
    pieces, ended = stream(tokens, stops)
    expected = next(
        (n for n in range(1, len(pieces) + 1) if pieces[n - 1] and any(s in "".join(pieces[:n]) for s in stops)), None
    )
    assert ended == expected


@pytest.mark.parametrize("stop", ["shows", " shows a", "ctur", "e. ", "The picture shows a small red square"])
def test_a_stop_string_may_span_any_number_of_tokens(stop):
    text = tiny.SENTENCES[0]
    tokens = WORDS.encode(text, add_special_tokens=False)
    _, ended = stream(tokens, (stop,))
    if stop not in text:
        assert ended is None
    else:
        assert stop in decode(tokens[:ended])
        assert stop not in decode(tokens[: ended - 1])


def test_pieces_of_other_tokenizers_keep_their_spaces():
    """SentencePiece-like decoding drops the space before the first token it is given."""

    class Pieces:
        def decode(self, tokens, **_: object):
            return "".join(["", " to", " be", " or", "s"][t] for t in tokens).lstrip()

    flow = TextStream(Pieces())
    assert "".join(flow.push(token)[0] for token in [1, 2, 3, 4, 1]) == "to be ors to"
