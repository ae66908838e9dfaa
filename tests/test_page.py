"""The HTML page: one file that fetches nothing, shows the pictures, and can be read by everyone."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

import tiny
from speculens.answer import Answer, Entry, Run
from speculens.html import LONGEST_SIDE, data_uri
from speculens.page import Card, Section, render
from speculens.show import HEADINGS
from speculens.slot import Generation
from speculens.stats import Stats

VOID = {"meta", "img", "br"}


def answer(*runs: Run) -> Answer:
    stats = Stats()
    stats.add_pass(3, 2, 8)
    done = Generation([1, 2, 3, 4], "".join(run.text for run in runs), "stop", stats)
    return Answer(done, runs, 0.5, 0.25)


HOSTILE = '<script>alert("x")</script> & \'"'
SAID = answer(Run("A red ", drafted=False), Run("square & a\n", drafted=True), Run(HOSTILE, drafted=True))
OWN = answer(Run("A red ", drafted=False))


@pytest.fixture(scope="module")
def html() -> str:
    card = Card(
        f"cat{HOSTILE}.png", [tiny.picture(1), tiny.picture(2)], f"What? {HOSTILE}", SAID, "Somebody, CC BY 4.0"
    )
    plain = Card("No picture", [], "Why?", OWN)
    section = Section(
        f"llava{HOSTILE}", "4 layers", [card, plain], [Entry("none", [OWN], [OWN]), Entry("x", [SAID], [OWN])]
    )
    return render("A page", "What it shows.", [section, Section("", "", [plain])])


class Outline(HTMLParser):
    """Checks nesting and keeps the tags and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_what_was_said_is_escaped_and_all_there(html):
    page = Outline(html)
    assert not page.all("script")
    assert "<script" not in html
    assert SAID.generation.text in page.text
    assert page.text.count(HOSTILE) >= 4  # question, answer, title, heading


def test_it_fetches_nothing(html):
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", html))
    assert not Outline(html).all("link")
    assert all(image["src"].startswith("data:image/") for image in Outline(html).all("img"))


def test_drafted_runs_are_marked_and_only_they(html):
    assert '<span class="kept">square &amp; a\n</span>' in html
    assert 'class="answer">A red <span' in html


def test_everyone_can_read_it(html):
    page = Outline(html)
    assert page.all("html") == [{"lang": "en"}]
    assert not re.search(r"<(h\d|dt|dd|p)[^>]*></", html)  # nothing empty to stumble over
    assert all(image["alt"] for image in page.all("img"))
    assert {image["alt"][-9:] for image in page.all("img")} == {"picture 1", "picture 2"}
    scopes = [head.get("scope") for head in page.all("th")]
    assert scopes == ["col"] * len(HEADINGS) + ["row"] * 2
    (scroll,) = [div for div in page.all("div") if div.get("class") == "scroll"]
    assert (scroll["tabindex"], scroll["role"]) == ("0", "region")  # scrolls by keyboard too
    assert "prefers-color-scheme: dark" in html
    assert "width=device-width" in html
    assert "Drafted and kept" in page.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(html, scheme):
    """Text on every ground it stands on has the 4.5 : 1 that WCAG asks for."""
    blocks = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w+)", blocks[scheme == "dark"]))
    for ink, grounds in (("ink", ("paper", "card", "kept")), ("quiet", ("paper", "card"))):
        for ground in grounds:
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)


def contrast(first: str, second: str) -> float:
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    digits = colour.removeprefix("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def picture_in(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_drawn_picture_survives_exactly():
    original = tiny.picture(3)
    shown = picture_in(data_uri(original))
    assert shown.format == "PNG"
    assert shown.convert("RGB").tobytes() == original.tobytes()


def test_a_large_photo_becomes_small():
    original = Image.effect_noise((3000, 1500), 80).convert("RGB")
    uri = data_uri(original)
    shown = picture_in(uri)
    assert (shown.format, shown.size) == ("JPEG", (LONGEST_SIDE, LONGEST_SIDE // 2))
    assert original.size == (3000, 1500)
