"""ViSpec: one compressed row for each picture, and a global vector for all text behind it (arXiv 2509.15235).

    A = softmax(q Kᵀ / √d) V W_o      K, V from the layer-0 embeddings of one picture's rows; (num_q, H)
    A[: num_q - 1] enter the layer directly, in place of the picture's last num_q - 1 rows; its other rows go
    g = A[num_q - 1]                  at every later text row: fc([e ; img_fc([f ; g])])

A slot is visual iff token i+1 is: there the picture's embedding sits after the one-slot shift. So the feature of the
last image row survives, in the slot of the first text token behind the picture. Pictures without text between are one.
A picture that begins the sequence has no slot for its first row, which the adaptor then never sees (as published).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculens.attention import plain_attention
from speculens.drafters.config import DrafterConfig
from speculens.drafters.eagle import EagleDrafter
from speculens.drafters.rows import Rows
from speculens.errors import UserError
from speculens.features import Features
from speculens.ops import gather_rows, project, send
from speculens.values import read

FUSIONS = ("concat", "add", "none")


@dataclass(frozen=True)
class Options:
    """What `options` of a ViSpec config may hold.

    num_q              learned queries: num_q - 1 rows of each picture and one global vector (paper: 2)
    adaptor_heads      heads of the adaptor; None: those of the layer, as published
    adaptor_head_dim   width of each; None: H / heads, as published
    fusion             concat: img_fc([f ; g]), as published | add: f + img_fc(g), the paper's formula, half the size |
                       none: f alone, without a global vector (the paper's ablation)
    """

    num_q: int = 2
    adaptor_heads: int | None = None
    adaptor_head_dim: int | None = None
    fusion: str = "concat"

    @staticmethod
    def read(config: DrafterConfig) -> Options:
        """Raises UserError on unknown keys and impossible values."""
        options = read(Options, config.options, "The options of ViSpec")
        if min(options.num_q, options.adaptor_heads or 1, options.adaptor_head_dim or 1) < 1:
            raise UserError("The options num_q, adaptor_heads and adaptor_head_dim of ViSpec must be above 0.")
        if options.fusion not in FUSIONS:
            raise UserError(f"The option fusion of ViSpec is one of {', '.join(FUSIONS)}, not {options.fusion!r}.")
        return options


class Adaptor(nn.Module):
    """Cross-attention of learned queries to one picture: no query projection, norm, residual or positions."""

    def __init__(self, size: int, num_q: int, heads: int, head_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(num_q, heads, head_dim) * head_dim**-0.5)
        self.k_proj = nn.Linear(size, heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(size, heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, size, bias=False)

    def forward(self, pictures: Tensor, real: Tensor) -> Tensor:
        """Rows of R pictures (R, L, H), real where `real` (R, L) bool -> (R, num_q, H)."""
        heads = self.q.shape[1:]
        keys, values = (project(pictures).unflatten(2, heads).transpose(1, 2) for project in (self.k_proj, self.v_proj))
        queries = self.q.transpose(0, 1).expand(len(pictures), -1, -1, -1)
        mixed = plain_attention(queries, keys, values, attn_mask=real[:, None, None])
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class ViSpecDrafter(EagleDrafter):
    """The EAGLE-2 head with an adaptor for pictures. Parameter names are those of the published checkpoints."""

    name = "vispec"
    image_contract = "adaptor"

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.options = Options.read(config)
        size, heads = config.target_hidden_size, self.options.adaptor_heads or config.num_attention_heads
        head_dim = self.options.adaptor_head_dim or size // heads
        self.imadpt = Adaptor(size, self.options.num_q, heads, head_dim, bias=config.qkv_bias)
        if self.options.fusion == "none":
            return
        self.img_fc = nn.Linear((2 if self.options.fusion == "concat" else 1) * size, size)
        nn.init.zeros_(self.img_fc.bias)  # both fusions begin as f alone
        nn.init.zeros_(self.img_fc.weight)
        if self.options.fusion == "concat":
            nn.init.eye_(self.img_fc.weight[:, :size])

    def view(self, features: Features, next_embeds: Tensor) -> Rows:
        """Text rows where they were, num_q - 1 rows of each picture at its last positions, and g at every row."""
        inside = features.positions < features.lengths[:, None]
        visual = F.pad((features.image & inside)[:, 1:], (0, 1))
        run, left, pictures = self._compress(visual, next_embeds)
        compressed = visual & (left < self.options.num_q - 1)
        kept = compressed | (inside & ~visual)
        order = (~kept).byte().argsort(dim=1, stable=True)[:, : int(kept.sum(1).amax())]
        real, compressed, run, left, positions = (
            x.gather(1, order) for x in (kept, compressed, run, left, features.positions)
        )
        source = torch.where(real & ~compressed, order, -1)
        query = torch.where(compressed, self.options.num_q - 2 - left, 0)
        device = next_embeds.device
        order, run, query, positions, direct = send(torch.stack([order, run, query, positions, compressed]), device)
        direct = direct.bool()
        return Rows(
            embeds=torch.where(direct[..., None], pictures[run, query], gather_rows(next_embeds, order)),
            hidden=gather_rows(features.hidden, order),
            positions=positions,
            source=source,
            direct=direct,
            memory=None if self.options.fusion == "none" else pictures[run, -1],
        )

    def enter(self, rows: Rows, step: int = 0) -> Tensor:
        entered = project(self.fc, torch.cat([rows.embeds, self._fuse(rows)], dim=-1))
        return entered if rows.direct is None else torch.where(rows.direct[..., None], rows.embeds, entered)

    def _fuse(self, rows: Rows) -> Tensor:
        """Feature and global vector -> (B, m, H)."""
        if self.options.fusion == "none":
            return rows.hidden
        memory = torch.zeros_like(rows.hidden) if rows.memory is None else rows.memory
        if self.options.fusion == "add":
            return rows.hidden + project(self.img_fc, memory)
        return project(self.img_fc, torch.cat([rows.hidden, memory], dim=-1))

    def _compress(self, visual: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The adaptor over every picture of a batch.

        visual  (B, n) bool on the host, embeds (B, n, H)
        Returns, the first two on the host: (B, n) long, which picture is the newest at each slot, 0 before the first;
        (B, n) long, how many rows of its picture still follow a visual slot; (1 + R, num_q, H) the outputs, all 0 for
        picture 0, which is none.
        """
        begins = visual & ~F.pad(visual[:, :-1], (1, 0))
        number = begins.flatten().cumsum(0).view_as(begins)
        start = F.pad(begins.flatten().nonzero()[:, 0], (1, 0))
        length = torch.bincount(number[visual], minlength=len(start)).clamp(min=1)
        offset = torch.arange(int(length.amax()))
        rows = (start[:, None] + offset).clamp(max=visual.numel() - 1)
        # Picture 0 is computed too, so that the adaptor has a gradient (of 0) also where a batch has no picture.
        rows, real = (send(x, embeds.device) for x in (rows, offset < length[:, None]))
        outputs = self.imadpt(embeds.flatten(0, 1)[rows], real)
        some = torch.arange(len(start), device=embeds.device) > 0
        run = torch.where(begins.cumsum(1) > 0, number, 0)
        slot = torch.arange(visual.numel()).view_as(visual)
        return run, (start + length)[run] - 1 - slot, outputs * some[:, None, None]
