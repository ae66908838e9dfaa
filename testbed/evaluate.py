"""How exactly a checkpoint reads charts it has never seen: `python -m testbed.evaluate --checkpoint DIR --count 200`.

Loads the checkpoint as any user would, answers greedily, and prints one JSON object:
`exact` (share of answers with every fact right), `facts` (share of facts right), the same per kind of chart, and the
lengths of the answers in tokens.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from testbed import draw, grammar, models

HELD_OUT = 1  # the seed of held-out charts; training uses 0


def evaluate(
    folder: str | Path, count: int, device: str = "cpu", batch: int = 64, seconds: float = 1e9, new_tokens: int = 384
) -> dict[str, Any]:
    """Score `count` held-out charts, or as many as `seconds` allow."""
    began = time.monotonic()
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model, made = models.load(folder, dtype).to(device), models.load_processor(folder)
    sizes = ((models.SIDE, models.SIDE),) if model.config.model_type == models.LLAVA.name else draw.SIZES
    scores: dict[str, list[tuple[int, int]]] = defaultdict(list)
    lengths, pace = [], 0.0
    for start in range(0, count, batch):
        at = time.monotonic()
        if at - began + pace > seconds:
            break
        samples = [
            draw.sample(HELD_OUT, index, sizes[index % len(sizes)]) for index in range(start, min(start + batch, count))
        ]
        for one, (answer, length) in zip(samples, answers(model, made, samples, new_tokens), strict=True):
            scores[one.kind].append(grammar.reading(one.facts, answer))
            lengths.append(length)
        pace = time.monotonic() - at
    every = [pair for pairs in scores.values() for pair in pairs]
    return {
        **_rates(every),
        "kinds": {kind: _rates(pairs) for kind, pairs in sorted(scores.items())},
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


def _rates(pairs: list[tuple[int, int]]) -> dict[str, float]:
    right, total = (sum(side) for side in zip(*pairs, strict=True)) if pairs else (0, 0)
    exact = sum(one == of for one, of in pairs)
    return {
        "count": len(pairs),
        "exact": round(exact / max(1, len(pairs)), 4),
        "facts": round(right / max(1, total), 4),
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
