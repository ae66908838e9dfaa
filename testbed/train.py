"""Train one testbed model from scratch on one GPU, inside a wall-clock budget, in one run or several.

    python -m testbed.train --family llava --minutes 9 --total-minutes 18 --out DIR [--packs DIR]
    python -m testbed.train --family llava --minutes 9 --final --resume DIR --out DIR [--packs DIR]

The learning rate follows the seconds trained: warm-up, constant, then linear to zero over the last 45 %. A `--final`
run spreads the rest of the schedule over its own time, so a slow or shortened one still ends at zero.

In `--out`: `state.pt` (fp32 weights, optimisers, counters; replaced whole every 75 s), `tokenizer.json`,
`checkpoint/` (bf16, loads with the Auto classes) and `log.jsonl`. `--resume` takes such a folder, or a checkpoint
alone (then the optimisers start anew).
"""

import argparse
import json
import math
import os
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers.utils import logging

from testbed import feed, models, optim, tokenizer
from testbed.evaluate import evaluate
from testbed.forward import Forward, forward_of

SAVE_EVERY, EXPORT_EVERY, LOG_EVERY = 75.0, 180.0, 4.0  # seconds
WARM_UP, DECAY = 20.0, 0.45  # seconds; share of the whole schedule
LEFT_OVER = 12.0  # seconds kept for the last save and export


@dataclass
class Progress:
    """Counters that survive a call. `fresh`: seconds trained when the optimisers were new."""

    seconds: float = 0.0
    steps: int = 0
    pictures: int = 0
    runs: int = 0
    fresh: float = 0.0


@dataclass
class Tally:
    """Sums since the last line of the log, kept on the device."""

    sums: Tensor  # (sources, 3): loss, right tokens, tokens
    pictures: int = 0
    steps: int = 0
    since: float = field(default_factory=time.monotonic)


