r"""The methods side by side on one target, greedy and sampled; or the acceptance of every drafter in a folder.

    python -m benchmarks.methods --target testbed/weights/llava --minutes 8 --out runs/methods-llava
    python -m benchmarks.methods --target testbed/weights/llava --ablations runs/ablations --minutes 3

Drafters are those beside the target (TARGET-METHOD) unless named. The measurement is that of `speculens bench`: all of
them beside `none` in one process, on held-out prompts taken from the files in turn. It ends in time and tells what it
has; `speculens report` makes a page of each folder in --out. With --widen all of them have a 7B's shape and cost. With
--ablations no time is measured: all prompts are decoded side by side, greedily, by every drafter of that folder whose
name begins with the target's (TARGET-NAME, or TARGET-NAME/STEP, of which the last).
Prints rows for docs/benchmarks.md; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from benchmarks import memory
from benchmarks.prompts import HELDOUT
from benchmarks.widen import SEVEN_B, widen_drafter, widen_target
from speculens import Engine, Sampling, TreeShape, load_drafter, load_target
from speculens.bench.figures import POOLED, conclude
from speculens.bench.measure import CLOSER, Bench, Progress
from speculens.bench.record import NONE, RunFolder
from speculens.bench.suites import Case, from_files
from speculens.data.respond import Asking
from speculens.drafters import METHODS, Drafter, TrainedDrafter
from speculens.errors import UserError
from speculens.targets import Prompt, Target
from speculens.training.measure import Exam

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [HELDOUT / "charts.jsonl", HELDOUT / "openstax.jsonl"]
TINY = {"limit": 1, "max_new_tokens": 12, "tree": (2, 3, 9)}


class _OutOfTimeError(Exception):
    """Ends a measurement between two cases."""


def main() -> None:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--prompts", nargs="+", type=Path, default=PROMPTS, help="files in the data format")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--ablations", type=Path, help="folder of drafter folders, TARGET-NAME each")
    given = read(parser)
    target, drafters = contenders(given)
    cases = {file.stem: from_files([file])[: given.limit] for file in given.prompts}
    if given.ablations:
        figures = ablations(target, given, cases)
    else:
        mixed = from_files(given.prompts)[: given.limit]
        share = given.minutes * 60 / len(given.temperatures)
        runs = {}
        for temperature in given.temperatures:
            asking = Asking(temperature=temperature, max_new_tokens=given.max_new_tokens)
            made = measured(target, drafters, mixed, asking, given, share, f"T={temperature:g}")
            print(f"\nT = {temperature:g}, {made['questions']} prompts\n\n{table(made)}", flush=True)
            runs[f"{temperature:g}"] = made
        figures = {"temperatures": runs}
    finish(given, figures)


def arguments(about: str | None) -> argparse.ArgumentParser:
    """What all comparisons of methods take."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", nargs="+", help="drafters instead of those beside the target")
    parser.add_argument("--limit", type=int, default=63, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--tree", nargs="+", metavar="STEPS TOPK NODES", help="not the drafters' own; auto: sized at each step"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for the measurement; loading comes on top")
    parser.add_argument("--widen", action="store_true", help="at a 7B's cost, on a GPU (benchmarks.widen)")
    parser.add_argument("--int8", action="store_true", help="drafters hold their matrices in 8 bits")
    parser.add_argument("--random", action="store_true", help="drafters of random weights, which never pay")
    parser.add_argument("--closer", type=int, default=CLOSER, help="prompts decoded once more, to see where time goes")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="new folder for the records and figures.json")
    parser.add_argument("--tiny", action="store_true", help="a dry run: few prompts, few tokens, a small tree")
    return parser


