"""Paints a chart: every value is printed beside its mark, in digits at least 10 pixels high."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from testbed import words
from testbed.charts import LABEL, TITLE, VALUE, Chart, Size, font, width

Box = tuple[int, int, int, int]  # pixels: left, top, right, bottom


class Canvas:
    """A picture being painted, with its background, its ink and small random deviations of colour."""

    def __init__(self, rng: random.Random, size: Size, background: str) -> None:
        self.rng = rng
        self.size = size
        self.paper = words.BACKGROUNDS[background]
        self.dark = background in words.DARK
        self.ink = (240, 240, 240) if self.dark else (20, 20, 20)
        self.faint = (70, 75, 100) if self.dark else (190, 190, 190)
        self.image = Image.new("RGB", size, self.paper)
        self.pen = ImageDraw.Draw(self.image)

    def colour(self, name: str) -> words.RGB:
        """The named colour, lighter or darker by up to 12."""
        shift = self.rng.randint(-12, 12)
        red, green, blue = (min(255, max(0, part + shift)) for part in words.COLOURS[name])
        return red, green, blue

    def text(self, x: float, y: float, text: str, size: int, anchor: str = "mm", ink: words.RGB | None = None) -> None:
        """Writes `text` at (x, y), which `anchor` says how to take (as PIL's text anchors)."""
        self.pen.text((round(x), round(y)), text, ink or self.ink, font(size), anchor)

    def title(self, text: str) -> int:
        """Writes the title at the top, in the middle or on the left; returns the first free y below it."""
        y = self.rng.randint(11, 14)
        if self.rng.random() < 0.5:
            self.text(self.size[0] / 2, y, text, TITLE)
        else:
            self.text(8, y, text, TITLE, "lm")
        return y + 12


def paint(rng: random.Random, chart: Chart, size: Size) -> Image.Image:
    """An RGB picture of exactly `size`."""
    canvas = Canvas(rng, size, chart.background)
    top = canvas.title(chart.title)
    margin = rng.randint(5, 10)
    box = (margin, top, size[0] - margin, size[1] - rng.randint(3, 7))
    _PAINTERS[chart.kind](canvas, chart, box)
    return canvas.image


def _baseline(canvas: Canvas, chart: Chart, box: Box) -> tuple[int, float]:
    """Writes the labels below a base line; returns its y and the width of a label's slot."""
    left, _, right, bottom = box
    base, slot = bottom - 18, (right - left) / len(chart.labels)
    for i, label in enumerate(chart.labels):
        canvas.text(left + (i + 0.5) * slot, base + 10, label, LABEL)
    canvas.pen.line((left, base, right, base), canvas.faint, 1)
    return base, slot


def _bars(canvas: Canvas, chart: Chart, box: Box) -> None:
    base, slot = _baseline(canvas, chart, box)
    colours = _shades(canvas, chart)
    scale = (base - box[1] - 20) / max(chart.column())
    half = slot * canvas.rng.uniform(0.28, 0.44)
    for i, value in enumerate(chart.column()):
        x, y = box[0] + (i + 0.5) * slot, base - max(2, value * scale)
        canvas.pen.rectangle((round(x - half), round(y), round(x + half), base), colours[i])
        canvas.text(x, y - 9, str(value), VALUE)


def _shades(canvas: Canvas, chart: Chart) -> list[words.RGB]:
    """One colour per label."""
    shades = [canvas.colour(name) for name in chart.colours]
    return shades if chart.varied else shades * len(chart.labels)


def _grouped(canvas: Canvas, chart: Chart, box: Box) -> None:
    x, y = box[0], box[1] + 8
    shades = [canvas.colour(name) for name in chart.colours]
    for name, shade in zip(chart.series, shades, strict=True):
        canvas.pen.rectangle((x, y - 5, x + 10, y + 5), shade)
        canvas.text(x + 15, y, name, LABEL, "lm")
        x += 30 + width(name, LABEL)
    base, slot = _baseline(canvas, chart, box)
    scale = (base - y - 28) / max(max(row) for row in chart.values)
    bar = slot * canvas.rng.uniform(0.38, 0.45)
    for i, row in enumerate(chart.values):
        for j, value in enumerate(row):
            start = box[0] + (i + 0.5) * slot + (j - 1) * bar
            top = base - max(2, value * scale)
            canvas.pen.rectangle((round(start), round(top), round(start + bar) - 2, base), shades[j])
            canvas.text(start + bar / 2 - 1, top - 9, str(value), VALUE)


def _hbars(canvas: Canvas, chart: Chart, box: Box) -> None:
    left, top, right, bottom = box
    start = left + 6 + max(width(label, LABEL) for label in chart.labels)
    slot = (bottom - top) / len(chart.labels)
    scale = (right - start - 6 - width(str(max(chart.column())), VALUE)) / max(chart.column())
    half = slot * canvas.rng.uniform(0.26, 0.42)
    for i, (label, value, shade) in enumerate(zip(chart.labels, chart.column(), _shades(canvas, chart), strict=True)):
        y, end = top + (i + 0.5) * slot, start + max(2, value * scale)
        canvas.text(start - 5, y, label, LABEL, "rm")
        canvas.pen.rectangle((start, round(y - half), round(end), round(y + half)), shade)
        canvas.text(end + 4, y, str(value), VALUE, "lm")
    canvas.pen.line((start, top, start, bottom), canvas.faint, 1)


def _line(canvas: Canvas, chart: Chart, box: Box) -> None:
    base, slot = _baseline(canvas, chart, box)
    values = chart.column()
    low, span = min(values), max(values) - min(values)
    top, bottom = box[1] + 24, base - 22
    points = [
        (round(box[0] + (i + 0.5) * slot), round(bottom - (bottom - top) * (value - low) / span))
        for i, value in enumerate(values)
    ]
    shade = canvas.colour(chart.colours[0])
    canvas.pen.line(points, shade, canvas.rng.randint(2, 3), "curve")
    radius, round_marks = canvas.rng.randint(3, 5), canvas.rng.random() < 0.7
    for i, (x, y) in enumerate(points):
        mark = (x - radius, y - radius, x + radius, y + radius)
        canvas.pen.ellipse(mark, shade) if round_marks else canvas.pen.rectangle(mark, shade)
        neighbours = [points[k][1] for k in (i - 1, i + 1) if 0 <= k < len(points)]
        below = y > max(neighbours) or (y > min(neighbours) and y - min(neighbours) > max(neighbours) - y)
        _haloed(canvas, x, y + (radius + 9 if below else -radius - 9), str(values[i]))


def _haloed(canvas: Canvas, x: int, y: int, text: str) -> None:
    """Text on a patch of background, so that a line behind it does not cross the digits."""
    half = width(text, VALUE) // 2 + 1
    canvas.pen.rectangle((x - half, y - 7, x + half, y + 7), canvas.paper)
    canvas.text(x, y, text, VALUE)


def _pie(canvas: Canvas, chart: Chart, box: Box) -> None:
    left, top, right, bottom = box
    tall = bottom - top > right - left
    rows = len(chart.labels)
    names = max(width(label, LABEL) for label in chart.labels)
    legend = 16 + names + 8 + width("99%", VALUE)
    diameter = min(bottom - top - 21 * rows, right - left) if tall else min(bottom - top, right - left - legend - 12)
    x = (left + right - diameter) // 2 if tall else left
    y = top if tall else (top + bottom - diameter) // 2
    shades = _shades(canvas, chart)
    _slices(canvas, (x, y, x + diameter, y + diameter), chart.column(), shades)
    start = (left + right - legend) // 2 if tall else max(x + diameter + 12, right - legend - canvas.rng.randint(0, 60))
    first = y + diameter + 6 if tall else top
    row = (bottom - first) / rows
    for i, (label, value) in enumerate(zip(chart.labels, chart.column(), strict=True)):
        middle = first + (i + 0.5) * row
        canvas.pen.rectangle((start, middle - 5, start + 10, middle + 5), shades[i])
        canvas.text(start + 16, middle, label, LABEL, "lm")
        canvas.text(start + legend, middle, f"{value}%", VALUE, "rm")


def _slices(canvas: Canvas, box: Box, shares: list[int], shades: list[words.RGB]) -> None:
    angle = -90.0
    for share, shade in zip(shares, shades, strict=True):
        canvas.pen.pieslice(box, angle, angle + 3.6 * share, shade, canvas.paper)
        angle += 3.6 * share
    if canvas.rng.random() < 0.5:
        hole = round((box[2] - box[0]) * 0.25)
        canvas.pen.ellipse((box[0] + hole, box[1] + hole, box[2] - hole, box[3] - hole), canvas.paper)


def _table(canvas: Canvas, chart: Chart, box: Box) -> None:
    left, top, right, bottom = box
    rows = [(chart.noun.capitalize(), *chart.series)]
    rows += [(label, *map(str, row)) for label, row in zip(chart.labels, chart.values, strict=True)]
    wide, high = (right - left) / len(rows[0]), min(canvas.rng.uniform(30, 46), (bottom - top) / len(rows))
    shade = canvas.colour(chart.colours[0])
    canvas.pen.rectangle((left, top, right, round(top + high)), shade)
    for i, row in enumerate(rows):
        y = top + (i + 0.5) * high
        for j, cell in enumerate(row):
            ink = words.ink(shade) if i == 0 else None
            canvas.text(left + (j + 0.5) * wide, y, cell, VALUE if i and j else LABEL, ink=ink)
    for i in range(len(rows) + 1):
        canvas.pen.line((left, round(top + i * high), right, round(top + i * high)), canvas.faint)
    for j in range(len(rows[0]) + 1):
        x = round(left + j * wide)
        canvas.pen.line((x, top, x, round(top + len(rows) * high)), canvas.faint)


_PAINTERS = {
    "bars": _bars,
    "hbars": _hbars,
    "line": _line,
    "grouped": _grouped,
    "pie": _pie,
    "table": _table,
}
