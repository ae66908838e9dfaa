"""Muon for the matrices of the layers, one Newton-Schulz iteration for all matrices of a shape at once."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic iteration, K. Jordan, "Muon", 2024


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix; takes 2-D parameters only.

    The step is scaled by 0.2 * sqrt(longer side), so that entries move as under AdamW (Moonlight, arXiv:2502.16982).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update; parameters without a gradient stay."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes[weight.shape].append(weight)
            for weights in shapes.values():
                self._update(weights, group)

    def _update(self, weights: list[Tensor], group: dict[str, float]) -> None:
        gradient = torch.stack([weight.grad for weight in weights])
        state = self.state[weights[0]]  # one stacked buffer, kept under the first of its shape
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        step = orthogonal(gradient.lerp(state["momentum"], group["momentum"])).to(gradient.dtype)
        scale = 0.2 * max(gradient.shape[1:]) ** 0.5
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(step.unbind()), alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """(m, r, c) -> matrices of the same singular vectors with singular values near 1, in bf16."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def optimizers(model: nn.Module, name: str, lr: float, matrix_lr: float) -> list[torch.optim.Optimizer]:
    """AdamW for all (`adamw`), or Muon at `matrix_lr` for the layers' matrices and AdamW for the rest (`muon`)."""
    fused = next(model.parameters()).is_cuda
    matrices, rest = [], []
    for path, weight in model.named_parameters():
        layered = weight.ndim == 2 and any(part in path for part in (".layers.", ".blocks."))
        (matrices if layered and name == "muon" else rest).append(weight)
    groups = [
        {"params": [weight for weight in rest if weight.ndim > 1], "weight_decay": 0.01},
        {"params": [weight for weight in rest if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=fused)]
    return made + ([Muon(matrices, lr=matrix_lr)] if matrices else [])