def read(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments as they are meant: a dry run is small."""
    given = parser.parse_args()
    if given.tiny:
        vars(given).update(TINY)
    if given.tree:
        given.tree = "auto" if given.tree == ["auto"] else TreeShape(*map(int, given.tree))
    return given


def contenders(given: argparse.Namespace) -> tuple[Target, dict[str, Drafter]]:
    """The target and its drafters, in their own shape or in a 7B's."""
    target = load_target(given.target, device=given.device, dtype=given.dtype)
    drafters = loaded(target, given.drafter or beside(given.target), int8=False)
    if given.widen:
        target = widen_target(target, SEVEN_B[target.family], device=target.device, dtype=target.dtype)
        drafters = {name: widen_drafter(drafter, target) for name, drafter in drafters.items()}
    for drafter in drafters.values():
        if isinstance(drafter, TrainedDrafter):
            if given.random:
                forget(drafter)
            if given.int8:
                drafter.press()
    return target, drafters


@torch.no_grad()
def forget(drafter: TrainedDrafter) -> None:
    """Matrices of random numbers instead: what it guesses is never right."""
    torch.manual_seed(0)
    for weight in drafter.parameters():
        if weight.ndim > 1:
            weight.normal_(std=0.05)


def beside(target: str) -> list[str]:
    """The drafters beside a target's folder, in the order of METHODS, and lookup."""
    found = [f"{Path(target)}-{method}" for method in METHODS if Path(f"{target}-{method}").is_dir()]
    return [*found, "lookup"]


def loaded(target: Target, names: Sequence[str], *, int8: bool | None = None) -> dict[str, Drafter]:
    """Drafters by the last part of their names, ready for the target; int8 as `load_drafter` takes it."""
    ready = {"target": target, "dtype": target.dtype, "device": target.device, "int8": int8}
    return {Path(name).name: load_drafter(name, **ready) for name in names}


def measured(
    target: Target,
    drafters: Mapping[str, Drafter],
    cases: Sequence[Case],
    asking: Asking,
    given: argparse.Namespace,
    seconds: float,
    name: str,
) -> dict[str, Any]:
    """The figures of as many cases as fit into the time, at least one; where the time goes included."""
    begun, done = time.monotonic(), 0

    def watch(progress: Progress) -> None:
        nonlocal done
        done = progress.done
        spent = time.monotonic() - begun
        # The closer look decodes some of the cases once more.
        if done and spent * (1 + min(done, given.closer) / done) > seconds:
            raise _OutOfTimeError

    shapes = dict.fromkeys(drafters, given.tree) if given.tree else {}
    bench = Bench(target, drafters, cases, asking, shapes=shapes, closer=given.closer)
    with TemporaryDirectory() as scratch:
        folder = RunFolder((given.out or Path(scratch)) / name, bench.setting(target=given.target, suite=name))
        with suppress(_OutOfTimeError):
            bench.run(folder, watch)
        if given.closer and not folder.has("closer"):
            Bench(target, drafters, cases[:done], asking, shapes=shapes, closer=given.closer).run(folder)
        made = conclude(folder, bench.errors)
    longest = max(prompts_of(target, cases[:done], asking), key=len)
    sampling = Sampling(max_new_tokens=asking.max_new_tokens)

    def answer(drafter: Drafter | None) -> None:
        engine = Engine(target, drafter, capacity=len(longest) + sampling.max_new_tokens, shape=given.tree)
        engine.generate(longest, sampling)

    # Beside the others, as in the measurement, every engine's cache would count for each of them.
    for each in (NONE, *drafters):
        others = [drafter for other, drafter in drafters.items() if other != each]
        most = memory.peak(target.device, others, partial(answer, drafters.get(each)))
        made["drafters"][each]["peak_memory_alone"] = most
    return made


def prompts_of(target: Target, cases: Sequence[Case], asking: Asking) -> list[Prompt]:
    """The first question of each case that can be asked."""
    prompts = []
    for case in cases:
        with suppress(UserError):
            before, (question, *_) = asking.questions(case.name, case.conversation(), case.given)
            prompts.append(target.encode(before.then(question.role, *question.content)))
    return prompts


def ablations(target: Target, given: argparse.Namespace, cases: Mapping[str, Sequence[Case]]) -> dict[str, Any]:
    """Acceptance of every drafter of a folder, by file of prompts."""
    deadline = time.monotonic() + given.minutes * 60
    asking = Asking(temperature=0.0, max_new_tokens=given.max_new_tokens)
    exams = {
        topic: Exam(target, prompts, given.max_new_tokens)
        for topic, mine in cases.items()
        if (prompts := prompts_of(target, mine, asking))
    }
    print("| drafter | " + " | ".join(f"{topic}: length with / without, exact" for topic in exams) + " | claim |")
    print("|---|" + "---|" * (len(exams) + 1))
    planned = yaml.safe_load((ROOT / "recipes/testbed/runs.yaml").read_text())
    plan = {**planned["shipped"], **planned["ablations"]}
    found: dict[str, Any] = {}
    left_out = []
    for name, folder in _in_plan(Path(given.target).name, given.ablations, plan):
        if time.monotonic() > deadline and found:
            left_out.append(name)
            continue
        drafter = load_drafter(folder, target=target, dtype=target.dtype, device=target.device)
        found[name] = {topic: exam.measure(drafter, given.tree) for topic, exam in exams.items()}
        cells = [f"{_lengths(figures)}, {figures['exact']:.3f}" for figures in found[name].values()]
        print(f"| {name} | {' | '.join(cells)} | {plan.get(name, {}).get('claim', '')} |", flush=True)
    setting = Bench(target, {}, [], asking).setting(target=given.target)
    return {"setting": setting, "ablations": found, "left_out": left_out}


def _in_plan(target: str, folder: Path, plan: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """The drafters for a target by their names, in the order of the plan, others last."""
    order = {name: place for place, name in enumerate(plan)}
    begin = f"{target}-"
    found = {one.name.removeprefix(begin): _newest(one) for one in folder.glob(f"{begin}*")}
    for name in sorted(found, key=lambda name: (order.get(name, len(order)), name)):
        if drafter := found[name]:
            yield name, drafter


def _newest(folder: Path) -> Path | None:
    """A drafter's own folder, or that of the last step where `testbed.deliver` gave each step one."""
    steps = sorted((one for one in folder.glob("*") if one.name.isdigit()), key=lambda one: int(one.name))
    return next((one for one in (folder, *reversed(steps)) if (one / "config.json").is_file()), None)


def table(made: Mapping[str, Any]) -> str:
    """The figures of a measurement as rows of Markdown."""
    head = (
        "| drafter | speedup end to end | decode alone | median (quartiles) | length with / without bonus | "
        "drafter's prefill | draft time | peak memory | exact |"
    )
    return "\n".join([head, "|---|" + "---|" * 8, *(_row(name, line) for name, line in made["drafters"].items())])


def _row(name: str, line: Mapping[str, Any]) -> str:
    pooled = line[POOLED]
    low, high = pooled["walltime_speedup_quartiles"]
    memory, drafting = line.get("peak_memory_alone"), pooled.get("draft_time_fraction")
    cells = [
        name,
        f"{pooled['walltime_speedup']:.2f}",
        f"{pooled['decode_speedup']:.2f}",
        f"{pooled['walltime_speedup_median']:.2f} ({low:.2f}-{high:.2f})",
        _lengths(pooled),
        f"{pooled['drafter_prefill_ratio']:.1%}",
        "" if drafting is None else f"{drafting:.0%}",
        f"{memory / 2**20:,.0f} MiB" if memory else "",
        f"{pooled['exact']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def _lengths(figures: Mapping[str, Any]) -> str:
    return f"{figures['mean_acceptance_length']:.2f} / {figures['mean_accepted_tokens']:.2f}"


def finish(given: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    """The last line, and the file."""
    text = json.dumps(figures)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
