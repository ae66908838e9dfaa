from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from speculens.conversation import Conversation, Message
from speculens.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(colour=RED):
    return Image.new("RGB", (6, 4), colour)


def encoded(image=None):
    buffer = io.BytesIO()
    (image or picture()).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_question_with_pictures():
    conversation = Conversation.user("What?", images=[picture(), encoded(picture(BLUE))])
    assert [image.getpixel((0, 0)) for image in conversation.images] == [RED, BLUE]
    longer = conversation.then("assistant", "Two squares.").then("user", "Sure?", picture())
    assert [message.role for message in longer.messages] == ["user", "assistant", "user"]
    assert len(longer.images) == 3
    assert len(conversation.messages) == 1
    chat = longer.to_chat()
    assert [part["type"] for part in chat[0]["content"]] == ["image", "image", "text"]
    assert chat[0]["content"][0]["image"] is longer.images[0]
    assert chat[1] == {"role": "assistant", "content": [{"type": "text", "text": "Two squares."}]}


@pytest.fixture
def root(tmp_path):
    picture(RED).save(tmp_path / "red.png")
    picture(BLUE).save(tmp_path / "blue.png")
    return tmp_path


def outline(row, root=None):
    """Roles with texts, and pictures as the name of their colour."""
    names = {RED: "red", BLUE: "blue"}
    return [
        (message.role, *(part if isinstance(part, str) else {names[part.getpixel((0, 0))]} for part in message.content))
        for message in Conversation.from_row(row, root).messages
    ]


def test_rows_in_messages_form(root):
    content = [
        {"type": "image", "image": "red.png"},
        {"type": "text", "text": "one"},
        {"type": "image", "path": "blue.png", "text": None},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(encoded()).decode()}},
        "two",
    ]
    entries = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "Yes."},
    ]
    expected = [
        ("system", "Be brief."),
        ("user", {"red"}, "one", {"blue"}, {"red"}, "two"),
        ("assistant", "Yes."),
    ]
    assert outline({"id": 1, "messages": entries}, root) == expected
    assert outline({"id": 1, "conversations": entries}, root) == expected


def test_rows_whose_pictures_are_listed_apart(root):
    entries = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]}]
    assert outline({"messages": entries, "images": ["red.png", {"path": "blue.png", "bytes": None}]}, root) == [
        ("user", {"red"}, "and", {"blue"})
    ]
    entries = [{"role": "user", "content": "Left <image> or right?\n<image>"}]
    assert outline({"messages": entries, "images": ["red.png", {"bytes": encoded(picture(BLUE))}]}, root) == [
        ("user", "Left ", {"red"}, " or right?", {"blue"})
    ]


def test_llava_and_sharegpt_rows(root):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    expected = [("user", {"red"}, "What?"), ("assistant", "Red.")]
    assert outline({"id": "a", "image": "red.png", "conversations": turns}, root) == expected
    turns[0]["value"] = "What?\n<image>"
    expected[0] = ("user", "What?", {"red"})
    assert outline({"id": "a", "image": ["red.png"], "conversations": turns}, root) == expected
    turns[0]["value"] = "What?"  # no mark: the picture comes first
    expected[0] = ("user", {"red"}, "What?")
    assert outline({"id": "a", "images": ["red.png"], "conversations": turns}, root) == expected
    text = [{"from": "human", "value": "Write <image> in HTML."}, {"from": "gpt", "value": "<img>"}]
    assert outline({"id": "b", "image": None, "conversations": text}) == [
        ("user", "Write <image> in HTML."),
        ("assistant", "<img>"),
    ]


def test_mmspec_rows(root):
    row = {"id": "501", "image": "red.png", "turns": ["What?", "Why?"], "category": "multi-turn", "topic": "x"}
    assert outline(row, root) == [("user", {"red"}, "What?"), ("user", "Why?")]


def test_paths_are_absolute_or_start_at_the_root(root, monkeypatch):
    row = {"turns": ["What?"], "image": str(root / "red.png")}
    assert outline(row, Path("/nowhere")) == outline(row) == [("user", {"red"}, "What?")]
    monkeypatch.chdir(root)
    assert outline({"turns": ["What?"], "image": "red.png"}) == [("user", {"red"}, "What?")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(encoded())))
    with pytest.raises(UserError, match="no such file"):  # a row does not read what was piped to the program
        Conversation.from_row({"turns": ["What?"], "image": "-"})


def test_another_loader_may_open_the_pictures():
    asked = []

    def load(source):
        asked.append(source)
        return picture()

    row = {"turns": ["What?"], "images": ["http://somewhere/a.png", b"bytes", "b.png"]}
    assert len(Conversation.from_row(row, Path("root"), load=load).images) == 3
    assert asked == ["http://somewhere/a.png", b"bytes", Path("root/b.png")]


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("hello", "must be a JSON object, not str"),
        ({"id": "x7"}, "Row 'x7': it needs a non-empty list under 'messages', 'conversations' or 'turns'"),
        ({}, r"Row '\(without id\)'"),
        ({"messages": []}, "non-empty list"),
        ({"messages": "hi"}, "non-empty list"),
        ({"messages": [USER, 7]}, "message 2 must be an object, not int"),
        ({"messages": [{"content": "hi"}]}, "message 1 is by None; known speakers are system, user, human"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, r"message 1 is by \['user'\]"),
        ({"messages": [{"role": "user"}]}, "message 1: its content must be a text or a list, not null"),
        ({"messages": [{"role": "user", "content": {}}]}, "must be a text or a list, not dict"),
        ({"messages": [{"role": "user", "content": ""}]}, "message 1 is empty"),
        ({"messages": [{"role": "user", "content": []}]}, "message 1 is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]}, "a part of type 'video'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a part of type 'text' is not understood"),
        ({"messages": [{"role": "user", "content": [3]}]}, "a part of type 'int'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "1 or more pictures, but it lists 0"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "size": 3}]}]}, "needs one of 'image', 'path'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": 3}]}]}, "message 1: A picture must be"),
        ({"turns": ["<image> <image>"], "image": "red.png"}, "2 or more pictures, but it lists 1"),
        ({"turns": ["<image>"], "images": ["red.png", "blue.png"]}, "lists 2 pictures, but its messages use 1"),
        ({"messages": [{"role": "system", "content": "x"}], "image": "red.png"}, "no message of the user"),
        ({"id": 3, "turns": ["hi"], "image": "gone.png"}, "Row 3: Cannot use .*gone.png.*no such file"),
    ],
)
def test_wrong_rows_say_what_is_wrong(root, row, why):
    with pytest.raises(UserError, match=why) as caught:
        Conversation.from_row(row, root)
    assert "\n" not in str(caught.value)


def test_a_message_is_a_value():
    assert Message("user", ("hi",)) == Message("user", ("hi",))
    with pytest.raises(AttributeError):
        Message("user", ("hi",)).role = "system"