class Trainer:
    """Model, optimisers and counters of one training."""

    def __init__(self, options: argparse.Namespace, core: Tokenizer, progress: Progress, device: str) -> None:
        self.options, self.core, self.progress, self.device = options, core, progress, device
        shape = models.TINY if options.tiny else models.FULL
        torch.manual_seed(0)
        self.model = models.initialise(models.build(options.family, shape)).to(device)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        before = len(feed.Writer(options.family, core).before)
        self.forward: Forward = forward_of(self.model, before, dtype, options.compile)
        self.optimizers = self._optimizers()
        self.tally = self.new_tally()

    def step(self, batch: list[feed.Piece], pace: float) -> None:
        """One update from a batch; `pace` scales the learning rates."""
        total = sum(len(piece.targets) for piece in batch)
        for piece in batch:
            loss, right = self.loss(piece)
            (loss / total).backward()
            sums = self.tally.sums[feed.SOURCES.index(piece.source)]
            sums += torch.stack([loss.detach(), right, torch.full_like(right, len(piece.targets))])
            self.tally.pictures += 0 if piece.pixels is None else len(piece.pixels)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * pace
            optimizer.step()
            optimizer.zero_grad()
        self.tally.steps += 1
        self.progress.steps += 1

    def loss(self, piece: feed.Piece) -> tuple[Tensor, Tensor]:
        """Summed cross entropy of a piece's targets, and how many of them come first."""
        pixels = None if piece.pixels is None else piece.pixels.to(self.device, non_blocking=True)
        ids = piece.ids.to(self.device, non_blocking=True).long()
        targets = piece.targets.to(self.device, non_blocking=True).long()
        hidden = self.forward.hidden(pixels, ids).flatten(0, 1)
        logits = self.forward.logits(hidden.index_select(0, targets - 1)).float()
        wanted = ids.flatten()[targets]
        return F.cross_entropy(logits, wanted, reduction="sum"), (logits.argmax(-1) == wanted).sum().float()

    def check(self, rows: int) -> None:
        """Three steps at each picture size on noise, weights kept: compiles, and shows speed and memory early."""
        kept, steps = {name: value.clone() for name, value in self.model.state_dict().items()}, self.progress.steps
        sizes = ((models.SIDE, models.SIDE),) if self.options.family == "llava" else feed.draw.SIZES
        for width, height in sizes:
            for length in (384, 512):
                for _ in range(3):
                    began = time.monotonic()
                    self.step([_noise(rows, height, width, length)], 0.1)
                    loss = self.tally.sums.sum().item()
                    took = time.monotonic() - began
                if not math.isfinite(loss):
                    raise RuntimeError(f"check: the loss is {loss} at {width} x {height}")
                memory = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else 0
                say(f"check {self.options.family} {width}x{height} n={length}: {rows / took:.0f} pictures/s", memory)
        self.model.load_state_dict(kept)
        self.optimizers, self.tally, self.progress.steps = self._optimizers(), self.new_tally(), steps

    def log(self) -> dict[str, Any]:
        """One line of the log; starts a new tally."""
        sums = dict(zip(feed.SOURCES, self.tally.sums.tolist(), strict=True))
        took = time.monotonic() - self.tally.since
        self.progress.pictures += self.tally.pictures
        line: dict[str, Any] = {
            "step": self.progress.steps,
            "pictures": self.progress.pictures,
            "seconds": round(self.progress.seconds, 1),
            "pictures_s": round(self.tally.pictures / took),
            "steps_s": round(self.tally.steps / took, 2),
            "lr": [round(optimizer.param_groups[0]["lr"], 7) for optimizer in self.optimizers],
        }
        for source, (loss, right, tokens) in sums.items():
            if tokens:  # mean loss, and how many tokens come first
                line[source] = [round(loss / tokens, 4), round(right / tokens, 4)]
        self.tally = self.new_tally()
        if not all(math.isfinite(loss) for loss, _, _ in sums.values()):
            raise RuntimeError(f"the loss is not finite at step {self.progress.steps}")
        return line

    def save(self, path: Path) -> None:
        """Replace the state file whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def restore(self, folder: Path) -> None:
        """Go on from a state, or from the weights of a checkpoint with new optimisers."""
        if (folder / "state.pt").exists():
            state = torch.load(folder / "state.pt", map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                peaks = [group["peak"] for group in optimizer.param_groups]  # this call's, not the last one's
                optimizer.load_state_dict(kept)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["peak"] = peak
        else:
            self.model.load_state_dict(models.load(folder, torch.float32).state_dict())
            self.progress.fresh = self.progress.seconds

    def export(self, folder: Path) -> None:
        """Write the bf16 checkpoint, and how far it has come."""
        models.save(self.model, models.processor(self.options.family, self.core), folder)
        (folder / "progress.json").write_text(json.dumps(asdict(self.progress)))

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        options = self.options
        made = optim.optimizers(self.model, options.optimizer, options.lr, options.matrix_lr)
        for optimizer in made:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        return made

    def new_tally(self) -> Tally:
        """Empty sums."""
        return Tally(torch.zeros(len(feed.SOURCES), 3, device=self.device))


def pace(progress: Progress, whole: float) -> float:
    """The share of the peak learning rate after `progress.seconds` of `whole`."""
    up = (progress.seconds - progress.fresh + 0.5) / WARM_UP
    down = (whole - progress.seconds) / (DECAY * whole)
    return max(0.0, min(1.0, up, down))


def run(options: argparse.Namespace, began: float) -> None:
    """One call, start to end."""
    out, end = options.out, began + options.minutes * 60 - LEFT_OVER - (options.seconds if options.count else 0)
    out.mkdir(parents=True, exist_ok=True)
    progress = _progress(options.resume)
    core = _tokenizer(options)
    core.save(str(out / "tokenizer.json"))
    mixture = feed.Mixture(options.batch, options.pieces, hard=options.hard)
    source = feed.Feed(options.family, core, options.packs, mixture, progress.runs)
    device = options.device
    batches = iter(feed.loader(source, options.workers, device == "cuda"))  # forks before CUDA starts
    say(f"{options.family}: {len(source.real)} real rows, {len(source.prose)} prose tokens")
    trainer = Trainer(options, core, progress, device)
    progress.runs += 1
    if options.check:
        trainer.check(mixture.rows)
        (out / "checked").touch()
    if options.resume:
        trainer.restore(options.resume)
    with (out / "log.jsonl").open("a", buffering=1) as log:
        _train(trainer, batches, log, end)
        trainer.save(out / "state.pt")
        trainer.export(out / "checkpoint")
        if options.count:
            result = evaluate(out / "checkpoint", options.count, device, 128, options.seconds)
            print(json.dumps({"step": progress.steps, "evaluation": result}), file=log)
            say(json.dumps(result))


def _train(trainer: Trainer, batches: Iterator[list[feed.Piece]], log: Any, end: float) -> None:
    options, progress = trainer.options, trainer.progress
    began, before = time.monotonic(), progress.seconds
    whole = before + end - began if options.final else options.total_minutes * 60
    saved = exported = logged = began
    trainer.tally = trainer.new_tally()
    while (now := time.monotonic()) < end and progress.seconds < whole and progress.steps < options.steps:
        progress.seconds = before + now - began
        trainer.step(next(batches), pace(progress, whole))
        if now - logged > LOG_EVERY:
            _note(trainer, log)
            logged = now
        if now - saved > SAVE_EVERY:
            trainer.save(options.out / "state.pt")
            saved = now
        if now - exported > EXPORT_EVERY:
            trainer.export(options.out / "checkpoint")
            exported = now
    if trainer.tally.steps:
        _note(trainer, log)


def _note(trainer: Trainer, log: Any) -> None:
    line = json.dumps(trainer.log())
    print(line, file=log)
    say(line)


def _progress(folder: Path | None) -> Progress:
    if folder is None:
        return Progress()
    state = folder / "state.pt"
    if state.exists():
        return Progress(**torch.load(state, map_location="cpu", weights_only=True)["progress"])
    return Progress(**json.loads((folder / "progress.json").read_text()))


def _tokenizer(options: argparse.Namespace) -> Tokenizer:
    for folder in (options.resume, options.out):
        if folder and (folder / "tokenizer.json").exists():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.build(folder=options.packs, specials=models.FAMILIES[options.family].specials)


def _noise(rows: int, height: int, width: int, length: int) -> feed.Piece:
    pixels = torch.randint(256, (rows, height, width, 3), dtype=torch.uint8)
    ids = torch.randint(8, models.VOCAB_SIZE, (rows, length), dtype=torch.int16)
    targets = torch.arange(300, length) + torch.arange(rows)[:, None] * length
    return feed.Piece("drawn", pixels, ids, targets.flatten().int())


def say(text: str, memory: float = 0.0) -> None:
    """One line of output at once, with the GPU memory (GiB) if given."""
    print(f"{text}, {memory:.1f} GiB" if memory else text, flush=True)


def main() -> None:
    """The command line."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--family", choices=sorted(models.FAMILIES), required=True)
    add("--out", type=Path, required=True)
    add("--packs", type=Path, help="folder of real packs and prose")
    add("--resume", type=Path, help="folder to go on from")
    add("--minutes", type=float, default=9.0, help="of this call, all included")
    add("--total-minutes", type=float, default=18.0, help="of training, all calls together")
    add("--final", action="store_true", help="end the schedule with this call")
    add("--steps", type=int, default=10**9, help="stop after so many updates in all")
    add("--workers", type=int, default=14)
    add("--batch", type=int, default=512, help="sequences an update")
    add("--pieces", type=int, default=4, help="parts of a batch, each padded on its own")
    add("--hard", type=float, default=0.0, help="share of drawn pictures of the kinds that lag behind")
    add("--optimizer", choices=("muon", "adamw"), default="muon")
    add("--lr", type=float, default=1e-3, help="peak, AdamW")
    add("--matrix-lr", type=float, default=4e-3, help="peak, Muon")
    add("--count", type=int, default=256, help="held-out charts to answer at the end")
    add("--seconds", type=float, default=40.0, help="at most, for those")
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.version.cuda is not None)
    add("--check", action=argparse.BooleanOptionalAction, default=True, help="try every shape first")
    add("--tiny", action="store_true", help="two layers, for a dry run")
    add("--device", default="cuda" if torch.version.cuda else "cpu")
    options = parser.parse_args()

    watch = threading.Timer(options.minutes * 60 + 15, os._exit, (4,))  # a hung call must not outlive its budget
    watch.daemon = True
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch._dynamo.config.recompile_limit = 64  # noqa: SLF001
    logging.disable_progress_bar()
    watch.start()
    run(options, began)
    os._exit(0)


if __name__ == "__main__":
    main()
