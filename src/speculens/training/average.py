"""The running average of the drafter's weights: less noisy than the weights of any one update."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Average(Generic[M]):
    """a <- d a + (1 - d) w after every update, in float32 or wider.

    d is `decay`, but at update t at most (1 + t) / (10 + t): the random weights of the beginning are soon forgotten.
    """

    def __init__(self, module: M, decay: float) -> None:
        self._module, self._decay = module, decay
        self.state: dict[str, Tensor] = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name, weight in module.named_parameters()
        }

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take in the weights after update `step`, counted from 1."""
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        for name, weight in self._module.named_parameters():
            self.state[name].lerp_(weight.to(self.state[name].dtype), share)

    @torch.no_grad()
    def module(self) -> M:
        """A copy of the module with the averaged weights, in the module's own dtype."""
        made = copy.deepcopy(self._module)
        for name, weight in made.named_parameters():
            weight.copy_(self.state[name])
        return made
