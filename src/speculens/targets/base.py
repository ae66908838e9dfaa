"""The frozen target: any Hugging Face image-text-to-text model, unmodified, entered by its text decoder's door.

Prefill lets the model itself do everything that differs between families (vision tower, merging, M-RoPE, image
blocks, deepstack): a hook stops its forward at the text decoder's door and takes what would have gone in. From there on
the decoder is called directly with embeddings, positions, a 4-D mask and our cache (docs/how-it-works.md, the door).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from speculens.attention import TreeMask, causal_attention, for_any_shape, tree_attention
from speculens.cache import SlotCache, cache_arguments
from speculens.capture import Place
from speculens.conversation import Conversation
from speculens.errors import UserError
from speculens.features import Features
from speculens.int8 import Int8Linear
from speculens.ops import look_up, project, send
from speculens.targets.attention import is_ours
from speculens.targets.fused import FusedDecoder, fuse
from speculens.targets.processing import encode, image_token_id
from speculens.targets.prompt_graphs import PromptGraphs
from speculens.targets.segments import foresees
from speculens.targets.tower_graphs import TowerGraphs, towers_of
from speculens.tree import DraftTree


@dataclass(frozen=True)
class Prompt:
    """One encoded conversation.

    ids     (n,) long on the CPU, image placeholders expanded
    inputs  what the model's own forward takes (batch of one): input_ids, attention_mask, pixel_values, ...
    image   (n,) bool, True at image rows
    """

    ids: Tensor
    inputs: dict[str, Any]
    image: Tensor

    def __len__(self) -> int:
        return len(self.ids)


# What layers of a target's decoder may be. Recurrent ones have no rows to keep or forget, others have another mask.
LAYER_TYPES = frozenset(["full_attention", "sliding_attention"])


class Target:
    """A frozen model with its processor. Holds no state of any request: that lives in a `TargetSession`.

    Raises UserError if the model's text decoder is of a build that a draft tree cannot be checked by.
    """

    def __init__(self, model: PreTrainedModel, processor: Any = None) -> None:
        _check_build(model)
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.decoder = model.get_decoder()
        self.text_config = model.config.get_text_config()
        self.embedding: Any = model.get_input_embeddings()
        self.head = model.get_output_embeddings()
        self._softcap: float | None = getattr(self.text_config, "final_logit_softcapping", None)
        self._softcap_applies: bool | None = None
        self._fused: FusedDecoder | None = None
        self._fusible = True
        self._towers: list[TowerGraphs] = []
        self._entering = threading.Lock()

    # What the model is

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def family(self) -> str:
        return str(self.model.config.model_type)

    @property
    def hidden_size(self) -> int:
        return int(self.text_config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.head.weight.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.text_config.num_hidden_layers)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where token embeddings are looked up, and where logits are chosen from."""
        return next(self.embedding.parameters()).device

    @property
    def can_be_captured(self) -> bool:
        """Whether a pass is kernels on one device alone. Quantised layers may decide on the host; moves always do."""
        devices = {weight.device for weight in self.model.parameters()}
        return len(devices) == 1 and not getattr(self.model, "is_quantized", False)

    @property
    def context(self) -> int:
        """Positions that the model was made for."""
        return int(getattr(self.text_config, "max_position_embeddings", 1 << 30))

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends a sequence, from the generation config or else the model's."""
        for config in (self.model.generation_config, self.model.config, self.text_config):
            ids = getattr(config, "eos_token_id", None)
            if ids is not None:
                return frozenset(ids if isinstance(ids, (list, tuple)) else [int(ids)])
        return frozenset()

    def describe(self) -> dict[str, Any]:
        """What `inspect` shows. Works on an outline, too."""
        token, ends = image_token_id(self.model.config), sorted(self.eos_token_ids)
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        spell = self.tokenizer.convert_ids_to_tokens
        return {
            "model_type": self.family,
            "architecture": type(self.model).__name__,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "context": self.context,
            "kv_bytes_per_token": self.session(slots=1, capacity=1).nbytes,
            "positions": "M-RoPE" if "mrope_section" in rope else "1-D",
            "image_token": spell(token),
            "image_token_id": token,
            "eos_tokens": spell(ends),
            "eos_token_ids": ends,
        }

    # What it computes

    def encode(self, conversation: Conversation, *, add_generation_prompt: bool = True) -> Prompt:
        """Chat template and processor: the prompt that the model would be given."""
        if self.processor is None:
            raise UserError("This target was made without a processor, so it takes encoded prompts only.")
        inputs, image = encode(
            self.processor, self.model.config, conversation, add_generation_prompt=add_generation_prompt
        )
        return Prompt(inputs["input_ids"][0], inputs, image)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings (..., H), scaled as the model scales them."""
        return look_up(self.embedding, tokens)

    def logits(self, hidden: Tensor, head: nn.Linear | Int8Linear | None = None) -> Tensor:
        """The head, or some of its rows, on hidden states after the final norm: (..., H) -> (..., V)."""
        head = self.head if head is None else head
        logits = project(head, hidden.to(head.weight.device)).to(self.device)
        if self._softcap and self._softcap_applies:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def head_rows(self, tokens: Tensor) -> nn.Linear:
        """A copy of the head's rows of some tokens, (V',) long, for `logits`: V' H numbers in the head's dtype."""
        weight, bias = self.head.weight, getattr(self.head, "bias", None)
        if not weight.is_floating_point():
            raise UserError("A reduced draft vocabulary needs a target whose head is not quantised.")
        some = nn.Linear(weight.shape[1], len(tokens), bias=bias is not None, device="meta")
        some.weight = _rows(weight, tokens, self.device)
        if bias is not None:
            some.bias = _rows(bias, tokens, self.device)
        return some

    def session(self, slots: int, capacity: int) -> TargetSession:
        """Room for `slots` sequences of up to `capacity` rows each."""
        return TargetSession(self, slots, capacity)

    def fused(self) -> FusedDecoder | None:
        """The decoder's faster form, if its build allows one; made anew if the model was changed."""
        if self._fusible and not (self._fused and self._fused.intact):
            self._fused = fuse(self.decoder)
            self._fusible = self._fused is not None
        return self._fused

    def teach(self, inputs: dict[str, Any], image: Tensor) -> Features:
        """One frozen forward over whole sequences, padded on the right: what training distils from.

        inputs  what the model's forward takes, on the host; attention_mask (B, n) marks the real rows
        image   (B, n) bool, on the host
        """
        with torch.no_grad():
            door = self.at_the_door(inputs, cache=None)
            mask = door.get("attention_mask")
            if isinstance(mask, Tensor) and mask.ndim == 2:
                # A plain padding mask: the model adds causality and nothing else, so no real row sees the padding on
                # its right anyway. Without the mask, attention takes its fast causal path.
                door["attention_mask"] = None
            hidden = self.decoder(**door).last_hidden_state
            self.calibrate(inputs, hidden[0, -1])
            tokens, lengths = inputs["input_ids"], inputs["attention_mask"].sum(1)
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            embeds = door["inputs_embeds"].to(self.device)
            return Features(tokens, hidden.to(self.device), embeds, positions, image, lengths)

    def at_the_door(self, inputs: dict[str, Any], cache: Any) -> dict[str, Any]:
        """Run the model's own forward up to its text decoder and return what would have gone in.

        One thread at a time; others may step meanwhile.
        """
        inputs = inputs | self.positions(inputs)
        # The host reads these.
        sizes = ("image_sizes", *(("image_grid_thw", "video_grid_thw") if self._foresees else ()))
        kept = {name: inputs[name] for name in sizes if name in inputs}
        with ExitStack() as blocks:
            blocks.enter_context(self._entering)
            blocks.enter_context(for_any_shape(self.device))  # pictures have many, and towers use torch's attention
            for tower in self._towers:
                blocks.enter_context(tower.in_place())
            caught = blocks.enter_context(_stopped_at(self.decoder))
            self.model(**(self.fitted(inputs) | kept), **cache_arguments(self.model, cache))
        if "inputs_embeds" not in caught:
            raise UserError(f"{type(self.model).__name__} does not pass merged embeddings to a text decoder.")
        return caught

    def record_towers(self) -> None:
        """From now on record passes over pictures whose sizes come again (`tower_graphs.py`), where they can be."""
        if not self._towers and self.can_be_captured:
            towers = [TowerGraphs(tower, self.device) for tower in towers_of(self.model)]
            self._towers = [tower for tower in towers if tower.recorder.on]

    def fitted(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of the model's forward on its device, pictures in its dtype."""
        return {
            name: send(value, self.device).to(self.dtype if value.is_floating_point() else value.dtype)
            if isinstance(value, Tensor)
            else value
            for name, value in inputs.items()
        }

    def positions(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """M-RoPE `position_ids` by the model's own rule, on the host: it reads row by row and number by number.

        On a GPU each such read waits, a thousand times in a batch, and longer where runs share the device. Nothing for
        targets without, and for inputs that have them.
        """
        rule, known = self._rule_of_positions
        if rule is None or "mm_token_type_ids" not in inputs or "position_ids" in inputs:
            return {}
        read = {name: value.cpu() for name, value in inputs.items() if name in known and isinstance(value, Tensor)}
        return {"position_ids": rule(**read)[0]}

    @cached_property
    def _rule_of_positions(self) -> tuple[Callable[..., tuple[Tensor, Tensor]] | None, frozenset[str]]:
        """The model's own rule of M-RoPE, and the names of what it takes."""
        rule = getattr(getattr(self.model, "model", None), "get_rope_index", None)
        return rule, frozenset(inspect.signature(rule).parameters) if rule else frozenset()

    @cached_property
    def _foresees(self) -> bool:
        return foresees(self.model)

    @property
    def calibrated(self) -> bool:
        """Whether `calibrate` has nothing left to find out."""
        return self._softcap is None or self._softcap_applies is not None

    def calibrate(self, inputs: dict[str, Any], hidden: Tensor) -> None:
        """Find out once whether this model's own forward soft-caps its logits: versions of transformers differ."""
        if self.calibrated:
            return
        assert self._softcap is not None  # noqa: S101 - for the type checker: else it is calibrated
        own = self.model(**self.fitted(inputs), logits_to_keep=1).logits[0, -1].float()
        plain = self.head(hidden).float()
        capped = torch.tanh(plain / self._softcap) * self._softcap
        self._softcap_applies = bool((own - capped).abs().max() < (own - plain).abs().max())


def _check_build(model: PreTrainedModel) -> None:
    """Causal layers of attention, one list of them, all of one shape, and pictures among their rows."""
    text = model.config.get_text_config()
    wrong = ""
    if foreign := sorted(set(getattr(text, "layer_types", None) or ()) - LAYER_TYPES):
        wrong = f"has layers of the kind {' and '.join(foreign)}"
    elif getattr(text, "cross_attention_layers", None) or model.config.is_encoder_decoder:
        wrong = "sees pictures by cross-attention"
    elif not hasattr(model.get_decoder(), "layers"):
        wrong = "is not one list of layers"
    elif getattr(text, "is_heterogeneous", False):
        wrong = "has layers of several shapes"
    elif getattr(text, "hidden_size_per_layer_input", None):
        wrong = "looks up inputs of every layer by token id"
    if wrong:
        raise UserError(
            f"A '{model.config.model_type}' model cannot be a target: its text decoder {wrong}, and draft trees are "
            "checked by causal self-attention of equal layers on embeddings alone."
        )


class _StoppedError(Exception):
    """Raised by our own hook to leave the model's forward."""


@contextmanager
def _stopped_at(decoder: nn.Module) -> Iterator[dict[str, Any]]:
    """A block that ends where this thread calls the decoder; what would have gone in is then in the dict.

    Engines of one target may run in threads of their own, and another one's step is none of our business.
    """
    caught: dict[str, Any] = {}
    mine = threading.get_ident()

    def stop(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == mine:
            caught.update(kwargs)
            raise _StoppedError

    handle = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield caught
    except _StoppedError as stopped:
        stopped.__traceback__ = None  # its frames hold the engine, and from Python 3.12 on also each other, in a ring
    finally:
        handle.remove()


class TargetSession:
    """The target's state for a set of slots: KV cache and position offsets."""

    def __init__(self, target: Target, slots: int, capacity: int) -> None:
        self.target = target
        config = target.text_config
        heads = config.num_attention_heads
        self.cache = SlotCache(
            slots=slots,
            capacity=capacity,
            heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=target.dtype,
            devices=[next(layer.parameters()).device for layer in target.decoder.layers],
        )
        self._past = self.cache.as_transformers()
        self._given = cache_arguments(target.decoder, self._past)
        # What a step carries to the next one, where it is tensor operations on one device; else None.
        self.state = (self.cache.lengths,) if target.can_be_captured else None
        # Next position minus number of rows: not 0 on M-RoPE targets (a picture takes fewer positions than rows) and on
        # PaliGemma (positions start at 1). Kept per slot; the model's own `rope_deltas` belongs to whoever ran last.
        self._offsets = torch.zeros(slots, dtype=torch.long, device=target.device)
        self._fused = target.fused()
        self._graphs: PromptGraphs | None = None
        self._axes = 3 if "mrope_section" in (getattr(config, "rope_parameters", None) or {}) else 1
        types = getattr(config, "layer_types", None) or ()
        self._window = getattr(config, "sliding_window", None) if "sliding_attention" in types else None

    def prefill(self, prompt: Prompt) -> tuple[Tensor, Features]:
        """Admit a prompt into the next row, in one forward: logits (1, 1, V) after its last token, and features."""
        pieces = self.pieces(prompt)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                result: tuple[Tensor, Features] = end.value
                return result

    @torch.no_grad()
    def pieces(self, prompt: Prompt, size: int | None = None) -> Generator[None, None, tuple[Tensor, Features]]:
        """`prefill` with a pause after every `size` rows of the text decoder; steps may run and rows be freed in it.

        The vision tower runs before the first piece, at once. A family whose decoder takes more by row than embeddings,
        positions and a plain mask (image blocks, deepstack) is filled in one piece. Closing the generator, or an error,
        leaves no trace.
        """
        target, cache, rows = self.target, self.cache, len(prompt)
        mask = prompt.inputs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and not mask.all():
            raise UserError("The prompt holds padding, which the draft tree would read as text: encode it without.")
        with cache.opening():
            row = cache.running
            cache.aim(range(row, row + 1), rows)
            door = target.at_the_door(prompt.inputs, self._past) | self._given
            plain = _is_plain(door)
            size = size if size and plain else rows
            parts = []
            for start in range(0, rows, size):
                if start:
                    yield
                stop = min(start + size, rows)
                row = cache.running  # not what it was, if a slot has ended
                cache.aim(range(row, row + 1), stop - start)
                parts.append(self._take(_piece(door, start, stop) if plain else door, plain=plain))
                cache.commit(stop - start)
                cache.settle([stop - start], row)
            hidden = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
            target.calibrate(prompt.inputs, hidden[0, -1])
            logits = target.logits(hidden[:, -1:])
            positions = door.get("position_ids")
            self._offsets[row].fill_(0 if positions is None else _turned(positions).amax() + 1 - rows)
        features = Features(
            tokens=prompt.ids[None],
            hidden=hidden.to(target.device),
            embeds=door["inputs_embeds"].to(target.device),
            positions=torch.arange(rows)[None],
            image=prompt.image[None],
            lengths=torch.tensor([rows]),
        )
        return logits, features

    def rehearse(self) -> None:
        """Let the model show now what it else shows at the first prompt, before a graph is recorded without it."""
        if not self.target.calibrated:
            ids = torch.zeros(2, dtype=torch.long)
            inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
            self.prefill(Prompt(ids, inputs, ids.bool()))
            self.free(self.cache.running - 1)

    def recordings(self, place: Place | None) -> list[Callable[[], bool]]:
        """What records the passes over short prompts, a size each; nothing where they cannot be recorded.

        place  of the graphs of the steps, which run in turn with these
        """
        self.target.record_towers()
        if self._graphs is None and self._fused:
            self._graphs = PromptGraphs(self._fused, self.cache, self.target.embedding.weight, place)
        if self._graphs is None or not self._graphs.recorder.on:
            return []
        return [partial(self._graphs.recorder.ready, size) for size in self._graphs.sizes]

    @torch.no_grad()
    def score(self, tree: DraftTree, horizon: int = 0) -> tuple[Tensor, Tensor]:
        """One pass over every node of the first B rows: logits (B, N, V) and hidden states (B, N, H). No host read.

        horizon  a bound of the committed rows of every slot: how far the pass looks; 0 looks as far as it must
        """
        target, cache, batch = self.target, self.cache, len(tree.tokens)
        cache.aim(range(batch), tree.size, horizon=horizon)
        lengths = cache.lengths[:batch]
        positions = (lengths + self._offsets[:batch])[:, None] + tree.depth
        mask = TreeMask(lengths, tree.ancestors, tree.depth)
        embeds = target.embed(tree.tokens)
        if self._fused:
            hidden = self._fused(embeds, positions, cache, partial(tree_attention, mask=mask))
        else:
            hidden = self._decode(embeds, positions, mask).to(target.device)
        return target.logits(hidden), hidden

    def keep(self, path: Tensor, counts: Tensor) -> None:
        """Commit the accepted path of the first B rows; the drafted rest is forgotten."""
        self.cache.keep(path, counts)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, held from the start."""
        return self.cache.nbytes

    def settle(self, counts: Sequence[int]) -> None:
        """How many rows each running slot kept, once the host knows."""
        self.cache.settle(counts)

    def free(self, row: int) -> None:
        """Forget a slot; the last running one takes its row."""
        last = self.cache.running - 1
        self._offsets[row] = self._offsets[last]
        self.cache.free(row)

    def _take(self, door: Mapping[str, Any], *, plain: bool) -> Tensor:
        """Hidden states of a prompt's next rows, written where the cache was last aimed."""
        cache = self.cache
        if not (self._fused and plain and cache.columns <= self._fused.reach):
            return self.target.decoder(**door).last_hidden_state
        embeds, positions = door["inputs_embeds"], door.get("position_ids")
        if positions is None:
            positions = torch.arange(cache.before, cache.columns, device=embeds.device)[None]
        positions = _turned(positions)
        if self._graphs and cache.before == 0:
            hidden = self._graphs(embeds, positions, cache.running)
            if hidden is not None:
                return hidden
        return self._fused(embeds, positions, cache, causal_attention)

    def _decode(self, embeds: Tensor, positions: Tensor, mask: TreeMask) -> Tensor:
        """Hidden states by the model's own decoder."""
        decoder, columns = self.target.decoder, self.cache.columns
        if is_ours(decoder):
            # Our attention reads the tree itself; a 4-D mask of any content keeps the model from making its own.
            full = sliding = embeds.new_zeros(1, 1, 1, 1)
        else:
            # The additive float mask in the query's dtype: the only form that is right under eager and sdpa alike.
            full = sliding = mask.additive(columns, embeds.dtype)
            if self._window is not None:
                sliding = mask.additive(columns, embeds.dtype, window=self._window)
        return decoder(
            inputs_embeds=embeds,
            attention_mask=full if self._window is None else {"full_attention": full, "sliding_attention": sliding},
            position_ids=positions.expand(3, -1, -1) if self._axes == 3 else positions,
            **self._given,
            **({"tree": mask} if is_ours(decoder) else {}),
        ).last_hidden_state


def _rows(weight: Tensor, which: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(weight.detach()[which.to(weight.device)].to(device), requires_grad=False)


def _turned(positions: Tensor) -> Tensor:
    """What rows turn by, (B, n) or M-RoPE's (3, B, n), of these or of (4, B, n), whose first is the number in text."""
    return positions[1:] if positions.ndim == 3 and positions.shape[0] == 4 else positions


# What a decoder takes that is about rows and can be cut between any two of them.
_BY_ROW = ("inputs_embeds", "position_ids", "cache_position")


def _is_plain(door: Mapping[str, Any]) -> bool:
    """Whether a decoder's inputs are embeddings, positions and no more than a padding mask."""
    mask = door.get("attention_mask")
    rest = (value for name, value in door.items() if name not in (*_BY_ROW, "attention_mask"))
    plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    return plain and not any(isinstance(value, (Tensor, Mapping, list, tuple)) for value in rest)


def _piece(door: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The inputs of some rows. The mask is of ones alone, which the decoder's own causal mask makes needless."""
    cut = {name: door[name] for name in _BY_ROW if door.get(name) is not None}
    embeds = cut.pop("inputs_embeds")[:, start:stop]
    return {
        **door,
        **{name: value[..., start:stop] for name, value in cut.items()},
        "inputs_embeds": embeds,
        "attention_mask": None,
    }
