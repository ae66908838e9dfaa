"""The main job on what the repository ships: small models, drafters, pictures that none of them has seen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from speculens.answer import Answer, Entry, ask, warm_up
from speculens.checkpoints import load_drafter
from speculens.conversation import Conversation
from speculens.drafters import METHODS, Drafter
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.page import Card, Section
from speculens.pictures import Source, load_image
from speculens.sampling import Sampling
from speculens.show import Screen, closing, count
from speculens.targets import Target, load_target

FAMILIES = ("llava", "qwen2_5_vl")
PICTURES = {"charts": 3, "openstax": 2}  # rows taken from each held-out file
LEAD = (
    "Small vision-language models describe pictures that they have not seen before. Every word is the model's own "
    "choice; the drafter only makes it come sooner."
)
NONE, LOOKUP, BASELINE = "none", "lookup", "eaglevlm"
SHOWN = ("hivis", BASELINE)  # whose answer streams: the first of these that is there


@dataclass(frozen=True)
class Case:
    """A held-out question. `source` says whose the picture is."""

    title: str
    question: str
    conversation: Conversation
    source: str


@dataclass(frozen=True)
class Outcome:
    """What one family's target answered: one trained drafter's answers as they were shown, and all drafters pooled."""

    family: str
    about: str
    cases: Sequence[Case]
    answers: Sequence[Answer]
    entries: Sequence[Entry]

    def section(self) -> Section:
        """For the page."""
        pairs = zip(self.cases, self.answers, strict=True)
        cards = [
            Card(case.title, case.conversation.images, case.question, answer, case.source) for case, answer in pairs
        ]
        return Section(self.family, self.about, cards, self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        pairs = zip(self.cases, self.answers, strict=True)
        return {
            "family": self.family,
            "drafters": [entry.to_dict() for entry in self.entries],
            "answers": [
                {"picture": case.title, "question": case.question, **answer.to_dict()} for case, answer in pairs
            ],
        }


def find_testbed(folder: Path | None, families: Sequence[str]) -> Path:
    """The testbed of this checkout, or the given one. Raises UserError if it lacks one of the models."""
    folder = folder or Path(__file__).resolve().parents[2] / "testbed"
    for family in families:
        if not (folder / "weights" / family).is_dir():
            raise UserError(
                f"The demo's {family} model is not in {folder / 'weights'}: run it in a checkout of the repository, "
                "or name the folder with --testbed."
            )
    return folder


def held_out(testbed: Path) -> list[Case]:
    """The first rows of each held-out file. Raises UserError if one is missing or broken."""
    return [
        case
        for name, number in PICTURES.items()
        for case in islice(_cases(testbed / "heldout" / f"{name}.jsonl"), number)
    ]


def _cases(file: Path) -> Sequence[Case]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UserError(f"The demo's pictures are not there: {file} is missing.") from None
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError:
        raise UserError(f"{file} is not a file of JSON lines.") from None
    return [_case(row, file.parent) for row in rows]


def _case(row: Mapping[str, Any], folder: Path) -> Case:
    names: list[str] = []

    def load(source: Source) -> Any:
        names.append(Path(str(source)).name)
        return load_image(source)

    whole = Conversation.from_row(row, folder, load)
    asked = Conversation(whole.messages[:1])  # the answer that may follow is the data's, not ours
    question = " ".join(part for part in asked.messages[0].content if isinstance(part, str))
    about = row.get("metadata", {})
    source = ", ".join(str(about[key]) for key in ("credit", "source", "license") if key in about)
    return Case(", ".join(names), question, asked, source)


def run(testbed: Path, family: str, max_new_tokens: int, screen: Screen) -> Outcome:
    """Describe the pictures with one family's target, with every drafter in turn."""
    folder = testbed / "weights" / family
    target = load_target(str(folder), device="cpu")
    trained = {name: f"{folder}-{name}" for name in METHODS if name == BASELINE or Path(f"{folder}-{name}").is_dir()}
    names = {NONE: NONE, LOOKUP: LOOKUP, **trained}
    shown = next(name for name in SHOWN if name in trained)
    drafters = {name: load_drafter(path, dtype=target.dtype, device=target.device) for name, path in names.items()}
    parameters = sum(weight.numel() for weight in target.model.parameters())
    about = f"{target.num_layers} layers, {target.hidden_size} wide, {count(parameters)} parameters"
    screen.say(f"\n{family}: {about}", "bold")
    cases = held_out(testbed)
    rounds = _rounds(target, drafters, shown, cases, Sampling(max_new_tokens=max_new_tokens), screen)
    entries = [
        Entry(name, [answers[name] for answers in rounds], [answers[NONE] for answers in rounds]) for name in names
    ]
    screen.table(entries)
    return Outcome(family, about, cases, [answers[shown] for answers in rounds], entries)


def _rounds(
    target: Target,
    drafters: Mapping[str, Drafter],
    shown: str,
    cases: Sequence[Case],
    sampling: Sampling,
    screen: Screen,
) -> list[dict[str, Answer]]:
    """Every drafter's answer to every case. The order turns round from case to case, so that none is always first."""
    prompts = [target.encode(case.conversation) for case in cases]
    capacity = max(map(len, prompts)) + sampling.max_new_tokens
    engines = {name: Engine(target, drafter, capacity=capacity) for name, drafter in drafters.items()}
    warm_up(engines.values(), prompts[0], sampling)
    rounds = []
    for number, (case, prompt) in enumerate(zip(cases, prompts, strict=True)):
        screen.say(f"\n[{number + 1}/{len(cases)}] {case.title}", "bold")
        screen.say(case.question)
        order = list(engines) if number % 2 else list(reversed(engines))
        answers = {name: ask(engines[name], prompt, sampling, screen.run if name == shown else None) for name in order}
        screen.say()
        screen.say(closing(answers[shown]), "dim")
        rounds.append(answers)
    return rounds
