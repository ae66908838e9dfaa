r"""Speedup of drafters over plain decoding with the same engine: alternating pairs, medians, exactness in the same run.

    python benchmarks/speedup.py --target testbed/weights/llava --drafter testbed/weights/llava-eaglevlm lookup \
        --prompts testbed/heldout/charts.jsonl testbed/heldout/openstax.jsonl --limit 40

Every prompt is decoded by `none` and by each drafter in turn, the order turning round from prompt to prompt. What
bounds the figure: a step costs one drafter pass per tree level and one target pass over all nodes, so the speedup is
the acceptance length times the cost of a plain step over that of a drafted one. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from speculens import Conversation, Engine, Sampling, TreeShape, load_drafter, load_target
from speculens.answer import Answer, Entry, ask, warm_up
from speculens.data.sources import JsonLines
from speculens.targets import Prompt, Target

NONE = "none"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", nargs="+", required=True)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True, help="files in the data format")
    parser.add_argument("--limit", type=int, default=40, help="prompts, taken from the files in turn")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--tree",
        nargs="+",
        metavar="STEPS TOPK NODES",
        help="instead of the drafters' own; or auto: sized step by step",
    )
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    given = parser.parse_args()
    target = load_target(given.target, device=given.device, dtype=given.dtype)
    prompts = [target.encode(question) for question in _questions(given.prompts, given.limit)]
    sampling = Sampling(temperature=given.temperature, max_new_tokens=given.max_new_tokens)
    shape = _tree(given.tree)
    answers = _measure(target, [NONE, *given.drafter], prompts, sampling, shape)
    entries = [Entry(name, answers[name], answers[NONE]) for name in answers]
    figures = {"setting": _setting(given, target, len(prompts)), "drafters": [_figures(entry) for entry in entries]}
    for line in figures["drafters"]:
        print(_row(line))
    print(json.dumps(figures))
    if given.out:
        given.out.write_text(json.dumps(figures, indent=1) + "\n")


def _tree(words: Sequence[str] | None) -> TreeShape | Literal["auto"] | None:
    if words == ["auto"]:
        return "auto"
    return TreeShape(*map(int, words)) if words else None


def _questions(files: Sequence[Path], limit: int) -> list[Conversation]:
    sources = [JsonLines([str(file)]) for file in files]
    longest = max(len(source) for source in sources)
    mixed = chain.from_iterable([source[i] for source in sources if i < len(source)] for i in range(longest))
    return [Conversation(row.messages[:1]) for row in list(mixed)[:limit]]


def _measure(
    target: Target,
    names: Sequence[str],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    shape: TreeShape | Literal["auto"] | None,
) -> dict[str, list[Answer]]:
    capacity = max(map(len, prompts)) + sampling.max_new_tokens
    drafters = {name: load_drafter(name, dtype=target.dtype, device=target.device) for name in names}
    engines = {name: Engine(target, drafter, capacity=capacity, shape=shape) for name, drafter in drafters.items()}
    warm_up(engines.values(), prompts[0], sampling)
    answers: dict[str, list[Answer]] = {name: [] for name in names}
    for number, prompt in enumerate(prompts):
        for name in names if number % 2 else reversed(names):
            answers[name].append(ask(engines[name], prompt, sampling))
    return answers


def _figures(entry: Entry) -> dict[str, Any]:
    ratios = sorted(own.seconds / mine.seconds for mine, own in zip(entry.answers, entry.own, strict=True))
    quarter = len(ratios) // 4
    steps = entry.stats
    return entry.to_dict() | {
        "median_speedup": statistics.median(ratios),
        "quartiles": [ratios[quarter], ratios[-1 - quarter]],
        "milliseconds_a_pass": {
            part: 1e3 * seconds / (steps.num_drafts if part != "prefill" else len(ratios))
            for part, seconds in steps.seconds.items()
        },
    }


def _row(line: dict[str, Any]) -> str:
    low, high = line["quartiles"]
    stats, parts = line["stats"], line["milliseconds_a_pass"]
    return (
        f"{Path(line['drafter']).name:28s} exact {line['exact']:.3f}  speedup {line['walltime_speedup']:.2f} (decode "
        f"{line['decode_speedup']:.2f}; median {line['median_speedup']:.2f}, quartiles {low:.2f}-{high:.2f})  "
        f"length {stats['mean_acceptance_length']:.2f} / {stats['mean_accepted_tokens']:.2f}  "
        f"{line['tokens_per_second']:.1f} tokens/s  "
        + " ".join(f"{part} {ms:.1f}" for part, ms in parts.items())
        + " ms"
    )


def _setting(given: argparse.Namespace, target: Target, prompts: int) -> dict[str, Any]:
    device = (
        torch.cuda.get_device_name() if target.device.type == "cuda" else platform.processor() or platform.machine()
    )
    return {
        "target": Path(given.target).name,
        "prompts": prompts,
        "temperature": given.temperature,
        "tree": given.tree,
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
