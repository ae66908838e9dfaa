"""Suites of questions: what `suites.yaml` says of each, read from the files that people really have.

A suite is a list of rows in the data format (docs/data.md), so everything below is about finding and wording them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from speculens.conversation import Conversation
from speculens.data.rows import Names
from speculens.data.sources import JsonLines
from speculens.errors import UserError

_FIELD = re.compile(r"\{(\w+)(?:\|(\w+))?\}")


@dataclass(frozen=True)
class Case:
    """A conversation of a suite. Its pictures are opened when it is asked for.

    name   one of its own within the suite
    topic  under which its figures are pooled
    row    in any form that `Conversation.from_row` knows; the user's messages are asked, answers are not read
    root   where relative picture paths start
    given  messages at the beginning of the row that stand as they are: a system message, solved examples
    """

    name: str
    topic: str
    row: Mapping[str, Any]
    root: Path
    given: int = 0

    def conversation(self) -> Conversation:
        """Raises UserError for a row or a picture that cannot be used."""
        return Conversation.from_row(self.row, self.root)

    def after(self, examples: Sequence[Case]) -> Case:
        """The same questions behind solved ones, whose rows hold their answers."""
        before = [message for example in examples for message in example.row["messages"]]
        return self._behind(before)

    def under(self, system: str) -> Case:
        """The same questions under a system message."""
        return self._behind([{"role": "system", "content": system}])

    def _behind(self, messages: Sequence[Mapping[str, Any]]) -> Case:
        row = {**self.row, "messages": [*messages, *self.row["messages"]]}
        return replace(self, row=row, given=self.given + len(messages))


@cache
def suites() -> dict[str, Mapping[str, Any]]:
    """What the package knows of each suite, by name."""
    text = resources.files(__package__).joinpath("suites.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def load_suite(name: str, data: Sequence[Path] = (), image_root: Path | None = None) -> list[Case]:
    """The cases of a suite, in its order.

    data  its folder, or the files themselves where the suite is of the data format; `testbed` finds its own
    Raises UserError if there is no such suite, or, in one sentence, if its data set must be fetched first.
    """
    about = suites().get(name)
    if about is None:
        raise UserError(f"There is no suite {name!r}: known are {', '.join(suites())}.")
    if name == "testbed" and not data:
        data = [Path(__file__).resolve().parents[3] / "testbed" / "heldout"]
    if "rows" not in about:
        return from_files(_files(name, about, data), image_root)
    if len(data) != 1:
        raise _missing(name, about, "")
    cases = _chosen(name, about, data[0], image_root)
    return [case.under(about["system"]) for case in cases] if "system" in about else cases


def from_files(files: Sequence[Path], image_root: Path | None = None) -> list[Case]:
    """The rows of files in the data format, taken from the files in turn; the topic is the row's own, or the file's."""
    sources = [JsonLines([file], image_root) for file in files]
    names, cases = Names(), []
    for index in range(max(map(len, sources), default=0)):
        for file, source in zip(files, sources, strict=True):
            if index < len(source):
                row = source.row(index)
                if not isinstance(row, Mapping):
                    raise UserError(f"Row {index + 1} of {file} is no object.")
                topic = row.get("topic") or row.get("category") or file.stem
                cases.append(Case(str(names.name(row, index)), str(topic), row, source.root(index)))
    return cases


def _files(name: str, about: Mapping[str, Any], data: Sequence[Path]) -> list[Path]:
    """The given files, or a suite's own in the given folders."""
    files = [
        file
        for place in data
        for file in ([place / own for own in about["files"]] if place.is_dir() or about["files"] else [place])
    ]
    for file in files:
        if not file.is_file():
            raise _missing(name, about, f" ({file} is not there)")
    if not files:
        raise _missing(name, about, "")
    return files


def _missing(name: str, about: Mapping[str, Any], what: str) -> UserError:
    return UserError(f"The data of the suite {name} is missing{what}; --data is, or holds: {about['fetch']}.")


# ---- rows of a published layout -------------------------------------------------------------------------------------


def _chosen(name: str, about: Mapping[str, Any], folder: Path, image_root: Path | None) -> list[Case]:
    """The sample of a suite's rows, or all of them, behind the solved examples."""
    cases = _cases(name, about, folder, image_root)
    if "sample" not in about:
        return cases
    draw = _drawing(about["sample"])
    cases = draw(cases, about["sample"]["count"])
    if "shots" not in about:
        return cases
    shots = about["shots"]  # drawn behind the sample by the same generator, as the paper's code does
    examples = draw(_cases(name, {**about, **shots}, folder, image_root), shots["count"])
    return [case.after(examples) for case in cases]


