"""A vision tower's patch embedding as the matrix product that it is.

Towers of the Qwen-VL kind are given pictures cut into patches, each of which a 3-D convolution with a kernel of one
patch turns into one row. cuDNN has no fast kernel for that in half precision (huggingface/transformers#45750).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbedding(nn.Conv3d):
    """A convolution that is a product where its input is no larger than its kernel."""

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (P, C, T, H, W) -> (P, O, 1, 1, 1)."""
        if patches.ndim != 5 or patches.shape[2:] != self.kernel_size:
            return super().forward(patches)
        rows = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return rows[..., None, None, None]


def multiply_patches(model: nn.Module) -> None:
    """Let the convolutions of a model that may see single patches be of that kind; weights and names stay."""
    for module in model.modules():
        if type(module) is nn.Conv3d and _is_plain(module):  # a subclass may do something else
            module.__class__ = PatchEmbedding


def _is_plain(module: nn.Conv3d) -> bool:
    plain = module.padding == (0, 0, 0) and module.dilation == (1, 1, 1) and module.groups == 1
    return plain and module.padding_mode == "zeros"
