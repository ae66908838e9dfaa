"""Scenes: coloured shapes of three sizes in the cells of a grid, with questions and answers about them."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from testbed import words
from testbed.charts import VALUE, Size
from testbed.grammar import Facts
from testbed.paint import Canvas
from testbed.words import counted, listed

TASKS = ("describe", "count", "list")
QUESTIONS = {
    "describe": (
        ("Describe this picture row by row.", "What shapes are in each row?"),
        ("Describe this picture column by column.", "What shapes are in each column?"),
    ),
    "count": (
        ("Count the shapes of each colour, step by step.", "How many shapes of each colour are there?"),
        ("Count each kind of shape, step by step.", "How many circles, squares and other shapes are there?"),
        ("Count the shapes of each size, step by step.", "How many large, medium and small shapes are there?"),
    ),
    "list": (
        ("List every shape with its place.", "Make a list of the shapes, row by row."),
        ("List the shapes from large to small.", "Make a list of the shapes by size, the largest first."),
    ),
}
_ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom"), 4: ("top", "second", "third", "bottom")}
_COLUMNS = {
    3: ("left", "centre", "right"),
    4: ("outer left", "inner left", "inner right", "outer right"),
    5: ("outer left", "inner left", "centre", "inner right", "outer right"),
}
_RADII = {"small": 0.19, "medium": 0.31, "large": 0.44}  # of the shorter side of a cell


@dataclass(frozen=True)
class Thing:
    """A shape in a cell; `mark` is the digit or letter on it, or empty."""

    row: int
    column: int
    size: str
    colour: str
    shape: str
    mark: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape} {self.mark}".rstrip()


@dataclass(frozen=True)
class Scene:
    """`things` in reading order; the grid has `rows` x `columns` cells."""

    rows: int
    columns: int
    background: str
    things: tuple[Thing, ...]

    def row(self, thing: Thing) -> str:
        """The name of the row that `thing` is in."""
        return _ROWS[self.rows][thing.row]

    def column(self, thing: Thing) -> str:
        """The name of the column that `thing` is in."""
        return _COLUMNS[self.columns][thing.column]

    def place(self, thing: Thing) -> str:
        """`top left`."""
        return f"{self.row(thing)} {self.column(thing)}"


def random_scene(rng: random.Random, size: Size) -> Scene:
    """A scene with at least two thirds of its cells filled, but not all."""
    columns, rows = _grid(rng, size)
    background = rng.choice(tuple(words.BACKGROUNDS))
    colours = [name for name in words.COLOURS if not (background in words.DARK and name == "brown")]
    palette = rng.sample(colours, rng.randint(3, 6))
    cells = rows * columns
    filled = sorted(rng.sample(range(cells), rng.randint(cells * 2 // 3, cells - 1)))
    things = tuple(_thing(rng, *divmod(cell, columns), palette) for cell in filled)
    return Scene(rows, columns, background, things)


def _grid(rng: random.Random, size: Size) -> tuple[int, int]:
    """(columns, rows) with cells at least 48 pixels wide and high."""
    ratio = size[0] / size[1]
    if ratio > 2.5:
        return 5, 2
    if ratio < 0.8:
        return 3, 4
    return (4, 3) if ratio > 1.2 or rng.random() < 0.7 else (3, 3)


def _thing(rng: random.Random, row: int, column: int, palette: list[str]) -> Thing:
    size = rng.choice(words.SIZES)
    mark = rng.choice(words.MARKS) if size != "small" and rng.random() < 0.6 else ""
    return Thing(row, column, size, rng.choice(palette), rng.choice(words.SHAPES), mark)


# Painting


def paint(rng: random.Random, scene: Scene, size: Size) -> Image.Image:
    """An RGB picture of exactly `size`."""
    canvas = Canvas(rng, size, scene.background)
    wide, high = size[0] / scene.columns, size[1] / scene.rows
    if rng.random() < 0.5:
        for i in range(1, scene.columns):
            canvas.pen.line((round(i * wide), 0, round(i * wide), size[1]), canvas.faint)
        for i in range(1, scene.rows):
            canvas.pen.line((0, round(i * high), size[0], round(i * high)), canvas.faint)
    for thing in scene.things:
        radius = _RADII[thing.size] * min(wide, high) * rng.uniform(0.94, 1.06)
        slack_x, slack_y = (max(0.0, side / 2 - radius - 2) * 0.5 for side in (wide, high))
        x = (thing.column + 0.5) * wide + rng.uniform(-slack_x, slack_x)
        y = (thing.row + 0.5) * high + rng.uniform(-slack_y, slack_y)
        _paint_thing(canvas, thing, x, y, radius)
    return canvas.image


def _paint_thing(canvas: Canvas, thing: Thing, x: float, y: float, radius: float) -> None:
    shade = canvas.colour(thing.colour)
    if thing.shape == "circle":
        canvas.pen.ellipse((x - radius, y - radius, x + radius, y + radius), shade)
    elif thing.shape == "square":
        side = radius * 0.86
        canvas.pen.rectangle((x - side, y - side, x + side, y + side), shade)
    else:
        canvas.pen.polygon([(x + radius * a, y + radius * b) for a, b in _OUTLINES[thing.shape]], shade)
    if thing.mark:
        drop = radius * 0.22 if thing.shape == "triangle" else 0
        canvas.text(x, y + drop, thing.mark, VALUE, ink=words.ink(shade))


def _turn(points: int, inner: float) -> list[tuple[float, float]]:
    """Corners of a star around (0, 0), the first one up; every other corner at the distance `inner`."""
    distances = [1.0, inner] * points
    step = math.pi / points
    return [(d * math.sin(i * step), -d * math.cos(i * step)) for i, d in enumerate(distances)]


_OUTLINES = {
    "triangle": [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)],
    "diamond": [(0.0, -1.0), (0.8, 0.0), (0.0, 1.0), (-0.8, 0.0)],
    "star": _turn(5, 0.5),
}


# Words


def answer(scene: Scene, task: str, style: int) -> tuple[str, Facts]:
    """The exact answer and the facts it states; the style is the one of the question."""
    return {"describe": _describe, "count": _count, "list": _list}[task](scene, style)


def _describe(scene: Scene, style: int) -> tuple[str, Facts]:
    outer, inner = _ROWS[scene.rows], _COLUMNS[scene.columns]
    if style == 1:
        outer, inner = inner, outer
    at = {((t.column, t.row) if style == 1 else (t.row, t.column)): t for t in scene.things}
    lines, facts = [], []
    for i, line in enumerate(outer):
        name = f"{line.capitalize()} {('row', 'column')[style]}"
        cells = [f"{place} {at.get((i, j), 'empty')}" for j, place in enumerate(inner)]
        lines.append(f"{name}: {'; '.join(cells)}.")
        facts += [(f"{name}|{place}", str(at[i, j])) for j, place in enumerate(inner) if (i, j) in at]
    head = f"{counted(len(scene.things), 'shape').capitalize()} on a {scene.background} background."
    colour = f"Most common colour: {_most(scene, lambda t: t.colour)}."
    shape = f"Most common shape: {_most(scene, lambda t: t.shape)}."
    return "\n".join([head, *lines, f"{colour} {shape} {_marks(scene)}"]), tuple(facts)


def _marks(scene: Scene) -> str:
    """The digits and letters, in reading order."""
    marks = [thing.mark for thing in scene.things if thing.mark]
    return f"Marks: {', '.join(marks)}." if marks else "No shape has a mark."


def _most(scene: Scene, key: Callable[[Thing], str]) -> str:
    """The most frequent values of `key`, in reading order, with their number."""
    counts = Counter(map(key, scene.things))
    top = max(counts.values())
    return f"{listed([name for name, count in counts.items() if count == top])} ({top})"


def _count(scene: Scene, style: int) -> tuple[str, Facts]:
    groups: dict[str, list[str]] = {}
    for thing in scene.things:
        name = (thing.colour, f"{thing.shape}s", thing.size)[style].capitalize()
        what = (
            f"{thing.size} {thing.shape}",
            f"{thing.size} {thing.colour}",
            f"{thing.colour} {thing.shape}",
        )[style]
        groups.setdefault(name, []).append(f"{what} {scene.place(thing)}")
    lines = [f"{name}: {', '.join(items)}; so {len(items)}." for name, items in groups.items()]
    numbers = [len(items) for items in groups.values()]
    top = [name.lower() for name, items in groups.items() if len(items) == max(numbers)]
    total = (
        f"Together {' + '.join(map(str, numbers))} = {len(scene.things)} shapes. Most: {listed(top)}. {_marks(scene)}"
    )
    return "\n".join([*lines, total]), tuple((name, str(len(items))) for name, items in groups.items())


def _list(scene: Scene, style: int) -> tuple[str, Facts]:
    things = scene.things
    if style == 1:
        things = tuple(sorted(things, key=lambda thing: -words.SIZES.index(thing.size)))
    lines = [f"- {scene.place(thing)}: {thing}" for thing in things]
    colours = Counter(thing.colour for thing in things)
    last = f"Colours: {listed([f'{count} {name}' for name, count in colours.items()])}. {_marks(scene)}"
    facts = tuple((scene.place(thing), str(thing)) for thing in things)
    return "\n".join([*lines, f"{counted(len(things), 'shape').capitalize()}. {last}"]), facts
