"""Online-logit distillation (arXiv 2509.11815): the frozen target runs on each batch, nothing is dumped.

    batch -> target.teach -> features -> student -> predicted features -> named losses -> update

The target is not prepared by accelerate: every process holds a frozen copy and only the student is wrapped.
"""

from __future__ import annotations

import math
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from speculens import __version__
from speculens.checkpoints import save_drafter
from speculens.conversation import Conversation
from speculens.data.sources import JsonLines, Listed, Source
from speculens.errors import UserError
from speculens.targets import Target, load_target
from speculens.training import checkpoint
from speculens.training.batches import Batch, Encoder, Order, stream
from speculens.training.checkpoint import Progress
from speculens.training.config import Optimiser, Recipe
from speculens.training.events import Bar, Event, Listener, Log
from speculens.training.losses import Losses, objective
from speculens.training.measure import Exam, exam
from speculens.training.student import Student, distil, make_drafter

# What may not change when a run goes on.
FIXED = ("target", "drafter", "data", "seed", "batch_size", "accumulation", "dtype")


def train(
    recipe: Recipe,
    *,
    target: Target | None = None,
    rows: Source | Sequence[Conversation] | None = None,
    val: Source | Sequence[Conversation] | None = None,
    resume_from: str | Path | None = None,
    on_event: Listener | None = None,
) -> Path:
    """Run a recipe to its end; returns the folder of the drafter, `best` if acceptance was measured and else `last`.

    target, rows, val  in memory, in place of what the recipe names
    resume_from        a checkpoint folder, or `latest` of the recipe's output
    on_event           is called with every event that goes into the log
    """
    output = Path(recipe.output)
    start = checkpoint.find(output, resume_from) if resume_from else None
    if start is None and (checkpoint.checkpoints(output) or (output / "last").exists()):
        raise UserError(f"{output} holds a run already: resume it (--resume-from latest) or choose another output.")
    on_cpu = target.device.type == "cpu" if target else not torch.cuda.is_available()
    accelerator = Accelerator(cpu=on_cpu)
    set_seed(recipe.seed)
    target = target or load_target(recipe.target, dtype=recipe.target_dtype, device=accelerator.device)
    source = _source(rows, recipe.data.train, recipe.data.image_root)
    held_out = _source(val, [recipe.data.val] if recipe.data.val else [], recipe.data.image_root)
    questions = exam(target, held_out, recipe.eval_prompts, recipe.eval_tokens) if len(held_out) else None
    return Trainer(recipe, target, source, questions, accelerator, on_event).run(start)


def _source(given: Source | Sequence[Conversation] | None, paths: Sequence[str], root: str | None) -> Source:
    if given is None:
        return JsonLines(paths, root)
    return given if hasattr(given, "size") else Listed(given)


