"""Every drafter beside `none` in one process: alternating order, warmed up, exactness checked in the same run.

A question is answered by all contenders, one right after the other, before the next question comes; the order turns
round from case to case. So whatever slows the machine slows all of them, and a speedup is a ratio of neighbours.
Later turns of a conversation follow on the target's own earlier answers, so that everybody gets the same prompts.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from speculens import html
from speculens.answer import Answer, Entry, ask
from speculens.bench.record import NONE, Record, RunFolder
from speculens.bench.suites import Case
from speculens.conversation import Conversation, Message
from speculens.data.journal import Journal
from speculens.data.respond import Asking
from speculens.drafters import Drafter, NoDrafter
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.sampling import Sampling, gumbel
from speculens.slot import Step
from speculens.stats import Stats
from speculens.targets import Prompt, Target
from speculens.text import spell
from speculens.tree import DraftTree, TreeShape

WARM = 3  # cases that are answered before the clock starts
CLOSER = 8  # cases of the closer look
WALK = 24  # steps that are kept of the one prompt that is walked through
OWN_LOOP = "engine"


@dataclass(frozen=True)
class Contender:
    """One way to decode. `loop` says whose: only figures of one loop tell what a drafter is worth."""

    name: str
    answer: Callable[[Prompt, Sampling], Answer]
    loop: str = OWN_LOOP


@dataclass(frozen=True)
class Progress:
    """How far a run is, for a bar: cases dealt with, of how many, and tokens per pass of the drafters so far."""

    done: int
    total: int
    lengths: Mapping[str, float] = field(default_factory=dict)


OnProgress = Callable[[Progress], None]


@dataclass(eq=False)
class Bench:
    """Measures drafters on the cases of a suite.

    drafters  by the names that tables call them; `none` is always among them
    asking    how the questions are put and the answers drawn; every question has a seed of its own
    shapes    draft trees instead of the drafters' own, by name; `auto` sizes each step's
    others    contenders with a loop of their own
    capacity  rows of a slot; None makes room for the longest conversation of the suite
    capture   as of `Engine`: `off` measures eager steps on a GPU, too
    closer    cases that are decoded once more by each drafter, eagerly, to see where the time goes; 0 leaves it out
    errors    cases that could not be asked, and why
    """

    target: Target
    drafters: Mapping[str, Drafter]
    cases: Sequence[Case]
    asking: Asking
    _: KW_ONLY
    shapes: Mapping[str, TreeShape | Literal["auto"]] = field(default_factory=dict)
    others: Sequence[Contender] = ()
    capacity: int | None = None
    capture: Literal["auto", "off"] = "auto"
    closer: int = CLOSER
    errors: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.drafters = {NONE: NoDrafter(), **self.drafters}
        self._limit = min(self.capacity or self.target.context, self.target.context)
        self._rows = self.capacity or 1

    def setting(self, **names: Any) -> dict[str, Any]:
        """All that the figures depend on; `names` are those of target, suite and the like."""
        device = self.target.device
        return {
            **names,
            "family": self.target.family,
            "drafters": {name: self._about(name) for name in self.drafters}
            | {other.name: {"loop": other.loop} for other in self.others},
            "asking": asdict(self.asking),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
            "threads": torch.get_num_threads(),
            "capture": self.capture,
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def _about(self, name: str) -> dict[str, Any]:
        about = self.drafters[name].describe()
        shape = self.shapes.get(name)
        return {
            "loop": OWN_LOOP,
            **about,
            **({"tree": vars(shape) if isinstance(shape, TreeShape) else shape} if shape else {}),
        }

    def run(self, folder: RunFolder, on_progress: OnProgress = lambda _: None) -> None:
        """Measure every case that the folder does not hold yet, then look closer at the first few."""
        with folder.journal() as journal:
            self._measure_all(journal, on_progress)
        if self.closer and not folder.has("closer"):
            near = self._survey(list(enumerate(self.cases[: self.closer])))
            folder.write("closer", self._look_closer([case for _, case in near]))

    def _measure_all(self, journal: Journal, on_progress: OnProgress) -> None:
        todo = [(number, case) for number, case in enumerate(self.cases) if case.name not in journal]
        done, total = len(self.cases) - len(todo), len(self.cases)
        on_progress(Progress(done, total))
        passes = {name: Stats() for name in self.drafters if name != NONE}
        for number, case, contenders in self._in_turn(self._survey(todo)):
            try:
                turns = list(self._measure(case, contenders))
            except UserError as error:
                self.errors[case.name] = str(error)
                continue
            journal.add({"id": case.name, "number": number, "turns": [record.to_row() for record in turns]})
            for name, before in passes.items():
                stats = (record.answers[name].generation.stats for record in turns)
                # Notes would grow with every picture, and be copied each time.
                passes[name] = Stats.total([before, *(replace(one, drafter_notes={}) for one in stats)])
            done += 1
            lengths = {name: stats.mean_acceptance_length for name, stats in passes.items()}
            on_progress(Progress(done, total, lengths))

    # Before

    def _survey(self, cases: Sequence[tuple[int, Case]]) -> list[tuple[int, Case]]:
        """The cases that can be asked. Engines are made with room for the longest of them."""
        usable = []
        for number, case in cases:
            try:
                self._rows = max(self._rows, self._room(case))
            except UserError as error:
                self.errors[case.name] = str(error)
            else:
                usable.append((number, case))
        return usable

    def _room(self, case: Case) -> int:
        """Rows that a case may fill: all of its questions, and an answer of full length to each.

        Earlier answers are counted twice where there is room: encoded again, a text may become more tokens.
        """
        conversation, questions = self._questions(case)
        for number, question in enumerate(questions):
            if number:
                conversation = conversation.then("assistant", ".")
            conversation = conversation.then(question.role, *question.content)
        longest = self.asking.max_new_tokens
        rows = len(self.target.encode(conversation)) + longest * len(questions)
        if rows > self._limit:
            raise UserError(
                f"{case.name} may need {rows} rows, its answers included, and there is room for {self._limit}: lower "
                "--max-new-tokens, or raise --max-model-len up to the target's context."
            )
        return min(rows + longest * (len(questions) - 1), self._limit)

    def _questions(self, case: Case) -> tuple[Conversation, list[Message]]:
        return self.asking.questions(case.name, case.conversation(), case.given)

    def _in_turn(self, cases: Sequence[tuple[int, Case]]) -> Iterator[tuple[int, Case, list[Contender]]]:
        """Each case with the order in which it is answered: turned round from one to the next."""
        if not cases:
            return
        contenders = [*(self._contender(name) for name in self.drafters), *self.others]
        self._warm_up(contenders, [case for _, case in cases])
        for number, case in cases:
            yield number, case, contenders if number % 2 else contenders[::-1]

    def _contender(self, name: str) -> Contender:
        engine = self._engine(name)
        engine.warm_up([self.asking.sampling(name, 0)])  # no graph is recorded while the clock runs
        return Contender(name, partial(ask, engine))

    def _engine(self, name: str, *, timed: bool = False) -> Engine:
        return Engine(
            self.target,
            self.drafters[name],
            capacity=self._rows,
            shape=self.shapes.get(name),
            timed=timed,
            capture=self.capture,
        )

    def _warm_up(self, contenders: Sequence[Contender], cases: Sequence[Case]) -> None:
        """First passes are slower than all later ones: a whole answer to the first case, a few tokens for others.

        Who cannot answer is told of when it is measured.
        """
        for number, case in enumerate(cases[:WARM]):
            conversation, questions = self._questions(case)
            prompt = self.target.encode(conversation.then(questions[0].role, *questions[0].content))
            sampling = self.asking.sampling(case.name, 0)
            if number:
                sampling = replace(sampling, max_new_tokens=min(8, sampling.max_new_tokens))
            for contender in contenders:
                with suppress(UserError):
                    contender.answer(prompt, sampling)

    # Measuring

    def _measure(self, case: Case, contenders: Sequence[Contender]) -> Iterator[Record]:
        """Every turn of a case, answered by everybody."""
        conversation, questions = self._questions(case)
        for turn, question in enumerate(questions):
            conversation = conversation.then(question.role, *question.content)
            prompt = self.target.encode(conversation)
            sampling = self.asking.sampling(case.name, turn)
            answers, memory, failures = {}, {}, {}
            for contender in contenders:
                try:
                    with _peak_memory(self.target.device) as peak:
                        answers[contender.name] = contender.answer(prompt, sampling)
                except UserError as error:
                    if contender.loop == OWN_LOOP:
                        raise
                    failures[contender.name] = str(error)  # a peer that cannot do it takes nothing from the others
                    continue
                memory[contender.name] = peak[0]
            own = answers[NONE]
            gaps = {
                name: gap(self.target, prompt, own.generation.tokens[:place], sampling)
                for name, answer in answers.items()
                if (place := Entry(name, [answer], [own]).differences[0]) is not None
            }
            rows = len(prompt), int(prompt.image.sum())
            yield Record(case.name, case.topic, turn, *rows, answers, gaps, memory, failures)
            conversation = conversation.then("assistant", own.generation.text.lstrip() or ".")

    # A closer look

    def _look_closer(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Where the time goes, by drafter, and the first case step by step.

        Apart from the measurement: steps run eagerly here, waiting for the device around each part, which costs speed.
        """
        costs: dict[str, Any] = {}
        walks: dict[str, Any] = {}
        for name in self.drafters:
            engine = self._engine(name, timed=True)
            answers: list[Answer] = []
            with _vision_clock(self.target) as vision:
                for place, case in enumerate(cases):
                    conversation, (question, *_) = self._questions(case)
                    prompt = self.target.encode(conversation.then(question.role, *question.content))
                    sampling = self.asking.sampling(case.name, 0)
                    if place == 0:  # warm, and kept
                        walks[name] = walk(engine, prompt, sampling)
                        vision.clear()
                    answers.append(ask(engine, prompt, sampling))
            costs[name] = _costs(answers, sum(vision))
        return {"costs": costs, "walk": {**self._shown(cases[0]), "steps": walks} if cases else {"steps": {}}}

    def _shown(self, case: Case) -> dict[str, Any]:
        """What a reader of the walk must see: the first question and its first picture."""
        _, (question, *_) = self._questions(case)
        texts = [part for part in question.content if isinstance(part, str)]
        pictures = [part for part in question.content if not isinstance(part, str)]
        picture = html.data_uri(pictures[0]) if pictures else None
        return {"case": case.name, "question": " ".join(texts), "picture": picture}


