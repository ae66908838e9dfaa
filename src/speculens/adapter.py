"""`model.generate(..., custom_generate=custom_generate(drafter))`: tree decoding behind Hugging Face's own door.

`generate` prepares positions, logits processors and stopping criteria; the engine does the rest. It takes `streamer`
and `tokenizer` away before a custom loop sees them: pass a streamer as `stream_to`, and stop strings as a
`StopStringCriteria` among `stopping_criteria`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from speculens.cache import CACHE_NAMES
from speculens.drafters.base import Drafter
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.sampling import Sampling
from speculens.targets.base import Prompt, Target
from speculens.targets.processing import image_token_id
from speculens.tree import TreeShape


def custom_generate(drafter: Drafter | None = None, shape: TreeShape | None = None) -> Callable[..., Tensor]:
    """A function for `generate(custom_generate=...)` that returns prompt and output ids, (1, n).

    Sampling with the same `seed` (a keyword of its own, default 0) gives the same tokens with any drafter and with
    none; it does not use torch's global generator. Keep the function: a model is prepared at its first call. Raises
    UserError for batches, beams, stateful processors and `return_dict_in_generate`.
    """
    last: list[Target] = []

    def target_of(model: PreTrainedModel) -> Target:
        if not last or last[0].model is not model:
            last[:] = [Target(model)]
        return last[0]

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
        engine = Engine(target_of(model), drafter, capacity=len(prompt) + sampling.max_new_tokens, shape=shape)
        ids = input_ids
        if stream_to is not None:
            stream_to.put(ids.cpu())  # as generate does: a streamer may skip the prompt
        for step in engine.stream(prompt, sampling):
            for token in step.tokens:
                ids = torch.cat([ids, ids.new_tensor([[token]])], 1)
                if stream_to is not None:
                    stream_to.put(ids[0, -1:].cpu())
                if stopping_criteria is not None and bool(stopping_criteria(ids, None).all()):
                    return _ended(ids, stream_to)
        return _ended(ids, stream_to)

    return tree_decode


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


def _ended(ids: Tensor, stream_to: Any) -> Tensor:
    if stream_to is not None:
        stream_to.end()
    return ids
