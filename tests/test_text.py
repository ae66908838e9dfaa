"""Text while it arrives: whole characters, nothing lost, stop strings found where they end."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tiny
from speculens.answer import runs
from speculens.sampling import Sampling
from speculens.slot import Slot, Step
from speculens.text import HALF, TextStream, spell

WORDS = tiny.tokenizer("llava")
IDS = st.lists(st.integers(0, len(WORDS) - 1), max_size=30)
SNOWMAN = "A snowman ☃, a rocket 🚀 and a café."

TOKENIZERS = {
    "bytes": WORDS,
    "pieces as of Llama": tiny.pieces(leading_space=True),
    "pieces as of Gemma": tiny.pieces(leading_space=False),
}
EVERY_KIND = pytest.mark.parametrize("words", TOKENIZERS.values(), ids=TOKENIZERS)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)
SPOKEN = st.lists(st.sampled_from(["a", "w", "orld", " ", "\n", "é", "☃", "🚀", " world"]), max_size=12).map("".join)


def decode(tokens, words=WORDS):
    return words.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(tokens, stop=(), words=WORDS):
    """The pieces released, and the number of tokens after which a stop string was complete (or None)."""
    flow, pieces, ended = TextStream(words, stop), [], None
    for count, token in enumerate(tokens, 1):
        piece, complete = flow.push(token)
        pieces.append(piece)
        if complete and ended is None:
            ended = count
    assert flow.text == "".join(pieces)
    return pieces, ended


def finished(tokens, words):
    """What was released, the end included."""
    flow = TextStream(words)
    pieces = [*(flow.push(token)[0] for token in tokens), flow.finish()]
    assert flow.text == "".join(pieces)
    assert not flow.finish()
    return flow.text


@given(st.text(max_size=40))
@example(SNOWMAN)
@example("  two  spaces\n\n\tand more ")
def test_any_text_comes_out_as_it_was(text):
    tokens = WORDS.encode(text, add_special_tokens=False)
    assert "".join(stream(tokens)[0]) == decode(tokens)


@given(IDS)
def test_any_tokens_come_out_as_the_tokenizer_decodes_them(tokens):
    """Also bytes that are no text. Half a character is held back to the end, and then released."""
    released, whole = "".join(stream(tokens)[0]), decode(tokens)
    assert whole.startswith(released)
    assert {*whole[len(released) :]} <= {HALF}
    assert finished(tokens, WORDS) == whole


@EVERY_KIND
@given(text=SPOKEN | TEXT, data=st.data())
def test_an_answer_cut_anywhere_is_what_the_tokenizer_decodes(words, text, data):
    """Special tokens in the middle, before, after, and within a character, too."""
    tokens = words.encode(text, add_special_tokens=False)
    for place in data.draw(st.lists(st.integers(0, len(tokens)), max_size=3)):
        tokens.insert(place, words.eos_token_id)
    assert finished(tokens, words) == decode(tokens, words)
    cut = tokens[: data.draw(st.integers(0, len(tokens)))]
    # Bytes as tokens: half a character turns whole ones before it into rubbish as well, but they were released.
    whole = next(end for end in range(len(cut), -1, -1) if not decode(cut[:end], words).endswith(HALF))
    assert finished(cut, words) in {decode(cut, words), decode(cut[:whole], words) + decode(cut[whole:], words)}


@EVERY_KIND
def test_an_answer_may_end_in_half_a_character_or_in_what_looks_like_one(words):
    for text in ("wor" + HALF, HALF, "a" + HALF * 2):
        assert finished(words.encode(text, add_special_tokens=False), words) == text
    tokens = words.encode("wor☃", add_special_tokens=False)
    assert finished(tokens[:-1], words) == decode(tokens[:-1], words) != "wor"


@pytest.mark.parametrize("words", [*TOKENIZERS.values()][1:], ids=[*TOKENIZERS][1:])
def test_a_broken_byte_spoils_no_character_before_it(words):
    snowman, broken, letter = (
        [words.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data] for data in ("☃".encode(), b"\xff", b"a")
    )
    assert finished([*snowman, *snowman, *broken, *letter], words).startswith("☃☃" + HALF)


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


@EVERY_KIND
@given(text=SPOKEN, data=st.data())
def test_steps_and_runs_hold_all_of_the_text_however_it_ends(words, text, data):
    tokens = words.encode(f"a{text}☃", add_special_tokens=False)
    longest = data.draw(st.integers(1, len(tokens)))
    slot = Slot(None, Sampling(max_new_tokens=longest), TextStream(words))
    told, seen = TextStream(words), []
    while slot.finish_reason is None:
        count = data.draw(st.integers(1, 4))
        emitted = slot.take(tokens[len(slot.tokens) :][:count], {words.eos_token_id})
        if data.draw(st.booleans()) and slot.finish_reason is None:
            emitted += slot.take(tokens[len(slot.tokens) :][:1], {words.eos_token_id})
        said = slot.say()
        accepted = data.draw(st.integers(max(len(emitted) - 1, 0), len(emitted)))
        parts = runs(told, Step(slot, emitted, said, accepted, None))
        assert accepted < len(emitted) or all(run.drafted for run in parts)
        seen.append((said, parts))
    assert slot.tokens == tokens[:longest]
    assert slot.text == "".join(said for said, _ in seen) == finished(slot.tokens, words)
    assert all(said == "".join(run.text for run in parts) for said, parts in seen)


# --- a token alone


@EVERY_KIND
@given(text=SPOKEN | TEXT)
@example(text=SNOWMAN)
@example(text="Hello world  é")
def test_the_bytes_of_the_tokens_are_those_of_the_text(words, text):
    spelt = [spell(words, token) for token in words.encode(text, add_special_tokens=False)]
    joined = b"".join(data for _, data in spelt)
    assert joined in {text.encode(), f" {text}".encode()}
    if HALF not in text:
        assert all(part.encode() == data for part, data in spelt if HALF not in part)


@given(IDS)
def test_the_bytes_of_any_tokens_are_those_of_what_they_decode_to(tokens):
    joined = b"".join(spell(WORDS, token)[1] for token in tokens)
    assert joined.decode(errors="replace") == WORDS.decode(tokens, skip_special_tokens=False)


@EVERY_KIND
def test_a_token_is_spelt_with_its_space_and_a_special_one_as_it_is_written(words):
    word = words.encode("a world", add_special_tokens=False)[-1]
    assert spell(words, words.eos_token_id) == ("</s>", b"</s>")
    assert spell(words, word)[0] in {" world", "d"}
    half = words.encode("a☃", add_special_tokens=False)[-1]
    assert spell(words, half) == (HALF, b"\x83")