def _cases(name: str, about: Mapping[str, Any], folder: Path, image_root: Path | None) -> list[Case]:
    file = folder / about["rows"]
    if not file.is_file():
        raise _missing(name, about, f" ({file} is not there)")
    names, cases = Names(), []
    seen: set[Any] = set()
    for place, row in enumerate(_rows(name, about, folder)):
        line = f"Row {place + 1} of {file}"
        if not isinstance(row, Mapping):
            raise _unfit(name, f"{line} is no object")
        try:
            if not _wanted(about, row, seen):
                continue
            said = {key: fill(about[key], row) for key in ("id", "image", "topic")}
            messages = _messages(about, said["image"], row)
        except KeyError as error:
            raise _unfit(name, f"{line} has no {error}") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise _unfit(name, f"{line} has a field of another kind ({error})") from None
        own = str(names.name({"id": said["id"]}, place))
        question = {"id": own, "messages": messages}
        cases.append(Case(own, said["topic"], question, image_root or folder))
    return cases


def _wanted(about: Mapping[str, Any], row: Mapping[str, Any], seen: set[Any]) -> bool:
    """Whether a row has the values that the suite is of; and a new one, where a value may come once."""
    fits = all(_fits(row.get(field), wanted) for field, wanted in about.get("only", {}).items())
    if not fits or "once" not in about:
        return fits
    value = row.get(about["once"])
    new = value not in seen
    seen.add(value)
    return new


def _unfit(name: str, why: str) -> UserError:
    return UserError(f"{why}, so it is not the file that {name} needs.")


def _messages(about: Mapping[str, Any], image: str, row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A question with its picture, and its answer if it is a solved one."""
    parts = [about["prompt"]] if isinstance(about["prompt"], str) else about["prompt"]
    texts = [{"type": "text", "text": _text(about, part, row)} for part in parts]
    picture = {"type": "image", "path": image}
    content = [*texts, picture] if about["picture"] == "after" else [picture, *texts]
    answer = [{"role": "assistant", "content": _text(about, about["answer"], row)}] if "answer" in about else []
    return [{"role": "user", "content": content}, *answer]


def _text(about: Mapping[str, Any], template: str, row: Mapping[str, Any]) -> str:
    text = fill(template, row)
    return text.replace("  ", " ") if about.get("spaces") == "single" else text


def _rows(name: str, about: Mapping[str, Any], folder: Path) -> Iterator[Any]:
    """Rows of JSON lines, of an array, or of an object whose keys name them."""
    file = folder / about["rows"]
    if file.suffix == ".jsonl":
        source = JsonLines([file])
        yield from (source.row(number) for number in range(len(source)))
        return
    found = _json(file)
    found = _at(name, found, about["at"], file) if "at" in about else found
    if isinstance(found, Mapping):
        order: Any = list(found)
        if "order" in about:
            other = folder / about["order"]["file"]
            if not other.is_file():
                raise _missing(name, about, f" ({other} is not there)")
            order = _list(name, _at(name, _json(other), about["order"]["key"], other), other)
        found = [(key, _at(name, found, key, file)) for key in order]
        found = [{"key": key, **row} if isinstance(row, Mapping) else row for key, row in found]
    yield from _list(name, found, file)


def _at(name: str, found: Any, key: Any, file: Path) -> Any:
    try:
        return found[key]
    except (LookupError, TypeError):
        raise _unfit(name, f"{file} has no {key!r}") from None


def _list(name: str, found: Any, file: Path) -> list[Any]:
    if not isinstance(found, list):
        raise _unfit(name, f"{file} holds no list")
    return found


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}.") from None


def _fits(value: Any, wanted: str) -> bool:
    """Equal; or anything but null for `*`; or with the beginning that stands before a `*`."""
    if wanted.endswith("*"):
        return value is not None and str(value).startswith(wanted[:-1])
    return bool(value == wanted)


def fill(template: str, row: Mapping[str, Any]) -> str:
    """A template with a row's fields in it. Raises KeyError for a field that the row lacks."""
    return _FIELD.sub(lambda found: _FORMS[found[2]](row[found[1]]), template)


def _letter(place: int) -> str:
    return chr(ord("A") + place)


_FORMS: Mapping[str | None, Any] = {
    None: str,
    "stated": lambda text: str(text).strip() or "N/A",
    "letter": _letter,
    "line": lambda text: str(text).partition("\n")[0],
    "words": " ".join,
    "options": lambda choices: " ".join(f"({_letter(place)}) {text}" for place, text in enumerate(choices)),
}


def _drawing(sample: Mapping[str, Any]) -> Callable[[list[Case], int], list[Case]]:
    """Draws so many of a list, in the order drawn, as the paper's code does; one draw goes on behind the other."""
    if sample["draw"] == "python":
        deck = random.Random(sample["seed"])
        return lambda cases, count: deck.sample(cases, min(count, len(cases)))
    generator = np.random.default_rng(sample["seed"])
    return lambda cases, count: [cases[place] for place in generator.permutation(len(cases))[:count]]
