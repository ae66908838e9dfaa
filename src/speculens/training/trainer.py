"""Online-logit distillation (arXiv 2509.11815): the frozen target runs on each batch, nothing is dumped.

    batch -> target.teach -> features -> student -> predicted features -> named losses -> update

The target is not prepared by accelerate: every process holds a frozen copy, or its share of one, and only the student
is wrapped. What an update does is a function of the recipe and its number: how its passes are shared out among
processes and accumulation changes nothing, and neither does being killed and resumed (docs/training.md).
"""

from __future__ import annotations

import copy
import math
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from speculens.checkpoints import save_drafter, whole
from speculens.conversation import Conversation
from speculens.data.sources import JsonLines, Listed, Source
from speculens.data.vocabulary import commonest
from speculens.drafters import TrainedDrafter
from speculens.errors import UserError
from speculens.targets import Target, load_target
from speculens.training import checkpoint
from speculens.training.average import Average
from speculens.training.batches import Batch, Encoder, Order, Reader, stream
from speculens.training.checkpoint import Progress
from speculens.training.config import Optimiser, Recipe, read_recipe
from speculens.training.encoded import Encoded, encoded
from speculens.training.events import Bar, Event, Listener, Log
from speculens.training.losses import Losses
from speculens.training.measure import Exam, exam
from speculens.training.parallel import Crew, make_accelerator, shard
from speculens.training.student import Student, distil, make_drafter
from speculens.training.unroll import lesson_losses

