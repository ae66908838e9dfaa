"""Draws a picture and writes a question and an exact answer about it.

    made = draw.sample(seed=0, index=7)
    made.image.show(); print(made.question, made.answer)

Seed 0 is for training, seed 1 is held out: the same distribution, other pictures.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from testbed import charts, grammar, paint, scenes
from testbed.charts import Chart, Size
from testbed.grammar import Facts
from testbed.scenes import Scene

SIZES: tuple[Size, ...] = ((256, 256), (512, 128), (320, 192), (192, 320), (288, 224))  # pixels, (width, height)
KINDS = ("bars", "hbars", "line", "grouped", "pie", "table", "scene")


@dataclass(frozen=True)
class Sample:
    """`image` is RGB; `facts` are the (label, value) pairs that `answer` states (see `grammar.reading`)."""

    image: Image.Image
    kind: str
    task: str
    question: str
    answer: str
    facts: Facts


@dataclass(frozen=True)
class _Plan:
    """A sample before it is painted."""

    content: Chart | Scene
    kind: str
    task: str
    question: str
    answer: str
    facts: Facts


def sample(seed: int, index: int, size: Size = (256, 256), kind: str | None = None) -> Sample:
    """The sample number `index` of `seed`: always the same one for the same arguments.

    `size` is (width, height) in pixels, one of `SIZES`; `kind` is one of `KINDS`, None for any.
    """
    rng = random.Random(f"{seed}/{index}/{size[0]}x{size[1]}/{kind}")
    plan = _plan(rng, size, kind)
    if isinstance(plan.content, Scene):
        image = scenes.paint(rng, plan.content, size)
    else:
        image = paint.paint(rng, plan.content, size)
    return Sample(image, plan.kind, plan.task, plan.question, plan.answer, plan.facts)


def text(seed: int, index: int, size: Size = (256, 256), kind: str | None = None) -> tuple[str, str]:
    """The question and the answer of `sample` with the same arguments, without painting the picture."""
    plan = _plan(random.Random(f"{seed}/{index}/{size[0]}x{size[1]}/{kind}"), size, kind)
    return plan.question, plan.answer


def _plan(rng: random.Random, size: Size, kind: str | None) -> _Plan:
    kind = kind or rng.choice(KINDS)
    content: Chart | Scene
    if kind == "scene":
        content = scenes.random_scene(rng, size)
        task = rng.choice(scenes.TASKS)
        style = rng.randrange(len(scenes.QUESTIONS[task]))
        question = rng.choice(scenes.QUESTIONS[task][style])
        answer, facts = scenes.answer(content, task, style)
    else:
        content = charts.random_chart(rng, kind, size)
        task = rng.choice(grammar.TASKS)
        style, column = rng.randrange(3), rng.randrange(max(1, len(content.series)))
        question = grammar.question(content, task, style, rng.randrange(2), column)
        answer, facts = grammar.answer(content, task, style, column)
    return _Plan(content, kind, task, question, answer, facts)
