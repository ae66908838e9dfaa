"""How exactly a checkpoint reads charts it has never seen: `python -m testbed.evaluate --checkpoint DIR --count 200`.

Loads the checkpoint as any user would, answers greedily, and prints one JSON object:
`exact` (share of answers with every fact right), `facts` (share of facts right), `values` (the same, but a number in
the right place counts even if the name of its column is misread), all of them per kind of chart, and the lengths of
the answers in tokens.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, ProcessorMixin

from testbed import draw, grammar, models


class Score(NamedTuple):
    """One answer: facts read by name, values in their place, and how many there are."""

    facts: int
    values: int
    total: int


HELD_OUT = 1  # the seed of held-out charts; training uses 0


def evaluate(
    folder: str | Path, count: int, device: str = "cpu", batch: int = 64, seconds: float = 1e9, new_tokens: int = 384
) -> dict[str, Any]:
    """Score `count` held-out charts, or as many as `seconds` allow."""
    began = time.monotonic()
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model, made = models.load(folder, dtype).to(device), models.load_processor(folder)
    sizes = ((models.SIDE, models.SIDE),) if model.config.model_type == models.LLAVA.name else draw.SIZES
    scores: dict[str, list[Score]] = defaultdict(list)
    lengths, pace = [], 0.0
    for start in range(0, count, batch):
        at = time.monotonic()
        if at - began + pace > seconds:
            break
        samples = [
            draw.sample(HELD_OUT, index, sizes[index % len(sizes)]) for index in range(start, min(start + batch, count))
        ]
        for one, (answer, length) in zip(samples, answers(model, made, samples, new_tokens), strict=True):
            facts, total = grammar.reading(one.facts, answer)
            scores[one.kind].append(Score(facts, grammar.values_read(one.facts, answer)[0], total))
            lengths.append(length)
        pace = time.monotonic() - at
    every = [score for some in scores.values() for score in some]
    return {
        **_rates(every),
        "kinds": {kind: _rates(some) for kind, some in sorted(scores.items())},
        "tokens": _spread(lengths),
        "seconds": round(time.monotonic() - began, 1),
    }


@torch.inference_mode()
def answers(
    model: PreTrainedModel, made: ProcessorMixin, samples: list[draw.Sample], new_tokens: int
) -> list[tuple[str, int]]:
    """The greedy answer to each sample's question, and its length in tokens (end token included)."""
    prompts = [
        made.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.question}]}],
            add_generation_prompt=True,
        )
        for one in samples
    ]
    inputs = made(text=prompts, images=[one.image for one in samples], padding=True, return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    made_ids = model.generate(**inputs, max_new_tokens=new_tokens)[:, inputs["input_ids"].shape[1] :]
    lengths = (made_ids != model.generation_config.pad_token_id).sum(1).tolist()
    return list(zip(made.tokenizer.batch_decode(made_ids, skip_special_tokens=True), lengths, strict=True))


def _rates(scores: list[Score]) -> dict[str, float]:
    total = max(1, sum(score.total for score in scores))
    return {
        "count": len(scores),
        "exact": round(sum(score.facts == score.total for score in scores) / max(1, len(scores)), 4),
        "facts": round(sum(score.facts for score in scores) / total, 4),
        "values": round(sum(score.values for score in scores) / total, 4),
    }


def _spread(lengths: list[int]) -> dict[str, float]:
    if not lengths:
        return {}
    ordered = sorted(lengths)
    return {
        "mean": round(sum(ordered) / len(ordered), 1),
        "median": ordered[len(ordered) // 2],
        "p95": ordered[int(len(ordered) * 0.95)],
        "max": ordered[-1],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    print(json.dumps(evaluate(options.checkpoint, options.count, options.device, options.batch), indent=1))


if __name__ == "__main__":
    main()
