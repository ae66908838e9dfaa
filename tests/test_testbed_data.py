"""Drawn pictures and their exact answers; the packs of real pictures; the tokenizer."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from testbed import draw, make_data, packs, tokenizer
from testbed.grammar import reading, values_read

CASES = [(size, kind) for size in draw.SIZES for kind in draw.KINDS]


@pytest.mark.parametrize("kind", draw.KINDS)
def test_same_arguments_draw_the_same_picture(kind: str) -> None:
    first, again = draw.sample(0, 5, kind=kind), draw.sample(0, 5, kind=kind)
    assert first == again  # pixels included: PIL compares them
    assert draw.text(0, 5, kind=kind) == (first.question, first.answer)


@pytest.mark.parametrize("kind", draw.KINDS)
def test_held_out_pictures_are_other_pictures(kind: str) -> None:
    train = {draw.sample(0, i, kind=kind).image.tobytes() for i in range(30)}
    held_out = {draw.sample(1, i, kind=kind).image.tobytes() for i in range(30)}
    assert len(train) == len(held_out) == 30
    assert not train & held_out


@pytest.mark.parametrize(("size", "kind"), CASES)
def test_the_true_answer_reads_perfectly(size: tuple[int, int], kind: str) -> None:
    """Also: the exact size, an RGB picture, and no answer that is too short or too long to learn from."""
    for index in range(40):
        made = draw.sample(1, index, size, kind)
        assert (made.image.size, made.image.mode, made.kind) == (size, "RGB", kind)
        assert reading(made.facts, made.answer) == (len(made.facts), len(made.facts)) != (0, 0), made
        assert 100 <= len(made.answer) <= 800, made.answer


def test_nothing_is_drawn_over_the_border() -> None:
    for kind in set(draw.KINDS) - {"scene"}:
        for size in draw.SIZES:
            image = draw.sample(1, 3, size, kind).image
            frame = Image.new("L", size, 255)
            frame.paste(0, (2, 1, size[0] - 2, size[1] - 1))
            paper = Image.new("RGB", size, image.getpixel((0, 0)))
            drawn = ImageChops.multiply(ImageChops.difference(image, paper).convert("L"), frame)
            assert drawn.getbbox() is None, (kind, size)


def test_reading_counts_what_is_wrong() -> None:
    facts = (("Jan", "42"), ("Feb", "7"), ("Mar", "30"))
    assert reading(facts, 'A chart titled "Jan 99". Jan is at 42. Feb is at 7. Mar is at 30.') == (3, 3)
    assert reading(facts, "Jan is at 42. Feb is at 70. Jan 1. Mar: 30.5") == (1, 3)
    assert reading(facts, "Jan, Feb 7, Mar 30") == (2, 3)
    assert reading(facts, "| Month | Rain |\n| --- | --- |\n| Jan | 42 |\n| Feb | 8 |\n") == (1, 3)
    assert reading(facts, "") == (0, 3)


def test_reading_takes_series_and_shapes_in_turn() -> None:
    facts = (("Oslo|Plan", "10"), ("Oslo|Real", "20"))
    assert reading(facts, "Oslo: Plan 10, Real 20.") == (2, 2)
    assert reading(facts, "At Oslo, Real 20 beats Plan 11.") == (1, 2)
    assert reading(facts, "| City | Plan | Real |\n| --- | --- | --- |\n| Oslo | 20 | 10 |") == (0, 2)
    shape = (("Top row|left", "large red circle 7"),)
    assert reading(shape, "Top row: left large red circle 7; right empty.") == (1, 1)
    assert reading(shape, "Top row: left large red circle; right small red star 7.") == (0, 1)


def test_packs_give_one_row_for_each_turn(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("L", (12, 8), 200).save(stream, "WEBP", lossless=True)
    data = stream.getvalue()
    (tmp_path / "one.bin").write_bytes(b"before" + data)
    turns = [{"task": "describe", "q": "What?", "a": "Grey."}, {"task": "spec", "q": "How?", "a": "x" * 1001}]
    row = {"id": "a", "source": "one", "split": "val", "off": 6, "len": len(data), "w": 12, "h": 8, "turns": turns}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    with gzip.open(tmp_path / "prose_x.jsonl.gz", "wt") as lines:
        lines.write('{"text": "Prose."}\n')
    (found,) = packs.rows(tmp_path, "val")
    assert (found.id, found.question, found.answer, found.source) == ("a", "What?", "Grey.", "one")
    assert (found.image().mode, found.image().size) == ("RGB", (12, 8))
    assert packs.rows(tmp_path, "train") == []
    assert packs.prose(tmp_path) == ["Prose."]


def test_without_packs_there_are_no_rows(tmp_path: Path) -> None:
    assert packs.rows(tmp_path / "none", "train") == [] == packs.rows(None, "train")
    assert packs.prose(tmp_path / "none") == [] == packs.prose(None)


def test_the_tokenizer_is_lossless_and_spells_digits() -> None:
    made = tokenizer.build(None, tokenizer.QWEN_SPECIALS, samples=1500)
    assert made.get_vocab_size() == tokenizer.VOCAB_SIZE
    assert [made.token_to_id(name) for name in tokenizer.QWEN_SPECIALS] == list(range(7))
    text = draw.text(1, 0)[1] + " 1234 Ünïcode\n"
    assert made.decode(made.encode(text).ids) == text
    assert made.encode("a 2048").tokens[-4:] == ["2", "0", "4", "8"]
    lengths = sorted(len(made.encode(draw.text(1, i)[1]).ids) for i in range(300))
    assert 50 <= lengths[0] < 110 <= lengths[150] < 180 < lengths[-1] <= 320


def test_data_sets_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    make_data.main(["--out", str(tmp_path / "a"), "--count", "6", "--seed", "1"])
    make_data.write(tmp_path / "b", 6, 1, None, workers=2)
    first, second = ((tmp_path / name / "data.jsonl").read_text() for name in "ab")
    assert first == second
    rows = [json.loads(line) for line in first.splitlines()]
    picture, question = rows[2]["messages"][0]["content"]
    made = draw.sample(1, 2, draw.SIZES[2])
    with Image.open(tmp_path / "a" / picture["path"]) as image:
        assert image.tobytes() == made.image.tobytes()
    assert (question["text"], rows[2]["messages"][1]["content"]) == (made.question, made.answer)
    assert rows[2]["metadata"] == {"kind": made.kind, "task": made.task, "facts": [list(fact) for fact in made.facts]}


def test_a_value_counts_in_its_place_even_under_a_misread_column_name() -> None:
    facts = (("Juice|Units", "92"), ("Juice|Stock", "85"), ("Tea|Units", "17"), ("Tea|Stock", "58"))
    answer = "From top to bottom: Juice: Units 92, Score 85. Tea: Units 17, Score 53."
    assert reading(facts, answer) == (2, 4)
    assert values_read(facts, answer) == (3, 4)


@pytest.mark.parametrize("size", draw.SIZES)
def test_every_value_of_the_true_answer_counts(size: tuple[int, int]) -> None:
    for index in range(40):
        made = draw.sample(3, index, size)
        assert values_read(made.facts, made.answer) == (len(made.facts), len(made.facts))
