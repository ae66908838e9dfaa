"""prepare-data: every known form of rows to one form, pictures by reference or copied, refusals named and counted."""

import base64
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
from jsonlines import read, write
from speculens import Conversation, Target, UserError, cli
from speculens.data import JsonLines
from speculens.data.prepare import Selection, Summary, prepare, spread
from speculens.data.rows import Names, reason
from speculens.training.batches import Encoder

ROWS = [
    {
        "id": "messages",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
        ],
    },
    {
        "id": "llava",
        "image": "sub/b.png",
        "conversations": [
            {"from": "human", "value": "Describe.\n<image>"},
            {"from": "gpt", "value": "Blocks."},
            {"from": "human", "value": "More"},
            {"from": "gpt", "value": "Four of them."},
        ],
        "model": "x",
    },
    {"id": "sharegpt", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"id": 7, "image": "a.png", "turns": ["What is it?", "And why?"], "category": "vqa", "topic": "cats"},
]
BAD = [
    {"id": "gone", "image": "gone.png", "turns": ["What?"]},
    {"id": "gone too", "image": "gone/really.png", "turns": ["What?"]},
    {"id": "mute", "messages": []},
]


DEEP = "[" * 100_000 + "]" * 100_000  # more than Python's reader of JSON goes down


@pytest.fixture
def folder(tmp_path):
    """Rows and pictures under `in`."""
    made = tmp_path / "in"
    (made / "sub").mkdir(parents=True)
    tiny.picture(0).save(made / "a.png")
    tiny.picture(1, tiny.SIZES[1]).save(made / "sub" / "b.png")
    write(made / "rows.jsonl", ROWS)
    return made


def same(first, second):
    """Equal roles, texts and pixels."""
    flat = [
        [(m.role, [p if isinstance(p, str) else (p.size, p.tobytes()) for p in m.content]) for m in c.messages]
        for c in (first, second)
    ]
    return flat[0] == flat[1]


@pytest.mark.parametrize("copied", [False, True])
def test_each_form_keeps_its_words_and_pictures(folder, tmp_path, copied):
    out = tmp_path / "out" / "rows.jsonl"
    report = prepare(JsonLines([folder / "rows.jsonl"]), out, Selection(copy_images=copied))
    before, after = JsonLines([folder / "rows.jsonl"]), JsonLines([out])  # the output needs no image root
    assert len(after) == len(ROWS)
    assert all(same(before[i], after[i]) for i in range(len(ROWS)))
    rows = read(out)
    assert [row["id"] for row in rows] == ["messages", "llava", "sharegpt", 7]
    assert (rows[1]["model"], rows[3]["category"], rows[3]["topic"]) == ("x", "vqa", "cats")
    assert all(set(row) & {"conversations", "turns", "image"} == set() for row in rows)
    pictures = list((tmp_path / "out" / "rows_images").glob("*")) if copied else []
    assert len(pictures) == 2 * copied  # one picture of two rows is there once
    assert (report.rows, report.questions, report.answers, report.pictures) == (4, 6, 4, 3)
    assert (report.with_pictures, report.without_answer) == (3, 1)
    assert sorted(path.name for path in out.parent.iterdir()) == ["rows.jsonl"] + ["rows_images"] * copied


def test_prepared_rows_prepare_to_themselves(folder, tmp_path):
    once, twice = tmp_path / "once.jsonl", tmp_path / "twice.jsonl"
    prepare(JsonLines([folder / "rows.jsonl"]), once)
    prepare(JsonLines([once]), twice)
    assert once.read_text() == twice.read_text()


def test_pictures_without_a_file(folder, tmp_path):
    """A data URI stays in the row, or becomes a file. A mark in a row without pictures is a word."""
    uri = "data:image/png;base64," + base64.b64encode((folder / "a.png").read_bytes()).decode()
    rows = write(folder / "uri.jsonl", [{"id": "u", "image": uri, "turns": ["What?"]}, {"turns": ["A <image> tag"]}])
    for name, copied in (("kept", False), ("copied", True)):
        out = tmp_path / f"{name}.jsonl"
        prepare(JsonLines([rows]), out, Selection(copy_images=copied))
        assert (uri in out.read_text()) is not copied
        assert all(same(JsonLines([out])[i], JsonLines([rows])[i]) for i in range(2))


