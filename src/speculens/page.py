"""A generation as one HTML file: pictures, text with accepted runs coloured, figures. It fetches nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from speculens import html
from speculens.answer import Answer, Entry
from speculens.pictures import Image
from speculens.show import HEADINGS, cells, closing


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
    main = (line for section in sections for line in _section(section))
    return html.document(title, lead, main, under_lead=LEGEND, style=STYLE)


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
    yield from html.table("Drafters side by side", HEADINGS, map(cells, section.entries))
    yield f'<p class="about">For {asked}. Speedup is the time of "none" over the drafter\'s own, in one process.</p>'


def _card(card: Card) -> Iterator[str]:
    yield f"<article><h3>{escape(card.title)}</h3>"
    if card.images:
        yield '<div class="pictures">'
        for number, image in enumerate(card.images, 1):
            name = card.title if len(card.images) == 1 else f"{card.title}, picture {number}"
            yield html.picture(image, name)
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


LEGEND = """<p class="about"><span class="kept">Drafted and kept</span>: the drafter guessed it, and the target wanted
the same. <b>Plain</b>: the target's own word at the end of a pass. Either way it is the target's choice.</p>"""

STYLE = """
.question { margin-bottom: 1rem; font-weight: 600; }
.answer { max-width: 46rem; line-height: 1.75; white-space: pre-wrap; }
@media (min-width: 52rem) {
  article:has(img) { display: grid; grid-template-columns: 18rem 1fr; column-gap: 1.5rem; }
  h3 { grid-column: 1 / -1; } }
"""
