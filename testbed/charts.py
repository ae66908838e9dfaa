"""What a chart shows: labels, values, colours and title, chosen so that they fit the picture."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

from PIL import ImageFont

from testbed import words

Size = tuple[int, int]  # pixels, (width, height)


@dataclass(frozen=True)
class Chart:
    """`values[i][j]` is what label i has in series j; only "grouped" and "table" have series, and names for them.

    `colours` holds one name for all marks, or one per label (`varied`), or one per series ("grouped").
    """

    kind: str
    title: str
    noun: str
    ordered: bool
    background: str
    labels: tuple[str, ...]
    series: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    colours: tuple[str, ...]

    @property
    def varied(self) -> bool:
        """Whether each label has a colour of its own."""
        return self.kind != "grouped" and len(self.colours) == len(self.labels)

    def column(self, j: int = 0) -> list[int]:
        """The values of series j, in the order of the labels."""
        return [row[j] for row in self.values]


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """PIL's own font, without the slower complex text layout."""
    made = cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))  # with a size it is never the bitmap font
    return made.font_variant(layout_engine=ImageFont.Layout.BASIC)


@cache
def width(text: str, size: int) -> int:
    """Width of `text` in pixels."""
    return round(font(size).getlength(text))


TITLE, LABEL, VALUE = 15, 14, 16  # font sizes, pixels; a digit of VALUE is 11 pixels high


def random_chart(rng: random.Random, kind: str, size: Size) -> Chart:
    """A chart of `kind` whose words fit a picture of `size`."""
    count, room, series = _shape(rng, kind, size)
    theme = rng.choice([theme for theme in words.THEMES if len(_fitting(theme, room)) >= count])
    labels = _labels(rng, theme, count, room)
    values = _percents(rng, count) if kind == "pie" else _values(rng, count, max(1, len(series)), kind == "grouped")
    background = rng.choice(tuple(words.BACKGROUNDS))
    return Chart(
        kind=kind,
        title=_title(rng, theme, size[0] - 16),
        noun=theme.noun,
        ordered=theme.ordered,
        background=background,
        labels=labels,
        series=series,
        values=values,
        colours=_colours(rng, kind, count, background),
    )


def _shape(rng: random.Random, kind: str, size: Size) -> tuple[int, int, tuple[str, ...]]:
    """(number of labels, pixels for each, series names) for a chart of `kind`."""
    w, h = size
    if kind == "table":
        columns = rng.randint(2, 3) if w >= 240 else 2
        most = min(6, (h - 28) // 22 - 1)
        rows = max(rng.randint(3, most), rng.randint(3, most))
        return rows, (w - 16) // (columns + 1) - 8, tuple(rng.sample(words.COLUMNS, columns))
    if kind == "grouped":
        count = rng.choice((3, 4, 4)) if w >= 240 else 3
        return count, (w - 16) // count - 4, rng.choice(words.PAIRS)
    if kind == "hbars":
        return _count(rng, min(7, (h - 28) // 19)), w // 3, ()
    if kind == "pie":
        rows = 7 if h > w else min(6, (h - 28) // 19)
        return _count(rng, rows), w // 4, ()
    count = _count(rng, 5 if w < 240 else 7)
    return count, (w - 16) // count - 2, ()


def _count(rng: random.Random, most: int) -> int:
    """From 4 to `most` (at least 4), seldom 4."""
    return rng.choices(range(4, most + 1), [1, 2, 2, 2][: most - 3])[0]


@cache
def _fitting(theme: words.Theme, room: int) -> tuple[str, ...]:
    return tuple(label for label in theme.labels if width(label, LABEL) <= room)


def _labels(rng: random.Random, theme: words.Theme, count: int, room: int) -> tuple[str, ...]:
    fitting = _fitting(theme, room)
    if not theme.ordered:
        return tuple(rng.sample(fitting, count))
    start = rng.randrange(len(fitting))
    return tuple(fitting[(start + i) % len(fitting)] for i in range(count))


def _title(rng: random.Random, theme: words.Theme, room: int) -> str:
    measure = rng.choice(theme.measures)
    year = rng.randint(1980, 2029)
    forms = [f"{measure} by {theme.noun}, {year}", f"{measure} by {theme.noun}", f"{measure} in {year}", measure]
    return rng.choice([form for form in forms if width(form, TITLE) <= room])


def _values(rng: random.Random, count: int, series: int, shared: bool) -> tuple[tuple[int, ...], ...]:
    """Distinct values in each series; with `shared`, two-digit ones, distinct in the whole chart."""
    if shared:
        flat = rng.sample(range(10, 100), count * series)
        return tuple(tuple(flat[i * series : (i + 1) * series]) for i in range(count))
    return tuple(zip(*(_series(rng, count) for _ in range(series)), strict=True))


def _series(rng: random.Random, count: int) -> list[int]:
    low, high = rng.choices(((10, 99), (1, 9), (100, 999)), (8, 1, 1))[0]
    values = rng.sample(range(low, high + 1), count)
    order = rng.random()
    return sorted(values, reverse=order < 0.07) if order < 0.14 else values


def _percents(rng: random.Random, count: int) -> tuple[tuple[int, ...], ...]:
    """Distinct shares of at least 3 that add up to 100."""
    while True:
        cuts = sorted(rng.sample(range(1, 100), count - 1))
        shares = [high - low for low, high in zip([0, *cuts], [*cuts, 100], strict=True)]
        if min(shares) >= 3 and len(set(shares)) == count:
            return tuple((share,) for share in shares)


def _colours(rng: random.Random, kind: str, count: int, background: str) -> tuple[str, ...]:
    usable = [name for name in words.COLOURS if not (background in words.DARK and name == "brown")]
    if kind == "grouped":
        return tuple(rng.sample(usable, 2))
    if kind == "pie" or (kind in ("bars", "hbars") and rng.random() < 0.6):
        return tuple(rng.sample(usable, count))
    return (rng.choice(usable),)


def between(values: Sequence[int]) -> int:
    """The round number near the middle of the values' range of magnitudes: 5, 50 or 500."""
    return 5 * 10 ** (len(str(max(values))) - 1)