class Trainer:
    """One run: student, optimiser, order of the data and progress."""

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        source: Source,
        questions: Exam | None,
        accelerator: Accelerator,
        on_event: Listener | None,
    ) -> None:
        self.recipe, self.target, self.source, self.exam = recipe, target, source, questions
        self.accelerator, self.output = accelerator, Path(recipe.output)
        mixed = recipe.dtype == "mixed"
        weights = torch.float32 if mixed else getattr(torch, recipe.dtype)
        self.drafter = make_drafter(recipe.drafter, target).to(target.device, weights)
        student = Student(self.drafter, target.dtype if mixed else weights)
        optimizer = _optimizer(self.drafter, recipe.optimiser)
        self.student, self.optimizer = accelerator.prepare(student, optimizer)
        self.forward = torch.compile(self.student) if recipe.compile else self.student
        sizes = [source.size(index) for index in range(len(source))]
        self.order = Order(sizes, recipe.batch_size, recipe.seed, accelerator.process_index, accelerator.num_processes)
        self.progress = Progress()
        self.refused: Counter[str] = Counter()
        self.listeners: list[Listener] = [on_event] if on_event else []
        self._tally = _Tally()
        self._since = time.monotonic()
        self._saved = self._measured = -1
        self._figures: dict[str, Any] = {}

    def run(self, start: Path | None) -> Path:
        """Train to the end of the recipe, from a checkpoint or from the beginning."""
        recipe, main = self.recipe, self.accelerator.is_main_process
        if start is not None:
            self._resume(start)
        self.order.start = self.progress.position
        encoder = Encoder(self.target, recipe.data.max_length)
        pin = self.target.device.type == "cuda"
        with ExitStack() as stack:
            if main:
                self.output.mkdir(parents=True, exist_ok=True)
                (self.output / "recipe.yaml").write_text(recipe.to_yaml())
                self.listeners += [Log(self.output / "log.jsonl", self.progress.step), stack.enter_context(Bar())]
            batches = stack.enter_context(stream(self.source, encoder, self.order, recipe.workers, pin=pin))
            self._tell("start", conversations=len(self.source), batches_per_epoch=self.order.per_epoch, **_versions())
            self._since = time.monotonic()
            while self._done() < 1:
                self._update(batches)
                self._after_update()
            self._measure()
            self._save()
            folder = self._save_drafter("last")
            self._tell("end", seconds=round(self.progress.seconds, 3))
        return self.output / "best" if self.exam and (self.output / "best").exists() else folder

    # One update

    def _update(self, batches: Iterator[Batch]) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        rate = self._set_rate()
        try:
            for part in range(recipe.accumulation):
                last = part == recipe.accumulation - 1
                with nullcontext() if last else accelerator.no_sync(self.student):
                    losses = self._losses(self._next(batches))
                    accelerator.backward(losses.total / recipe.accumulation)
                self._tally.add(losses)
            norm = accelerator.clip_grad_norm_(self.student.parameters(), recipe.optimiser.clip or math.inf)
            self.optimizer.step()
            self.optimizer.zero_grad()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"The GPU ran out of memory at step {self.progress.step + 1} with {recipe.batch_size} conversations a "
                "pass: lower batch_size (and raise accumulation by the same factor), chunk or data.max_length."
            ) from error
        self._tally.add_update(norm, rate)
        self.progress.step += 1
        now = time.monotonic()
        self.progress.seconds += now - self._since
        self._since = now

    def _losses(self, batch: Batch) -> Losses:
        student, teacher = distil(self.forward, self.target, batch.to(self.target.device))
        terms, chunk = self.recipe.objective, self.recipe.chunk
        return objective(student, teacher, self.target.logits, terms.weights, top=terms.top, chunk=chunk)

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch with something to learn from; what was refused is counted, and said once."""
        for _ in range(self.order.per_epoch):
            batch = next(batches)
            self.progress.position += 1
            self.progress.rows += len(batch)
            if batch.refused and not self.refused:
                self._tell("warning", message=f"Some conversations are refused; the first: {batch.refused[0]}")
            self.refused.update(batch.refused)
            if batch.slots.shape[1]:
                return batch
            self._tell("warning", message="A batch has no answer to learn from and is skipped.")
        reason = next(iter(self.refused), "they hold no answers")
        raise UserError(f"None of the {len(self.source)} conversations can be used. The first: {reason}")

    def _set_rate(self) -> float:
        rate = self.recipe.optimiser.lr * factor(self.recipe.optimiser, self.progress.step, self._done())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _done(self) -> float:
        """How much of the run is over, from 0 to 1."""
        recipe = self.recipe
        if recipe.minutes is not None:
            return min(1.0, self.progress.seconds / (60 * recipe.minutes))
        updates = recipe.steps or math.ceil((recipe.epochs or 0) * self.order.per_epoch / recipe.accumulation)
        return min(1.0, self.progress.step / updates)

    # Between updates

    def _after_update(self) -> None:
        recipe, step = self.recipe, self.progress.step
        saves = recipe.save_every is not None and step % recipe.save_every == 0
        if step % recipe.log_every == 0 or saves or self._done() == 1:
            self._log()
        if recipe.eval_every is not None and step % recipe.eval_every == 0:
            self._measure()
        if saves:
            self._save()

    def _log(self) -> None:
        figures = self._tally.take(self.accelerator)
        if not math.isfinite(figures["loss"]):
            raise UserError(f"The loss is not finite at step {self.progress.step}: lower optimiser.lr and start again.")
        epoch = self.progress.position / self.order.per_epoch
        self._tell("step", epoch=round(epoch, 4), done=self._done(), refused=self.refused.total(), **figures)

    def _measure(self) -> None:
        """Acceptance length by real decoding; the best drafter so far is kept."""
        if self.exam is None or self._measured == self.progress.step or not self.accelerator.is_main_process:
            return
        self._measured = self.progress.step
        self._figures = self.exam.measure(self.drafter)
        self._tell("eval", **self._figures)
        if self._figures["mean_acceptance_length"] >= self.progress.best:
            self.progress.best = self._figures["mean_acceptance_length"]
            self._save_drafter("best")

    def _save(self) -> None:
        if self._saved == self.progress.step or not self.accelerator.is_main_process:
            return
        self._saved = self.progress.step
        folder = checkpoint.save(
            self.output,
            self.drafter,
            self.optimizer,
            self.progress,
            self.recipe.to_dict(),
            self._card(),
            self.recipe.keep,
        )
        self._tell("checkpoint", path=str(folder))

    def _save_drafter(self, name: str) -> Path:
        if self.accelerator.is_main_process:
            with checkpoint.whole(self.output / name) as partial:
                save_drafter(self.drafter, partial, self._card())
        return self.output / name

    def _card(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "target": recipe.target,
            "data": f"{', '.join(recipe.data.train) or 'in memory'}, {len(self.source)} conversations",
            "trained": f"{self.progress.step} updates, {self.progress.rows} conversations seen",
            "metrics": self._figures or "not measured",
            **_versions(),
            "recipe": recipe.to_dict(),
        }

    def _resume(self, folder: Path) -> None:
        self.progress, made_with = checkpoint.load(folder, self.drafter, self.optimizer)
        now = self.recipe.to_dict()
        changed = [name for name in FIXED if made_with.get(name) != now[name]]
        if changed:
            raise UserError(
                f"{folder} was made with another {', '.join(changed)}: resume with the same, or start anew."
            )
        self._saved = self.progress.step

    def _tell(self, event: str, **values: Any) -> None:
        line: Event = {"event": event, "step": self.progress.step, **values}
        for listener in self.listeners:
            listener(line)


class _Tally:
    """Sums since the last line of the log, kept on the device so that an update waits for nothing."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | float = 0.0
        self._norm: Tensor | float = 0.0
        self._passes = self._updates = 0
        self._rate, self._since = 0.0, time.monotonic()

    def add(self, losses: Losses) -> None:
        """One pass."""
        self._names = ["loss", *losses.terms, "agreement"]
        self._sum = self._sum + torch.stack([losses.total.detach(), *losses.terms.values(), losses.agreement])
        self._passes += 1

    def add_update(self, norm: Tensor | None, rate: float) -> None:
        self._norm = self._norm + (0.0 if norm is None else norm.detach())
        self._rate, self._updates = rate, self._updates + 1

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over passes and updates; one host read. Starts anew."""
        mean = accelerator.reduce(torch.as_tensor(self._sum) / self._passes, "mean").tolist()
        pace = self._updates / max(time.monotonic() - self._since, 1e-9)
        figures = dict(zip(self._names, mean, strict=True)) | {
            "grad_norm": float(self._norm) / self._updates,
            "lr": self._rate,
            "steps_per_second": round(pace, 3),
        }
        self._clear()
        return figures


def factor(optimiser: Optimiser, step: int, done: float) -> float:
    """The share of the full rate at an update: the warm-up's times the schedule's, `done` from 0 to 1."""
    rise = min(1.0, (step + 1) / optimiser.warmup) if optimiser.warmup else 1.0
    fall = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return rise * fall[optimiser.schedule]


def _optimizer(drafter: torch.nn.Module, recipe: Optimiser) -> torch.optim.AdamW:
    on_gpu = next(drafter.parameters()).is_cuda
    return torch.optim.AdamW(
        drafter.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=on_gpu or None
    )


def _versions() -> dict[str, str]:
    """What made this drafter: versions, and the commit of this package where it stands in a repository."""
    found = {"speculens": __version__, "python": platform.python_version()}
    found |= {name: version(name) for name in ("torch", "transformers")}
    here = Path(__file__).parent
    try:  # asked for this folder, so that the repository around an installed copy does not answer
        git = ["git", "-C", str(here), "log", "-1", "--format=%H", "--", "."]
        asked = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 - fixed words
        commit = asked.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return found | ({"commit": commit} if commit else {})