@pytest.mark.parametrize("way", ["file", "uri"])
def test_a_kill_leaves_no_half_of_a_picture_under_its_name(way, folder, tmp_path, monkeypatch):
    uri = "data:image/png;base64," + base64.b64encode((folder / "a.png").read_bytes()).decode()
    rows = write(folder / "one.jsonl", [{"id": 1, "image": "a.png" if way == "file" else uri, "turns": ["What?"]}])
    write_bytes = Path.write_bytes

    def killed(file):
        write_bytes(file, (folder / "a.png").read_bytes()[:50])
        raise KeyboardInterrupt

    if way == "file":
        monkeypatch.setattr(Path, "write_bytes", lambda file, _: killed(file))
    else:
        monkeypatch.setattr(Image.Image, "save", lambda _picture, file, _kind: killed(file))
    with pytest.raises(KeyboardInterrupt):
        prepare(JsonLines([rows]), tmp_path / "out.jsonl", Selection(copy_images=True))
    monkeypatch.undo()
    prepare(JsonLines([rows]), tmp_path / "out.jsonl", Selection(copy_images=True))
    assert same(JsonLines([tmp_path / "out.jsonl"])[0], JsonLines([rows])[0])
    assert len(list((tmp_path / "out_images").iterdir())) == 1


def test_arrays_are_read_like_lines(folder):
    rows = [*ROWS, {"id": "é", "turns": ['ß "[,]" 語']}]
    array = folder / "rows.json"
    texts = (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), f"\n {json.dumps(rows)} \n")
    for text in (*texts, "\n".join(map(json.dumps, rows))):
        for encoding in ("utf-8", "utf-8-sig"):
            array.write_text(text, encoding=encoding)
            source = JsonLines([array])
            assert [source.row(i) for i in range(len(source))] == rows
    array.write_text("[]")
    assert len(JsonLines([array])) == 0
    for text in ("[", '[{"id": 1}', '[{"id": 1}, {"id"'):
        array.write_text(text)
        with pytest.raises(UserError, match="no whole JSON array"):
            JsonLines([array])
    array.write_text(f"[1, {DEEP}]")
    with pytest.raises(UserError, match="nested too deeply to be read, at byte 4"):
        JsonLines([array])


def test_refusals_are_named_and_counted_by_reason(folder, tmp_path):
    rows = write(folder / "bad.jsonl", [ROWS[0], *BAD, '{"id": "torn', f'{{"id": {DEEP}}}', ROWS[2]])
    out = tmp_path / "out.jsonl"
    report = prepare(JsonLines([rows]), out).to_dict()
    assert (report["read"], report["rows"], report["refused"]) == (7, 2, 5)
    assert sorted(report["reasons"].values()) == [1, 1, 1, 2]
    assert report["reasons"]["Cannot use … as a picture: there is no such file."] == 2
    errors = read(tmp_path / "out_error.jsonl")
    assert [error["id"] for error in errors] == ["gone", "gone too", "mute", "row-5", "row-6"]
    assert errors[4]["error"] == f"Row 6 of {rows} is nested too deeply to be read."
    assert "gone/really.png" in errors[1]["error"]
    out.unlink()
    with pytest.raises(UserError, match=r"out_error\.jsonl exists already: .*--overwrite"):
        prepare(JsonLines([folder / "rows.jsonl"]), out)
    assert read(tmp_path / "out_error.jsonl") == errors
    prepare(JsonLines([folder / "rows.jsonl"]), out, Selection(overwrite=True))
    assert not (tmp_path / "out_error.jsonl").exists()  # nothing is left of an earlier run


def test_reasons_leave_out_what_only_one_row_has():
    first, second = (
        UserError(f"Row {name!r}: message {n}: Cannot use {name!r} as a picture: its size is {n} x 0.")
        for name, n in (("it's", 1), ('b"c', 22))
    )
    assert reason(first) == reason(second) == "message N: Cannot use … as a picture: its size is N x N."
    assert reason(UserError("The target's processor refuses this model's 1,024.5 rows.")) == (
        "The target's processor refuses this model's N rows."
    )


def test_an_id_for_every_row():
    names = Names()
    rows = [{"id": "a"}, {"id": "a"}, {}, {"id": "a#2"}, {"id": 3}, {"id": "3"}, None, {"id": ""}, {"id": []}]
    assert [names.name(row, place) for place, row in enumerate(rows)] == [
        *("a", "a#2", "row-3", "a#2#2", 3, "3#2", "row-7", "row-8", "row-9")
    ]


def test_an_id_that_comes_often_is_numbered_without_counting_up():
    class Word(str):
        __slots__ = ()
        formatted = 0

        def __format__(self, spec):
            Word.formatted += 1
            return super().__format__(spec)

    names = Names()
    assert [names.name({"id": Word("a")}, place) for place in range(300)] == ["a", *(f"a#{n}" for n in range(2, 301))]
    assert Word.formatted == 299


