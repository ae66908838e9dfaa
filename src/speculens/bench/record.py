"""What is kept of a measurement: one question as everybody answered it, and the folder that a run fills.

setting.json    all that the figures depend on; a run is gone on with under the same setting only
records.jsonl   one line a case; it grows, and a kill costs the case that was under way and nothing else
closer.json     where the time goes, and one prompt step by step; a run may leave it out
summary.json    every figure
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from speculens.answer import Answer, Entry
from speculens.data.journal import Journal
from speculens.data.sources import JsonLines
from speculens.drafters import NoDrafter
from speculens.errors import UserError
from speculens.slot import Generation
from speculens.stats import Stats

NONE = NoDrafter.name


@dataclass(frozen=True)
class Record:
    """One question as everybody answered it.

    case, turn                    the conversation, and which of its questions (from 0)
    prompt_tokens, image_tokens   of the prompt, pictures included, and of the pictures alone
    answers                       by contender; the texts themselves without their runs
    gaps                          by contender whose tokens differ: between the target's two best choices where they do
    memory                        by contender: peak bytes on the device meanwhile; None where there is no device
    failures                      by contender without an answer: why
    """

    case: str
    topic: str
    turn: int
    prompt_tokens: int
    image_tokens: int
    answers: Mapping[str, Answer]
    gaps: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int | None] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """Plain JSON types."""
        answers = {name: _answer_row(answer) for name, answer in self.answers.items()}
        return {**vars(self), "answers": answers}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Record:
        return cls(**{**row, "answers": {name: _answer(values) for name, values in row["answers"].items()}})


def _answer_row(answer: Answer) -> dict[str, Any]:
    done = answer.generation
    return {
        "tokens": done.tokens,
        "text": done.text,
        "finish_reason": done.finish_reason,
        "seconds": answer.seconds,
        "time_to_first_token": answer.time_to_first_token,
        "stats": asdict(done.stats),
    }


def _answer(row: Mapping[str, Any]) -> Answer:
    done = Generation(row["tokens"], row["text"], row["finish_reason"], Stats(**row["stats"]))
    return Answer(done, (), row["seconds"], row["time_to_first_token"])


def entry(name: str, records: Sequence[Record]) -> Entry:
    """One contender's answers beside the target's own."""
    return Entry(name, [record.answers[name] for record in records], [record.answers[NONE] for record in records])


class RunFolder:
    """The files of one run. Raises UserError if the folder holds another run, or one not to be gone on with."""

    def __init__(self, path: Path, setting: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = path
        self._setting = json.loads(json.dumps(setting))
        if holds_run(path, resume=resume):
            self._check(self.read("setting"))
        else:
            self.write("setting", self._setting)

    def _check(self, before: Mapping[str, Any]) -> None:
        was, now = dict(_leaves(before)), dict(_leaves(self._setting))
        for key in sorted({*was, *now}):
            if was.get(key) != now.get(key):
                raise UserError(
                    f"The run in {self.path} was made with {key} {was.get(key)!r}, not {now.get(key)!r}: go on as it "
                    "was begun, or choose another folder."
                )

    def has(self, name: str) -> bool:
        """Whether one of the JSON files is written."""
        return (self.path / f"{name}.json").exists()

    def read(self, name: str) -> dict[str, Any]:
        """One of the JSON files."""
        return read_json(self.path / f"{name}.json")

    def journal(self) -> Journal:
        """The records, to be added to."""
        return Journal(self.path / "records.jsonl")

    def write(self, name: str, values: Mapping[str, Any]) -> Path:
        """A JSON file as a whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / f"{name}.json"
        fresh = file.with_suffix(".tmp")
        fresh.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        return fresh.replace(file)


def holds_run(path: Path, *, resume: bool) -> bool:
    """Whether a folder holds a run, to be gone on with. Raises UserError if it holds anything that is not meant."""
    if (path / "setting.json").exists():
        if not resume:
            raise UserError(f"{path} holds a run already: go on with it by --resume, or choose another folder.")
        return True
    if path.is_file() or (path.exists() and any(path.iterdir())):
        raise UserError(f"{path} holds something else than a run: choose another folder.")
    return False


def _leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value under its dotted name, so that a difference can be named."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def read_records(folder: Path) -> list[Record]:
    """All records of a run, case by case in the order of its suite."""
    rows = JsonLines([folder / "records.jsonl"])
    cases = sorted((rows.row(number) for number in range(len(rows))), key=lambda row: row["number"])
    return [Record.from_row(turn) for case in cases for turn in case["turns"]]


def read_closer(folder: Path) -> dict[str, Any]:
    """What the closer look at a run found; nothing if there was none."""
    file = folder / "closer.json"
    return read_json(file) if file.exists() else {"costs": {}, "walk": {"steps": {}}}


def read_json(file: Path) -> dict[str, Any]:
    """One of a run's files. Raises UserError if it is not there or broken."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file.parent} holds no finished run: {file.name} is missing; `speculens bench` writes it."
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} cannot be read: {reason}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is not what `speculens bench` writes.")
    return values
