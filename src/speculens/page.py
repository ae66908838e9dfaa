"""A generation as one HTML file: pictures, text with accepted runs coloured, figures. It fetches nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from PIL.Image import Resampling

from speculens.answer import Answer, Entry
from speculens.conversation import Image
from speculens.show import HEADINGS, cells, closing

LONGEST_SIDE = 1024  # pixels; larger pictures are scaled down for the page


@dataclass(frozen=True)
class Card:
    """One question and its answer. `source` says whose the pictures are."""

    title: str
    images: Sequence[Image]
    question: str
    answer: Answer
    source: str = ""


@dataclass(frozen=True)
class Section:
    """What one target answered. `about` is a line under the heading; without `entries` there is no table."""

    title: str
    about: str
    cards: Sequence[Card]
    entries: Sequence[Entry] = ()


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{escape(title)}</h1>",
            f"<p>{escape(lead)}</p>",
            LEGEND,
            "</header>",
            "<main>",
            *(line for section in sections for line in _section(section)),
            "</main>",
            "</body>",
            "</html>",
            "",
        )
    )


def _section(section: Section) -> Iterator[str]:
    yield "<section>"
    if section.title:
        yield f"<h2>{escape(section.title)}</h2>"
    if section.about:
        yield f'<p class="about">{escape(section.about)}</p>'
    if section.entries:
        yield from _table(section)
    for card in section.cards:
        yield from _card(card)
    yield "</section>"


def _table(section: Section) -> Iterator[str]:
    number = len(section.entries[0].answers)
    asked = "the answer below" if number == 1 else f"all {number} answers below together"
    headings = "".join(f'<th scope="col">{heading}</th>' for heading in HEADINGS)
    yield '<div class="scroll" tabindex="0" role="region" aria-label="Drafters side by side"><table>'
    yield f"<thead><tr>{headings}</tr></thead><tbody>"
    for entry in section.entries:
        first, *rest = (escape(cell) for cell in cells(entry))
        yield f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
    yield "</tbody></table></div>"
    yield f'<p class="about">For {asked}. Speedup is the time of "none" over the drafter\'s own, in one process.</p>'


def _card(card: Card) -> Iterator[str]:
    yield f"<article><h3>{escape(card.title)}</h3>"
    if card.images:
        yield '<div class="pictures">'
        for number, image in enumerate(card.images, 1):
            name = card.title if len(card.images) == 1 else f"{card.title}, picture {number}"
            yield f'<img src="{data_uri(image)}" alt="{escape(name)}" width="{image.width}" height="{image.height}">'
        if card.source:
            yield f'<p class="about">{escape(card.source)}</p>'
        yield "</div>"
    yield f'<dl><dt>Question</dt><dd class="question">{escape(card.question)}</dd>'
    yield f'<dt>Answer</dt><dd class="answer">{_text(card.answer)}</dd>'
    yield f'<dt class="hidden">Figures</dt><dd class="about">{escape(closing(card.answer))}</dd></dl>'
    yield "</article>"


def _text(answer: Answer) -> str:
    """Spans have no role: a screen reader reads the text through, undisturbed by the runs."""
    pieces = ((escape(run.text), run.drafted) for run in answer.runs)
    return "".join(f'<span class="kept">{text}</span>' if drafted else text for text, drafted in pieces)


def data_uri(image: Image) -> str:
    """The picture itself as a URI: as PNG or JPEG, whichever is smaller, at most `LONGEST_SIDE` pixels a side."""
    image = image.copy()
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Resampling.LANCZOS)
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded.append((kind, buffer.getvalue()))
    kind, data = min(encoded, key=lambda pair: len(pair[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# What a model says is escaped; should that ever fail, nothing of it may run or load.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

LEGEND = """<p class="about"><span class="kept">Drafted and kept</span>: the drafter guessed it, and the target wanted
the same. <b>Plain</b>: the target's own word at the end of a pass. Either way it is the target's choice.</p>"""

STYLE = """
:root { --paper: #fbfaf8; --ink: #22262b; --quiet: #5c636b; --line: #dedad3; --card: #fff;
  --kept: #dcefe1; --edge: #4f9a68; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181b; --ink: #e4e6e8; --quiet: #9ba3ab; --line: #31363c; --card: #1c2024;
    --kept: #1f3d2b; --edge: #5fae7c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .25rem; }
h3 { font-size: 1rem; margin: 0 0 .75rem; }
header p { max-width: 46rem; }
.about, dt { color: var(--quiet); font-size: .875rem; }
.about { margin: .5rem 0 0; }
.kept { background: var(--kept); color: var(--ink); border-bottom: 1px solid var(--edge); border-radius: .15rem;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
article { margin: 1.25rem 0; padding: 1.25rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
img { display: block; max-width: 100%; height: auto; margin-bottom: .75rem; border: 1px solid var(--line);
  border-radius: .25rem; background: #fff; }
dl, dd { margin: 0; }
.question { margin-bottom: 1rem; font-weight: 600; }
.answer { max-width: 46rem; line-height: 1.75; white-space: pre-wrap; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.scroll { overflow-x: auto; margin-top: 1rem; }
.scroll:focus-visible { outline: 2px solid var(--edge); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { color: var(--quiet); font-size: .8125rem; font-weight: 500; vertical-align: bottom; white-space: normal;
  overflow-wrap: normal; }
th:first-child { position: sticky; left: 0; background: var(--paper); text-align: left; padding-left: 0; }
@media (min-width: 52rem) {
  article:has(img) { display: grid; grid-template-columns: 18rem 1fr; column-gap: 1.5rem; }
  h3 { grid-column: 1 / -1; } }
@media (max-width: 30rem) { body { padding: 1.25rem .9rem 3rem; } article { padding: .9rem; } }
@media (forced-colors: active) { .kept { border-bottom: 2px solid; } }
@media print { article { break-inside: avoid; } .kept { print-color-adjust: exact; } }
"""