def gap(target: Target, prompt: Prompt, tokens: Sequence[int], sampling: Sampling) -> float:
    """How far apart the target's two best choices are after `tokens`: logits, or with temperature and noise if sampled.

    Where answers part at a gap within the rounding of the dtype, either is right; a wide gap means a mistake. What
    top_k and top_p would filter is looked at, too.
    """
    session = target.session(slots=1, capacity=len(prompt) + len(tokens))
    logits, _ = session.prefill(prompt)
    if tokens:
        logits, _ = session.score(DraftTree.chain(torch.tensor([list(tokens)], device=target.device)))
    scores = logits[0, -1].float()
    if sampling.temperature > 0:
        seed, position = (torch.tensor(number, device=target.device) for number in (sampling.seed, len(tokens)))
        scores = scores / sampling.temperature + gumbel(seed, position, len(scores))
    best, second = scores.topk(2).values.tolist()
    return float(best - second)


def walk(engine: Engine, prompt: Prompt, sampling: Sampling) -> list[dict[str, Any]]:
    """The first steps of an answer: what was drafted, which of it was kept, what the target said instead.

    tokens   emitted, as text; all but the last were drafted, unless the answer was cut there
    nodes    of the tree, as text, root first; `parents` their parents
    path     nodes that were kept, from the root down
    """
    texts = partial(_spelt, engine.target.tokenizer)
    return [
        {"tokens": texts(step.tokens), "accepted": step.accepted, **_tree(step, texts)}
        for step in islice(engine.stream(prompt, sampling), WALK)
    ]


