"""The target writes its own answers: those of a data set are thrown away and its questions are asked anew.

An answer depends on (settings, row id, turn) alone: each is drawn with a seed of its own. So the order of the rows, the
number of slots, a drafter, a kill and a resumption change nothing about it (up to the arithmetic of other batch shapes;
docs/how-it-works.md). Every finished row is on the disk before the next step of the engine.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from speculens.conversation import Conversation, Message
from speculens.data.journal import Journal
from speculens.data.rows import Names, OnRow, Pictures, Row, check_refusal, outputs, reason, refusal, rest
from speculens.data.sources import JsonLines
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.sampling import Sampling
from speculens.slot import Slot
from speculens.stats import Stats

PLACE = "{prompt}"  # where the user's own words stand in a template


@dataclass(frozen=True)
class Asking:
    """How questions are put and answers drawn; a recipe file (`recipes/respond`) holds these keys.

    templates       the text of a message of the user, with {prompt} for its own; a row takes one of them by its seed
    system          replaces the system message of every row; None leaves what a row has
    turns           messages of the user that are answered, from the first; None answers all
    temperature, top_k, top_p, max_new_tokens   as in `Sampling`
    seed            of the answers; each row and turn has its own, made from this and the id
    """

    templates: tuple[str, ...] = (PLACE,)
    system: str | None = None
    turns: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.templates:
            raise UserError(f"templates must hold at least one text; {PLACE!r} leaves a question as it is.")
        for template in self.templates:
            if template.count(PLACE) != 1:
                raise UserError(f"A template must hold {PLACE} exactly once; {template!r} does not.")
        if self.turns is not None and self.turns < 1:
            raise UserError(f"turns must be 1 or more, not {self.turns}.")
        self.sampling("", 0)

    def sampling(self, name: str | int, turn: int) -> Sampling:
        """How the answer to one turn (from 0) of one row is drawn."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
            seed=_hash(self.seed, name, turn),
        )

    def questions(
        self, name: str | int, conversation: Conversation, given: int = 0
    ) -> tuple[Conversation, list[Message]]:
        """What stands before the first question, and the questions as they are put. Raises UserError if none is.

        given  messages at the beginning that stand as they are, answers too: solved examples
        """
        template = self.templates[_hash(self.seed, name, "template") % len(self.templates)]
        said = [message for message in conversation.messages if message.role == "system"]
        head = [Message("system", (self.system,))] if self.system else said
        solved = [message for message in conversation.messages[:given] if message.role != "system"]
        asked = [put(message, template) for message in conversation.messages[given:] if message.role == "user"]
        if not asked:
            raise UserError(f"Row {name!r}: it has no message of the user to answer.")
        return Conversation((*head, *solved)), asked[: self.turns]

    def fingerprint(self, target: str, **loaded: str) -> str:
        """Of everything that the answers depend on; `loaded` says how the target was, where not by default."""
        settings = json.dumps({"target": target, **loaded, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:12]


def put(message: Message, template: str) -> Message:
    """A message under a template: its first half before the first text, its second half at the very end.

    Where a picture stands there, the half becomes a text of its own, without the white at its edge.
    """
    before, after = template.split(PLACE)
    parts = list(message.content)
    first = next((i for i, part in enumerate(parts) if isinstance(part, str)), len(parts))
    if first < len(parts):
        parts[first] = f"{before}{parts[first]}"
    elif before.strip():
        parts.append(before.strip())
    if isinstance(parts[-1], str):
        parts[-1] = f"{parts[-1]}{after}"
    elif after.strip():
        parts.append(after.strip())
    return Message(message.role, tuple(parts))


def _hash(*parts: object) -> int:
    """63 bits that depend on all parts."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass
class Outcome:
    """What a run came to.

    success, error   rows that this run answered, and that it could not
    skipped          rows that an earlier run had answered, or had refused and that were not to be tried again
    reasons          of the errors, counted
    finish_reasons   of the answers of this run, counted
    stats            of the engine, without what the drafter noted
    notes            of the drafter, counted: a list of them would grow with every picture
    """

    success: int = 0
    error: int = 0
    skipped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    seconds: float = 0.0
    stats: Stats = field(default_factory=Stats)
    notes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    first_error: str = ""

    @property
    def done(self) -> int:
        """Rows that are dealt with."""
        return self.success + self.error + self.skipped

    def add_answer(self, slot: Slot) -> None:
        self.finish_reasons[str(slot.finish_reason)] += 1
        self.tokens += len(slot.tokens)
        self.stats = Stats.total([self.stats, replace(slot.stats, drafter_notes={})])
        for name, words in slot.stats.drafter_notes.items():
            self.notes[name].update(words)

    def add_error(self, error: UserError) -> None:
        self.error += 1
        self.reasons[reason(error)] += 1
        self.first_error = self.first_error or str(error)

    def to_dict(self) -> dict[str, Any]:
        """All figures in plain JSON types."""
        return {
            "success": self.success,
            "error": self.error,
            "skipped": self.skipped,
            "reasons": dict(self.reasons.most_common()),
            "finish_reasons": dict(self.finish_reasons),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 2) if self.seconds else 0.0,
            "stats": self.stats.to_dict()
            | {"drafter_notes": {name: dict(words) for name, words in self.notes.items()}},
        }


@dataclass
class _Job:
    """A row on its way: what was said so far, and the questions that wait."""

    name: str | int
    row: Row
    pictures: Pictures
    conversation: Conversation
    questions: deque[Message]
    turn: int = 0
    cut: bool = False


class Responder:
    """Answers the rows of `source` into `output`; goes on where an earlier run with the same settings ended.

    target  how the target is named in the rows' metadata
    loaded  its revision and dtype, where they are not the default: a file of others is not gone on with
    """

    def __init__(
        self,
        engine: Engine,
        source: JsonLines,
        asking: Asking,
        output: Path,
        target: str,
        limit: int | None = None,
        loaded: Mapping[str, str] | None = None,
    ) -> None:
        self._engine, self._source, self._asking = engine, source, asking
        self._output, self._target = output, target
        self._rows = len(source) if limit is None else min(limit, len(source))
        self._made_with = asking.fingerprint(target, **(loaded or {}))
        self.outcome = Outcome()

    def run(self, *, retry_errors: bool = False, on_row: OnRow | None = None) -> Outcome:
        """Answer all that is not answered yet. Raises UserError if the output was made with other settings."""
        outcome, start = self.outcome, time.monotonic()
        with ExitStack() as stack:
            answers, errors = outputs(self._source, self._output)
            self._answers = stack.enter_context(Journal(answers, self._check_answer))
            self._errors = stack.enter_context(Journal(errors, check_refusal))
            if retry_errors:
                self._errors.clear()
            running: dict[Slot, _Job] = {}
            stack.callback(self._cancel, running)
            for _ in self._rounds(running):
                outcome.seconds = time.monotonic() - start
                if on_row:
                    on_row(outcome.done, self._rows)
        if not len(self._errors):
            self._errors.path.unlink()
        return outcome

    def _rounds(self, running: dict[Slot, _Job]) -> Iterator[None]:
        """Fill the slots, then one step of the engine, until nothing is left."""
        rows = self._open_rows()
        again: deque[_Job] = deque()
        while True:
            while len(running) < self._engine.slots and (job := again.popleft() if again else next(rows, None)):
                self._admit(job, running, again)
            yield
            if not running:
                return
            for step in self._engine.step():
                if step.slot.finish_reason is not None:
                    self._answered(step.slot, running.pop(step.slot), again)

    def _cancel(self, running: dict[Slot, _Job]) -> None:
        for slot in running:
            self._engine.cancel(slot)

    def _open_rows(self) -> Iterator[_Job]:
        """Rows that are neither answered nor refused yet, read when they are asked for."""
        names = Names()
        for number in range(self._rows):
            row: Any = None
            try:
                row = self._source.row(number)
            except UserError as error:
                name = names.name(row, number)
                if not self._skips(name):
                    self._refuse(name, error)
                continue
            name = names.name(row, number)
            if self._skips(name):
                continue
            pictures = Pictures(self._source.root(number), self._output)
            try:
                conversation = pictures.read(row)
                head, questions = self._asking.questions(name, conversation)
            except UserError as error:
                self._refuse(name, error)
                continue
            yield _Job(name, row, pictures, head, deque(questions))

    def _skips(self, name: str | int) -> bool:
        known = name in self._answers or name in self._errors
        self.outcome.skipped += known
        return known

    def _admit(self, job: _Job, running: dict[Slot, _Job], again: deque[_Job]) -> None:
        """Put the next question of a row."""
        question = job.questions.popleft()
        job.conversation = Conversation((*job.conversation.messages, question))
        try:
            slot = self._engine.admit(job.conversation, self._asking.sampling(job.name, job.turn)).slot
        except UserError as error:
            self._refuse(job.name, error)
            return
        if slot.finish_reason is None:
            running[slot] = job
        else:
            self._answered(slot, job, again)

    def _answered(self, slot: Slot, job: _Job, again: deque[_Job]) -> None:
        self.outcome.add_answer(slot)
        text = slot.text.lstrip()  # chat templates write the white before an answer themselves
        if not text:
            self._refuse(job.name, UserError(f"Row {job.name!r}: the target's answer {job.turn + 1} is empty."))
            return
        job.conversation = job.conversation.then("assistant", text)
        job.turn += 1
        job.cut = job.cut or slot.finish_reason == "length"
        if job.questions:
            again.append(job)
        else:
            self._answers.add(self._finished(job))
            self.outcome.success += 1

    def _finished(self, job: _Job) -> Row:
        kept = rest(job.row)
        before = kept.pop("metadata", None)
        metadata = {
            **(before if isinstance(before, dict) else {}),
            "target": self._target,
            "temperature": self._asking.temperature,
            "max_tokens": self._asking.max_new_tokens,
            "finish_reason": "length" if job.cut else "stop",
            "settings": self._made_with,
        }
        return {"id": job.name, "messages": job.pictures.messages(job.conversation), **kept, "metadata": metadata}

    def _refuse(self, name: str | int, error: UserError) -> None:
        self._errors.add(refusal(name, error))
        self.outcome.add_error(error)

    def _check_answer(self, row: Row) -> None:
        metadata = row.get("metadata")
        if not isinstance(metadata, dict) or metadata.get("settings") != self._made_with:
            raise UserError(
                f"Row {row['id']!r} of {self._output} was answered by another target or with other settings: go on "
                "with those, or choose another output."
            )
