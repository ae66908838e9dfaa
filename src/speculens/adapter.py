"""`model.generate(..., custom_generate=custom_generate(drafter))`: tree decoding behind Hugging Face's own door.

`generate` prepares positions, logits processors and stopping criteria; the engine does the rest. It takes `streamer`
and `tokenizer` away before a custom loop sees them: pass a streamer as `stream_to`, and stop strings as a
`StopStringCriteria` among `stopping_criteria`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from speculens.cache import CACHE_NAMES
from speculens.drafters.base import Drafter
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.sampling import Sampling
from speculens.targets.base import Prompt, Target
from speculens.targets.processing import image_token_id
from speculens.tree import TreeShape

GRAIN = 256  # rows: prompts that differ a little share an engine


def custom_generate(drafter: Drafter | None = None, shape: TreeShape | None = None) -> Callable[..., Tensor]:
    """A function for `generate(custom_generate=...)` that returns prompt and output ids, (1, n).

    Sampling with the same `seed` (a keyword of its own, default 0) gives the same tokens with any drafter and with
    none; it does not use torch's global generator. Keep the function: its engine, with a KV cache of the longest call
    and on a GPU its recorded steps, serves as long as weights stay where they are. A model in training is decoded as
    it evaluates and goes on as it was. Raises UserError for batches, beams, stateful processors and
    `return_dict_in_generate`.
    """
    engines = _Engines(drafter, shape)

    def tree_decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        seed: int = 0,
        stream_to: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        settings = _checked(generation_config, input_ids)
        prompt = _prompt(model, input_ids, model_kwargs)
        sampling = Sampling(
            temperature=1.0 if settings.do_sample else 0.0,
            max_new_tokens=settings.max_length - input_ids.shape[1],
            seed=seed,
            ignore_eos=True,  # the criteria below know every end, EOS ids included
            processors=tuple(logits_processor or ()),
        )
        with _evaluating(model), closing(_tokens(engines.of(model, prompt, sampling), prompt, sampling)) as tokens:
            ids = input_ids
            if stream_to is not None:
                stream_to.put(ids.cpu())  # as generate does: a streamer may skip the prompt
            for token in tokens:
                ids = torch.cat([ids, ids.new_tensor([[token]])], 1)
                if stream_to is not None:
                    stream_to.put(ids[0, -1:].cpu())
                if stopping_criteria is not None and bool(stopping_criteria(ids, None).all()):
                    break
            if stream_to is not None:
                stream_to.end()
        return ids

    return tree_decode


class _Engines:
    """The engine of the last call, for as long as it fits."""

    def __init__(self, drafter: Drafter | None, shape: TreeShape | None) -> None:
        self._drafter, self._shape = drafter, shape
        self._engine: Engine | None = None
        self._weights: list[Any] = []

    def of(self, model: PreTrainedModel, prompt: Prompt, sampling: Sampling) -> Engine:
        """One for this model as it is now, with room for such a request."""
        rows, engine = len(prompt) + sampling.max_new_tokens, self._engine
        if (
            engine is None
            or engine.target.model is not model
            or engine.capacity < rows
            or self._weights != self._places(model)
        ):
            self._engine = engine = None  # its memory goes before the next one takes as much
            target = Target(model)
            capacity = min(-(-rows // GRAIN) * GRAIN, target.context)
            engine = Engine(target, self._drafter, capacity=capacity, shape=self._shape)
            self._engine, self._weights = engine, self._places(model)
        return engine

    def _places(self, model: nn.Module) -> list[Any]:
        """Where the weights lie, which an engine's recorded steps read; their values may change."""
        modules = [model, *([self._drafter] if isinstance(self._drafter, nn.Module) else [])]
        return [(weight.data_ptr(), weight.dtype) for module in modules for weight in module.parameters()]


def _tokens(engine: Engine, prompt: Prompt, sampling: Sampling) -> Generator[int, None, None]:
    with closing(engine.stream(prompt, sampling)) as steps:
        for step in steps:
            yield from step.tokens


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which a model only evaluates. Then its modules and weights train as before."""
    training = [module for module in model.modules() if module.training]
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for weight in learning:
            weight.requires_grad_(True)


def _checked(settings: GenerationConfig | None, ids: Tensor) -> GenerationConfig:
    if settings is None:
        raise UserError("Call this through model.generate(custom_generate=...), which prepares its arguments.")
    if len(ids) != 1:
        raise UserError(f"Tree decoding through generate takes one sequence, not {len(ids)}: use Engine for batches.")
    if settings.return_dict_in_generate:
        raise UserError("Tree decoding through generate returns token ids only: leave return_dict_in_generate off.")
    return settings


def _prompt(model: PreTrainedModel, ids: Tensor, given: dict[str, Any]) -> Prompt:
    """What `generate` prepared, without its cache: ours takes that place."""
    given = {name: value for name, value in given.items() if name not in CACHE_NAMES}
    prepare: Any = model.prepare_inputs_for_generation
    inputs = prepare(ids, is_first_iteration=True, **given)
    ours = (*CACHE_NAMES, "use_cache", "logits_to_keep")
    inputs = {name: value for name, value in inputs.items() if value is not None and name not in ours}
    return Prompt(ids[0].cpu(), inputs, (ids[0] == image_token_id(model.config)).cpu())
