r"""What visual tokens cost each method: drafter's prefill, acceptance and speedup from 256 to 4,096 of them.

    python -m benchmarks.visual_tokens --target testbed/weights/qwen2_5_vl --how larger --widen --out runs/larger
    python -m benchmarks.visual_tokens --target testbed/weights/llava --how several --widen --out runs/several

larger   one picture scaled up, where the family's processor takes pictures of any size
several  more pictures of the same size before the one that is asked about

The testbed's targets have learnt from one picture of 256 tokens. Beyond that the prompts are unlike any that they know
and their text grows worse; it is still *their* text, which drafters must guess, and times do not depend on what is
said. Rotary positions are computed, not looked up, so a longer context than the config's is a matter of one number;
where a size needs that, the sweep raises it for all sizes and says so. Drafters' own limits are the same: none.
With --widen target and drafters have a 7B's shape and cost (`benchmarks.widen`; for a GPU), without it their own, whose
passes are so small that on a GPU their launches are all that is timed. Prefill is timed apart, the device waited for.
The last line is JSON.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.methods import PROMPTS, arguments, contenders, finish, measured, prompts_of, read
from speculens.bench.figures import POOLED
from speculens.bench.suites import Case, from_files
from speculens.data.respond import Asking
from speculens.drafters import Drafter
from speculens.errors import UserError
from speculens.targets import Prompt, Target

SIZES = (256, 512, 1024, 2048, 4096)
REPEATS = 5
TEXT_ROWS = 256  # room for the words of a question, beside its pictures


def main() -> None:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--how", choices=["larger", "several"], required=True)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="visual tokens of a prompt, about")
    parser.set_defaults(limit=12, max_new_tokens=128, closer=0)
    given = read(parser)
    target, drafters = contenders(given)
    own_context = target.context
    needed = max(given.sizes) + TEXT_ROWS + given.max_new_tokens
    target.text_config.max_position_embeddings = max(own_context, needed)
    if needed > own_context:
        print(f"The target's context is raised from {own_context} to {needed} rows for this sweep.")
    asking = Asking(temperature=0.0, max_new_tokens=given.max_new_tokens)
    found = []
    print(
        "| visual tokens | drafter | prefill: target ms | drafter ms | rows | length | speedup | decode alone | exact |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for size, cases in _sized(target, from_files(PROMPTS[:1]), given.limit, given.how, given.sizes):
        seconds = given.minutes * 60 / len(given.sizes)
        made = measured(target, drafters, cases, asking, given, seconds, f"{size}")
        prompt = prompts_of(target, cases[:1], asking)[0]
        prefills = {name: prefill_seconds(target, drafter, prompt) for name, drafter in drafters.items()}
        visual = made["drafters"]["none"][POOLED]["num_visual_tokens"] / made["questions"]
        for name in drafters:
            line = made["drafters"][name][POOLED]
            print(_row(visual, name, line, *prefills[name]), flush=True)
        found.append({"size": size, "visual_tokens": visual, "prefill_seconds": prefills, **made})
    about = {"how": given.how, "widened": given.widen, "own_context": own_context, "context": target.context}
    finish(given, {**about, "sweep": found})


def _sized(
    target: Target, cases: Sequence[Case], limit: int, how: str, sizes: Sequence[int]
) -> Iterator[tuple[int, list[Case]]]:
    """For each number of visual tokens the cases that have about so many."""
    for size in sizes:
        if how == "larger":
            _scale(target, cases[0], size)
            yield size, list(cases[:limit])
        else:
            count = max(1, round(size / _visual(target, cases[0])))
            yield size, [_crowded(cases, number, count) for number in range(min(limit, len(cases)))]


def _scale(target: Target, case: Case, size: int) -> None:
    """Let the processor scale every picture to about `size` visual tokens."""
    images = target.processor.image_processor
    if "longest_edge" not in images.size or "shortest_edge" not in images.size:
        raise UserError(f"The pictures of a {target.family} target have one size: use --how several.")
    pixels = round(images.size["longest_edge"] * size / _visual(target, case))
    # Sides are rounded to whole tokens, so there must be room between least and most.
    images.size = type(images.size)(shortest_edge=round(0.85 * pixels), longest_edge=pixels)


def _visual(target: Target, case: Case) -> int:
    return int(target.encode(case.conversation()).image.sum())


def _crowded(cases: Sequence[Case], number: int, count: int) -> Case:
    """A case with the pictures of the count - 1 next ones before its own."""
    case, pictures = cases[number], []
    for step in range(count - 1, 0, -1):
        pictures += _pictures(cases[(number + step) % len(cases)])
    asked, *_ = case.row["messages"]
    content = [*pictures, *asked["content"]]
    return replace(case, row={**case.row, "messages": [{**asked, "content": content}]})


def _pictures(case: Case) -> list[Any]:
    return [part for part in case.row["messages"][0]["content"] if part["type"] == "image"]


def prefill_seconds(target: Target, drafter: Drafter, prompt: Prompt) -> tuple[float, float]:
    """Medians of the target's prefill and of the drafter's, each alone with the device."""
    teacher = target.session(1, len(prompt))
    session = drafter.session(target, 1, len(prompt) + 1)
    own, mine = [], []
    for _ in range(REPEATS + 1):  # the first warms up
        begun = _now(target)
        logits, features = teacher.prefill(prompt)
        own.append(_now(target) - begun)
        first = logits[0, -1].argmax()[None]
        begun = _now(target)
        session.begin(features, first)
        mine.append(_now(target) - begun)
        teacher.free(0)
        session.free(0)
    return statistics.median(own[1:]), statistics.median(mine[1:])


def _now(target: Target) -> float:
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    return time.perf_counter()


def _row(visual: float, name: str, line: dict[str, Any], own: float, mine: float) -> str:
    cells = [
        f"{visual:.0f}",
        name,
        f"{1e3 * own:.1f}",
        f"{1e3 * mine:.2f}",
        f"{line['drafter_prefill_ratio']:.1%}",
        f"{line['mean_acceptance_length']:.2f} / {line['mean_accepted_tokens']:.2f}",
        f"{line['walltime_speedup']:.2f}",
        f"{line['decode_speedup']:.2f}",
        f"{line['exact']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