def test_order_and_limit(folder, tmp_path):
    rows = write(folder / "many.jsonl", [BAD[0], *({"id": n, "turns": [f"Question {n}"]} for n in range(20))])

    def ids(name, **choice: int):
        prepare(JsonLines([rows]), tmp_path / name, Selection(**choice))
        return [row["id"] for row in read(tmp_path / name)]

    assert ids("first", limit=5) == [0, 1, 2, 3, 4]  # written rows are counted, not refused ones
    shuffled = ids("one", shuffle_seed=1)
    assert sorted(shuffled) == list(range(20)) != shuffled
    assert ids("again", shuffle_seed=1, limit=7) == shuffled[:7]
    assert ids("two", shuffle_seed=2) != shuffled


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_lengths_are_those_of_training(folder, tmp_path, family):
    target = Target(tiny.model(family, torch.float32), tiny.processor(family))
    source, out = JsonLines([folder / "rows.jsonl"]), tmp_path / "out.jsonl"
    report = prepare(source, out, target=target)
    trained = [Encoder(target, 4096).row(source[i]) for i in range(3)]
    assert report.tokens[:3] == [len(row.answer) for row in trained]
    assert report.image_tokens[:3] == [int(row.image.sum()) for row in trained]
    assert report.to_dict()["tokens"]["max"] == max(report.tokens)
    most = sorted(report.tokens)[1]
    cut = prepare(source, out, Selection(max_length=most, overwrite=True), target)
    assert sorted(cut.tokens) == sorted(report.tokens)[:2]
    assert dict(cut.refused) == {"its N tokens are more than the N allowed.": 2}


def test_quantiles():
    assert spread([]) is None
    assert spread(list(range(1, 101))) == {"mean": 50.5, "min": 1, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert json.dumps(Summary().to_dict())


def test_nothing_is_left_of_a_run_that_fails(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=r"None of the 3 rows can be used\. The first: .*no such file"):
        prepare(JsonLines([write(folder / "bad.jsonl", BAD)]), out)
    with pytest.raises(UserError, match="None of the 0 rows"):
        prepare(JsonLines([write(folder / "empty.jsonl", [])]), out)
    with pytest.raises(KeyboardInterrupt):
        prepare(JsonLines([folder / "rows.jsonl"]), out, on_row=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert list(tmp_path.iterdir()) == [folder]
    out.write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        prepare(JsonLines([folder / "rows.jsonl"]), out)
    assert out.read_text() == "mine"


def test_the_command(folder, tmp_path, capsys):
    target = str(tiny.save("llava", tmp_path / "llava", torch.float32))
    capsys.readouterr()
    write(folder / "rows.jsonl", [*ROWS, *BAD])
    out = tmp_path / "out.jsonl"
    words = ["prepare-data", str(folder / "rows.jsonl"), "--out", str(out), "--target", target]
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    assert "4 of 7 rows read" in shown.out
    assert "2  Cannot use … as a picture: there is no such file." in shown.out
    assert shown.err == f"Which rows are refused, and why: {tmp_path / 'out_error.jsonl'}\n"  # no bar, no terminal
    assert cli.main([*words, "--overwrite", "--json", "--limit", "1", "--shuffle-seed", "3"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["rows"], said["tokens"]["min"], said["output"]) == (1, said["tokens"]["max"], str(out))
    assert cli.main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["prepare-data", str(folder / "rows.jsonl"), "--out", str(out), "--max-length", "9"]) == 2
    assert cli.main(["prepare-data", str(folder / "gone.jsonl"), "--out", str(out)]) == 2
    assert "gone.jsonl cannot be read" in capsys.readouterr().err


def test_image_root(folder, tmp_path):
    outside = tmp_path / "outside.png"
    tiny.picture().save(outside)
    rows = write(tmp_path / "rows.jsonl", [*ROWS, {"image": str(outside), "turns": ["What?"]}])
    out = tmp_path / "deep" / "out.jsonl"
    prepare(JsonLines([rows], folder), out)
    assert read(out)[1]["messages"][0]["content"][1] == {"type": "image", "path": "../in/sub/b.png"}
    assert read(out)[4]["messages"][0]["content"][0] == {"type": "image", "path": str(outside)}
    assert isinstance(JsonLines([out])[1], Conversation)


def test_a_linked_folder(folder, tmp_path):
    """`..` from a linked folder starts where the link leads."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    out = tmp_path / "link" / "out.jsonl"
    prepare(JsonLines([folder / "rows.jsonl"]), out)
    assert same(JsonLines([out])[1], JsonLines([folder / "rows.jsonl"])[1])