# What may not change when a run goes on.
FIXED = ("target", "drafter", "data", "seed", "batch_size", "dtype", "ema")


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
    Launched as several processes (torchrun, accelerate), each calls this, and all return the folder once it is written.
    """
    output = Path(recipe.output)
    start = checkpoint.find(output, resume_from) if resume_from else None
    if start is None and (checkpoint.checkpoints(output) or (output / "last").exists()):
        raise UserError(f"{output} holds a run already: resume it (--resume-from latest) or choose another output.")
    source = _source(rows, recipe.data.train, recipe.data.image_root)
    held_out = _held_out(val, recipe)
    on_cpu = target.device.type == "cpu" if target else not torch.cuda.is_available()
    accelerator = make_accelerator(on_cpu=on_cpu)
    set_seed(recipe.seed)
    target = target or _load_target(recipe, accelerator)
    if recipe.shard_target:
        shard(target, accelerator)
    questions = exam(target, held_out, recipe.eval_prompts, recipe.eval_tokens) if len(held_out) else None
    return Trainer(recipe, target, source, questions, accelerator, on_event).run(start)


def _load_target(recipe: Recipe, accelerator: Accelerator) -> Target:
    if recipe.shard_target:  # it may be too large for one device
        return load_target(recipe.target, dtype=recipe.target_dtype, device_map="cpu")
    return load_target(recipe.target, dtype=recipe.target_dtype, device=accelerator.device)


def _source(given: Source | Sequence[Conversation] | None, paths: Sequence[str], root: str | None) -> Source:
    if given is None:
        return JsonLines(paths, root)
    return given if hasattr(given, "size") else Listed(given)


def _held_out(given: Source | Sequence[Conversation] | None, recipe: Recipe) -> Source:
    """What acceptance is measured on."""
    path = recipe.data.val
    if given is None and path and not Path(path).exists():
        raise UserError(f"There is no file {path} to measure acceptance on: name another, or none with data.val=null.")
    return _source(given, [path] if path else [], recipe.data.image_root)


def encode(recipe: Recipe) -> int:
    """Make the rows of `data.cache` without training, for runs that will share them; returns their number."""
    if not recipe.data.cache:
        raise UserError("The recipe keeps no encoded rows: say data.cache=FOLDER.")
    source = JsonLines(recipe.data.train, recipe.data.image_root)
    target = _load_target(recipe, make_accelerator(on_cpu=not torch.cuda.is_available()))
    return len(_kept(recipe.data.cache, source, Encoder(target, recipe.data.max_length), recipe.workers))


def _kept(folder: str, source: Source, encoder: Encoder, workers: int) -> Encoded:
    if not isinstance(source, JsonLines):
        raise UserError("data.cache keeps the rows of files; these conversations are in memory: leave it out.")
    return encoded(Path(folder), source, encoder, workers)


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
        self.accelerator, self.crew, self.output = accelerator, Crew(accelerator), Path(recipe.output)
        mixed = recipe.dtype == "mixed"
        weights = torch.float32 if mixed else getattr(torch, recipe.dtype)
        self.drafter = make_drafter(recipe.drafter, target).to(target.device, weights)
        if self.drafter.d2t is not None:
            self.drafter.d2t.copy_(commonest(source, target, len(self.drafter.d2t)).tokens)
        dtype = target.dtype if mixed else weights
        self.student_dtype = dtype
        student = Student(self.drafter, dtype, recipe.unroll, recipe.feature_noise)
        optimizer = _optimizer(self.drafter, recipe.optimiser)
        self.student, self.optimizer = accelerator.prepare(student, optimizer)
        self.average = Average(self.drafter, recipe.ema) if recipe.ema else None
        self.forward = torch.compile(self.student) if recipe.compile else self.student
        sizes = [source.size(index) for index in range(len(source))]
        self.order = Order(sizes, recipe.batch_size, recipe.seed, self.crew.rank, self.crew.size)
        self.passes = recipe.accumulation * self.crew.size
        self.progress = Progress(processes=self.crew.size)
        self.refused: Counter[str] = Counter()
        self.listeners: list[Listener] = [on_event] if on_event and accelerator.is_main_process else []
        self._tally = _Tally()
        self._since = time.monotonic()
        self._saved = self._measured = -1
        self._barren = 0  # passes without an answer position, in a row
        self._figures: dict[str, Any] = {}

    def run(self, start: Path | None) -> Path:
        """Train to the end of the recipe, from a checkpoint or from the beginning."""
        recipe, main = self.recipe, self.accelerator.is_main_process
        if start is not None:
            self._resume(start)
        self.order.start = self.progress.position // self.crew.size
        encoder = Encoder(self.target, recipe.data.max_length)
        read = self._reader(encoder)
        pin = self.target.device.type == "cuda"
        with ExitStack() as stack:
            if main:
                self.output.mkdir(parents=True, exist_ok=True)
                checkpoint.tidy(self.output)
                checkpoint.drop_after(self.output, self.progress.step)
                (self.output / "recipe.yaml").write_text(recipe.to_yaml())
                if checkpoint.made_at(self.output / "best") > self.progress.step:
                    self.progress.best = 0.0  # of a branch that is abandoned: the next that is measured takes its place
                self.listeners += [Log(self.output / "log.jsonl", self.progress.step), stack.enter_context(Bar())]
            batches = stack.enter_context(stream(read, encoder, self.order, recipe.workers, pin=pin))
            self._tell("start", conversations=len(self.source), batches_per_epoch=self.order.batches, **_versions())
            self._since = time.monotonic()
            while self._done() < 1:
                if self._update(batches):
                    self._after_update()
            self._measure()
            self._save()
            folder = self._save_drafter("last")
            self._tell("end", seconds=round(self.progress.seconds, 3))
        self.crew.wait()
        return self.output / "best" if self.exam and (self.output / "best").exists() else folder

    def _reader(self, encoder: Encoder) -> Reader:
        """Where encoded rows come from; if they are to be kept, the main process makes what is not there."""
        folder = self.recipe.data.cache
        with self.crew.first_alone():
            return _kept(folder, self.source, encoder, self.recipe.workers) if folder else encoder.fresh(self.source)

    # One update

    def _update(self, batches: Iterator[Batch]) -> bool:
        """Learn from the mean over all answer positions of all passes of all processes; False if there were none."""
        recipe, accelerator = self.recipe, self.accelerator
        rate = self._set_rate()
        self.drafter.anneal(self._done())
        seen = Counter(positions=0, rows=0, refused=0)
        try:
            for part in range(recipe.accumulation):
                last = part == recipe.accumulation - 1
                batch = self._next(batches, seen)
                with nullcontext() if last else accelerator.no_sync(self.student):
                    losses = self._losses(batch, self._draw(part))
                    accelerator.backward(losses.total * batch.positions + self._touch())
                self._tally.add(losses, batch.positions)
            positions = self._agree(seen)
            if positions:
                self._scale_gradients(self.crew.size / positions)  # the sum of means of processes -> the mean
                norm = accelerator.clip_grad_norm_(self.student.parameters(), recipe.optimiser.clip or math.inf)
                self.optimizer.step()
            self.optimizer.zero_grad()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"The GPU ran out of memory at step {self.progress.step + 1} with {recipe.batch_size} conversations a "
                "pass: lower batch_size (and raise accumulation by the same factor), chunk or data.max_length."
            ) from error
        if not positions:
            return False
        self._tally.add_update(norm, rate)
        self.progress.step += 1
        if self.average:
            self.average.follow(self.progress.step)
        return True

    def _next(self, batches: Iterator[Batch], seen: Counter[str]) -> Batch:
        """The next batch, counted into `seen`."""
        batch = next(batches)
        seen.update(positions=batch.positions, rows=len(batch) if batch.positions else 0, refused=len(batch.refused))
        self.refused.update(batch.refused)
        return batch

    def _draw(self, part: int) -> int:
        """A number of this pass alone, by which all that is random in it is drawn, also in a resumed run."""
        number = self.recipe.seed * 1_000_003 + self.progress.position + part * self.crew.size + self.crew.rank
        torch.manual_seed(number)
        return number

    def _agree(self, seen: Counter[str]) -> int:
        """Bring the progress up to date on all processes, with the main one's clock; returns all answer positions."""
        now = time.monotonic()
        mine = now - self._since if self.accelerator.is_main_process else 0.0
        self._since = now
        positions, rows, refused, seconds = self.crew.total(seen["positions"], seen["rows"], seen["refused"], mine)
        self.progress.position += self.passes
        self.progress.rows += int(rows)
        self.progress.seconds += seconds
        if refused and not self.progress.refused:
            first = self.crew.first(next(iter(self.refused), None))
            self._tell("warning", message=f"Some conversations are refused; the first: {first}")
        self.progress.refused += int(refused)
        self._barren = 0 if positions else self._barren + self.passes
        if self._barren >= self.order.batches:
            first = self.crew.first(next(iter(self.refused), None))
            raise UserError(f"None of the {len(self.source)} conversations can be used. The first: {first}")
        return int(positions)

    def _touch(self) -> Tensor:
        """0, with a gradient of 0 for every weight: also for one that a pass did not use, which DDP would wait for."""
        return 0.0 * torch.stack([weight.sum() for weight in self.drafter.parameters()]).sum()

    def _scale_gradients(self, scale: float) -> None:
        for weight in self.drafter.parameters():
            if weight.grad is not None:
                weight.grad.mul_(scale)

    def _losses(self, batch: Batch, draw: int) -> Losses:
        recipe = self.recipe
        lesson = distil(self.forward, self.target, batch, draw)
        return lesson_losses(lesson, self.target.logits, recipe.objective, recipe.unroll, recipe.chunk)

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
        updates = recipe.steps or math.ceil((recipe.epochs or 0) * self.order.batches / self.passes)
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
        epoch = self.progress.position / self.order.batches
        self._tell("step", epoch=round(epoch, 4), done=self._done(), refused=self.progress.refused, **figures)

    def _measure(self) -> None:
        """Acceptance length by real decoding; the best drafter so far is kept. The main process does it alone.

        Only a sharded target needs everybody: each layer is gathered from all, so all decode the same in step.
        """
        if self.exam is None or self._measured == self.progress.step:
            return
        self._measured = self.progress.step
        if self.accelerator.is_main_process or self.recipe.shard_target:
            self._figures = self.exam.measure(self._taught())
            self._tell("eval", **self._figures)
            if self._figures["mean_acceptance_length"] >= self.progress.best:
                self.progress.best = self._figures["mean_acceptance_length"]
                self._save_drafter("best")
        self.crew.wait()

    def _taught(self) -> TrainedDrafter:
        """What is measured and kept."""
        return self.average.module() if self.average else self.drafter

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
            self.average.state if self.average else None,
        )
        self._tell("checkpoint", path=str(folder))

    def _save_drafter(self, name: str) -> Path:
        if self.accelerator.is_main_process:
            decodes = copy.deepcopy(self._taught()).to(self.student_dtype)  # what rounding loses, decoding never sees
            with whole(self.output / name, checkpoint.GO_ON) as partial:
                save_drafter(decodes, partial, self._card())
                checkpoint.sign(partial, self.progress.step)
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
        progress, made_with = checkpoint.about(folder)
        now = self.recipe.to_dict()
        made_with = read_recipe(made_with).to_dict()  # what was not known then has its default
        changed = [name for name in FIXED if made_with[name] != now[name]]
        if made_with["accumulation"] * progress.processes != self.passes:
            changed.append("accumulation x number of processes")
        if changed:
            raise UserError(
                f"{folder} was made with another {', '.join(changed)}: resume with the same, or start anew."
            )
        checkpoint.load(folder, self.drafter, self.optimizer, self.average.state if self.average else None)
        self.progress = replace(progress, processes=self.crew.size)
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
        self._positions = self._updates = 0
        self._rate, self._since = 0.0, time.monotonic()

    def add(self, losses: Losses, positions: int) -> None:
        """One pass."""
        self._names = ["loss", *losses.terms, "agreement"]
        means = torch.stack([losses.total.detach(), *losses.terms.values(), losses.agreement])
        self._sum = self._sum + means * positions
        self._positions += positions

    def add_update(self, norm: Tensor | None, rate: float) -> None:
        self._norm = self._norm + (0.0 if norm is None else norm.detach())
        self._rate, self._updates = rate, self._updates + 1

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over answer positions and updates; one host read. Starts anew."""
        sums = torch.as_tensor(self._sum)
        *sums, positions = accelerator.reduce(torch.cat([sums, sums.new_tensor([self._positions])]), "sum").tolist()
        mean = [value / positions for value in sums]
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
    found = {"python": platform.python_version()}
    for name in ("speculens", "torch", "transformers"):
        with suppress(PackageNotFoundError):  # this package may run from its sources
            found[name] = version(name)
    here = Path(__file__).parent
    try:  # asked for this folder, so that the repository around an installed copy does not answer
        git = ["git", "-C", str(here), "log", "-1", "--format=%H", "--", "."]
        asked = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 - fixed words
        commit = asked.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return found | ({"commit": commit} if commit else {})