def _spelt(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    return [spell(tokenizer, token)[0] for token in tokens]


def _tree(step: Step, texts: Callable[[Sequence[int]], list[str]]) -> dict[str, Any]:
    tokens, parents, path = step.tree.outline(step.tokens[: step.accepted]) if step.tree else ([], [], [])
    return {"nodes": texts(tokens), "parents": parents, "path": path}


def _costs(answers: Sequence[Answer], vision: float) -> dict[str, Any]:
    """Seconds by part, of eager steps. What no part accounts for is the host's: words, tables, the loop itself."""
    stats = Stats.total(answer.generation.stats for answer in answers)
    spent = stats.seconds
    parts = {
        "vision": vision,
        "prefill": spent.get("prefill", 0.0) - vision,
        "draft": spent.get("draft", 0.0) + spent.get("observe", 0.0),
        "verify": spent.get("score", 0.0) + spent.get("choose", 0.0),
    }
    whole = sum(answer.seconds for answer in answers)
    return {
        **parts,
        "host": whole - sum(parts.values()),
        "seconds": whole,
        "answers": len(answers),
        "num_drafts": stats.num_drafts,
        "draft_time_fraction": stats.draft_time_fraction,
        "steps": "eager",
    }


@contextmanager
def _vision_clock(target: Target) -> Iterator[list[float]]:
    """Seconds of each forward of the vision tower, waiting for the device."""
    spent: list[float] = []
    begun: list[float] = []

    def start(*_: Any) -> None:
        _wait_for(target.device)
        begun.append(time.perf_counter())

    def stop(*_: Any) -> None:
        _wait_for(target.device)
        spent.append(time.perf_counter() - begun.pop())

    tower = target.model.get_encoder(modality="image")
    hooks = [tower.register_forward_pre_hook(start), tower.register_forward_hook(stop)]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int | None]]:
    """Most bytes allocated on the device meanwhile, all that is loaded there included; None without a device."""
    peak: list[int | None] = [None]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        peak[0] = torch.cuda.max_memory_allocated(device)


def _processor() -> str:
    """The CPU's name as Linux tells it; elsewhere what Python knows."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, name = line.partition(":")
            if key.strip() == "model name":
                return name.strip()
    return platform.processor() or platform.machine()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
