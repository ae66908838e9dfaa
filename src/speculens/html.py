"""One look for all pages: a document that fetches nothing, light and dark, wide and narrow."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from PIL.Image import Resampling

from speculens.pictures import Image

LONGEST_SIDE = 1024  # pixels; larger pictures are scaled down for the page


def document(title: str, lead: str, main: Iterable[str], *, under_lead: str = "", style: str = "") -> str:
    """A whole page. `main` is markup; `under_lead` too, in the header; `style` comes after what all pages share."""
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
            f"<style>{STYLE}{style}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{escape(title)}</h1>",
            f"<p>{escape(lead)}</p>",
            under_lead,
            "</header>",
            "<main>",
            *main,
            "</main>",
            "</body>",
            "</html>",
            "",
        )
    )


def table(label: str, headings: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> Iterator[str]:
    """A table that scrolls by itself where it is wider than the page. The first cell of a row heads it.

    words  how many of the first columns hold words, which stand at the left; numbers stand at the right
    """
    marks = [' class="word"' if number < words else "" for number in range(len(headings))]
    heads = "".join(f'<th scope="col"{mark}>{escape(text)}</th>' for mark, text in zip(marks, headings, strict=True))
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
    yield f"<thead><tr>{heads}</tr></thead><tbody>"
    for row in rows:
        first, *rest = (escape(cell) for cell in row)
        cells = "".join(f"<td{mark}>{cell}</td>" for mark, cell in zip(marks[1:], rest, strict=True))
        yield f'<tr><th scope="row">{first}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def picture(image: Image, name: str) -> str:
    """A picture in the page itself."""
    return f'<img src="{data_uri(image)}" alt="{escape(name)}" width="{image.width}" height="{image.height}">'


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
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.scroll { overflow-x: auto; margin-top: 1rem; }
.scroll:focus-visible { outline: 2px solid var(--edge); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { color: var(--quiet); font-size: .8125rem; font-weight: 500; vertical-align: bottom; white-space: normal;
  overflow-wrap: normal; }
th.word, td.word { text-align: left; }
th:first-child { position: sticky; left: 0; background: var(--paper); text-align: left; padding-left: 0; }
@media (max-width: 30rem) { body { padding: 1.25rem .9rem 3rem; } article { padding: .9rem; } }
@media (forced-colors: active) { .kept { border-bottom: 2px solid; } }
@media print { article { break-inside: avoid; } .kept { print-color-adjust: exact; } }
"""
