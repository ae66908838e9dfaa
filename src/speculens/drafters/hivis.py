"""HiViS: the drafter sees no picture row; the target's features of the text carry it (arXiv 2509.23928).

    pair j holds (embedding of text token j+1, target feature of text token j, r_k) and predicts the feature of j+1

Text tokens are numbered as if no picture stood between them, so the shift by one happens inside the pruned sequence.
r_k is one learned vector per draft step: r_0 where the feature is the target's, r_k at the k-th self-fed step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speculens.drafters.config import DrafterConfig
from speculens.drafters.eagle import EagleDrafter
from speculens.drafters.rows import Rows, behind
from speculens.errors import UserError
from speculens.features import Features
from speculens.ops import gather_rows, project, send
from speculens.values import read

POSITIONS = ("auto", "contiguous", "original")
BORDERS = ("paper", "after", "vllm")
# Where configs of Hugging Face models name the tokens that frame a picture: first and last.
FRAME_KEYS = (("vision_start_token_id", "vision_end_token_id"), ("boi_token_index", "eoi_token_index"))


@dataclass(frozen=True)
class HivisOptions:
    """What only this method knows.

    positions       contiguous closes the gap where a picture stood, original keeps it; auto is decided when a drafter
                    is made for a target: original where the target's own positions are not plain numbers (M-RoPE), else
                    contiguous, which it also means where nobody decided
    border          paper hides a picture's rows with its frame; after hides the token behind the frame too (published
                    Qwen files); vllm hides slot i iff token i+1 belongs to the picture, and pairs what is left as usual
    frame           ids of the two tokens before and after a picture; none where the family has none
    steps           K, the number of step embeddings
    step_embedding  False leaves r_k out: fc is then EAGLE's
    """

    positions: str = "auto"
    border: str = "paper"
    frame: tuple[int, ...] = ()
    steps: int = 3
    step_embedding: bool = True

    def __post_init__(self) -> None:
        for name, known in (("positions", POSITIONS), ("border", BORDERS)):
            if getattr(self, name) not in known:
                raise UserError(f"The option {name} of HiViS is one of {', '.join(known)}, not {getattr(self, name)}.")
        if len(self.frame) not in (0, 2):
            raise UserError(f"The option frame of HiViS is two token ids or none, not {list(self.frame)}.")
        if self.steps < 1:
            raise UserError(f"The option steps of HiViS must be a whole number above 0, not {self.steps}.")

    @staticmethod
    def read(options: Mapping[str, Any]) -> HivisOptions:
        """From a config's options; raises UserError on unknown ones."""
        return read(HivisOptions, options, "The options of HiViS")


class HivisDrafter(EagleDrafter):
    """The EAGLE-2 head on text rows only, with an embedding of the draft step."""

    name = "hivis"
    image_contract = "hidden"

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.options = HivisOptions.read(config.options)
        size = config.target_hidden_size
        if self.options.step_embedding:
            self.fc = nn.Linear(3 * size, size)
            self.residual = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.options.steps, size)))

    @classmethod
    def settle(cls, options: Mapping[str, Any], model: Any) -> dict[str, Any]:
        """Decide what the target decides: the frame of its pictures, and positions `auto`."""
        given = HivisOptions.read(options)
        text = model.get_text_config()
        rope = getattr(text, "rope_parameters", None) or {}
        positions = ("original" if "mrope_section" in rope else "contiguous") if given.positions == "auto" else None
        decided = {"positions": positions or given.positions, "frame": list(given.frame or _frame(model))}
        return asdict(given) | decided

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """As EAGLE's; where the other drafter has fewer step embeddings, its last one stands for the later steps."""
        state = dict(state)
        if self.options.step_embedding and "residual" in state:
            other = state["residual"]
            step = torch.arange(self.options.steps).clamp(max=len(other) - 1)
            state["residual"] = other[step.to(other.device)]
        super().adopt(state)

    def view(self, features: Features, next_embeds: Tensor) -> Rows:
        """Text rows only.

        Text tokens are numbered t_0 < t_1 < .. < t_m = n, where n is the token behind the sequence. Row j stands for
        slot t_{j+1} - 1, the one whose embedding is that of token t_{j+1}. Its feature is that of t_j, the last text
        token before (border paper and after), or of token t_{j+1} - 1, visual or not (border vllm).
        """
        lengths = features.lengths[:, None]
        text = (features.positions < lengths) & ~self._hidden(features)
        last = features.positions == lengths - 1
        if self.options.border == "vllm":
            source = seen = _indices(_next(text) | last)
        else:
            text |= last & ~text.any(1, keepdim=True)  # all picture: something must predict what follows
            seen = _indices(text)
            source = _indices((_next(text) | last) & (text.cumsum(1) > 0))
        take = seen.clamp(min=0)
        if self.options.positions == "original":
            positions = features.positions.gather(1, take)
        else:
            positions = torch.arange(source.shape[1]).expand_as(source)
        index = torch.stack([source.clamp(min=0), take, positions])
        following, taken, positions = send(index, next_embeds.device)
        return Rows(gather_rows(next_embeds, following), gather_rows(features.hidden, taken), positions, source)

    def enter(self, rows: Rows, step: int = 0) -> Tensor:
        """[e ; f ; r_step] -> what enters the layer: (B, m, H)."""
        if not self.options.step_embedding:
            return super().enter(rows, step)
        bias = self.residual[min(step, self.options.steps - 1)].expand_as(rows.hidden)
        return project(self.fc, torch.cat([rows.embeds, rows.hidden, bias], dim=-1))

    def _hidden(self, features: Features) -> Tensor:
        """(B, n) bool: tokens that count as picture."""
        image = features.image
        if self.options.border == "vllm" or not self.options.frame:
            return image
        start, end = self.options.frame
        first, last = (features.tokens == start) & _next(image), (features.tokens == end) & behind(image)
        hidden = image | first | last
        return hidden | behind(last) if self.options.border == "after" else hidden


def _frame(model: Any) -> tuple[int, ...]:
    """The ids of the tokens that frame a picture, where the model's config names them."""
    for keys in FRAME_KEYS:
        if all(isinstance(getattr(model, key, None), int) for key in keys):
            return tuple(getattr(model, key) for key in keys)
    return ()


def _next(marked: Tensor) -> Tensor:
    """(B, n) bool: is the row behind each one marked?"""
    return torch.cat([marked[:, 1:], torch.zeros_like(marked[:, :1])], 1)


def _indices(marked: Tensor) -> Tensor:
    """(B, n) bool -> (B, m) long: the marked columns of each row in order, then -1; m is the largest number of them."""
    counts = marked.sum(1, keepdim=True)
    order = torch.argsort(marked.int(), dim=1, descending=True, stable=True)[:, : int(counts.max())]
    return torch.where(torch.arange(order.shape[1], device=order.device) < counts, order, -1)
