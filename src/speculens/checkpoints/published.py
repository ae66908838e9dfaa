"""Drafters in the layouts of the public code: EAGLE and EAGLE-2, ViSpec, HiViS.

Such a folder holds config.json (a Llama-like config that names neither method nor target) and model.safetensors or
pytorch_model.bin. Which layout it is, and every size, is read from the tensors; the target tells the rest.
`embed_tokens.weight`, a copy of the target's, is compared with the target and not kept; it is written for other code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from speculens.checkpoints.files import load_state, read_values, read_weights
from speculens.drafters import METHODS, DrafterConfig, TrainedDrafter
from speculens.errors import UserError
from speculens.targets.base import Target
from speculens.tree import TreeShape

ATTENTION, MLP = "layers.0.self_attn", "layers.0.mlp"
EMBEDDING = "embed_tokens.weight"
OLD_NAMES = {"adaptive_embedding": "residual"}  # HiViS, first version
# Of the target or computed: some files hold them, none needs to.
NOT_OURS = ("lm_head.weight", f"{ATTENTION}.rotary_emb.inv_freq")
PLAIN_ROPE = (None, "default", "mrope")  # drafters have plain positions also where the target has M-RoPE


@dataclass(frozen=True)
class Layout:
    """One way in which drafters are published.

    method   the method it holds
    tree     the tree of its public code, which its files do not name
    options  the method's options, from the tensors and the target
    misfit   why the public code would compute something else than a drafter of this method; None if it would not
    """

    method: str
    tree: TreeShape
    options: Callable[[Mapping[str, Tensor], Target], dict[str, Any]]
    misfit: Callable[[Any, Target], str | None]


def _vispec_options(state: Mapping[str, Tensor], _target: Target) -> dict[str, Any]:
    num_q, heads, head_dim = state["imadpt.q"].shape
    return {"num_q": num_q, "adaptor_heads": heads, "adaptor_head_dim": head_dim}


def _vispec_misfit(drafter: Any, target: Target) -> str | None:
    if drafter.options.fusion == "none":
        return "it was made without a global vector"
    heads = drafter.config.num_attention_heads
    usual = (heads, target.hidden_size // heads)
    return None if drafter.imadpt.q.shape[1:] == usual else "its adaptor has other heads than its layer"


def _hivis_options(state: Mapping[str, Tensor], target: Target) -> dict[str, Any]:
    """The public code also hides the token behind a picture's frame, where the family has frames."""
    given = {"border": "after", "steps": len(state["residual"])}
    return METHODS["hivis"].settle(given, target.model.config)


def _hivis_misfit(drafter: Any, target: Target) -> str | None:
    own = asdict(drafter.options)
    if not own["step_embedding"]:
        return "it was made without step embeddings"
    needed = _hivis_options(drafter.state_dict(), target)
    framed = bool(needed["frame"])  # without a frame there is no border to differ in
    wrong = [
        f"{name} {own[name]} and not {needed[name]}"
        for name in ("positions", "border")
        if own[name] != needed[name] and (framed or name != "border")
    ]
    return f"it was made with {', '.join(wrong)}" if wrong else None


LAYOUTS = {
    "eagle": Layout(
        "eaglevlm",
        TreeShape(num_steps=5, topk=10, num_draft_tokens=60),
        options=lambda _state, _target: {},
        misfit=lambda _drafter, _target: None,
    ),
    "vispec": Layout(
        "vispec", TreeShape(num_steps=3, topk=8, num_draft_tokens=30), options=_vispec_options, misfit=_vispec_misfit
    ),
    "hivis": Layout(
        "hivis", TreeShape(num_steps=5, topk=10, num_draft_tokens=60), options=_hivis_options, misfit=_hivis_misfit
    ),
}


# Reading


def is_published(folder: Path) -> bool:
    """Whether a folder's config.json is not one of ours."""
    return "speculator_type" not in read_values(folder)


def load_published(folder: Path, target: Target | None) -> TrainedDrafter:
    """A drafter from a folder in one of LAYOUTS, for the target that it was made for.

    Raises UserError without a target, or if the file is of another kind, broken, or made for another target.
    """
    if target is None:
        raise UserError(
            f"{folder} names no speculator_type in its config.json, so it is not a drafter in our layout. If it is a "
            "published one (EAGLE, ViSpec, HiViS), name its target too, or bring it into our layout with "
            "`speculens export --to ours`."
        )
    values = read_values(folder)
    state = {OLD_NAMES.get(name, name): tensor for name, tensor in read_weights(folder).items()}
    state = {name: tensor for name, tensor in state.items() if name not in NOT_OURS}
    embedding = state.pop(EMBEDDING, None)
    layout = LAYOUTS[_layout_of(state, folder)]
    try:
        config = _read_config(layout, values, state, target)
    except KeyError as error:
        raise UserError(f"{folder} lacks {error.args[0]}, so it cannot be read as a published drafter.") from None
    if embedding is not None:
        _check_embedding(embedding, target, folder)
    state.setdefault("fc.bias", torch.zeros_like(state["fc.weight"][:, 0]))  # `bias: false` in its config
    return load_state(METHODS[layout.method](config), state, folder)


def _layout_of(state: Mapping[str, Tensor], folder: Path) -> str:
    """By the tensors that only one layout has."""
    if "imadpt.q" in state:
        return "vispec"
    if "residual" in state:
        return "hivis"
    if "fc.weight" in state and state["fc.weight"].shape[1] == 2 * state["fc.weight"].shape[0]:
        return "eagle"
    raise UserError(f"The tensors in {folder} are those of no published layout known here: {', '.join(LAYOUTS)}.")


def _read_config(
    layout: Layout, values: Mapping[str, Any], state: Mapping[str, Tensor], target: Target
) -> DrafterConfig:
    """Sizes from the tensors; heads, RoPE base and epsilon from config.json; raises KeyError on what is missing."""
    _check_kind(values)
    size = state["fc.weight"].shape[0]
    if size != target.hidden_size:
        raise UserError(
            f"This drafter was made for a target of hidden size {size}, but this target has {target.hidden_size}."
        )
    heads = values["num_attention_heads"]
    head_dim = len(state[f"{ATTENTION}.q_proj.weight"]) // heads
    rope = values.get("rope_parameters") or values
    return DrafterConfig(
        speculator_type=layout.method,
        target_hidden_size=size,
        target_vocab_size=target.vocab_size,
        target_family=target.family,
        intermediate_size=len(state[f"{MLP}.gate_proj.weight"]),
        num_attention_heads=heads,
        num_key_value_heads=len(state[f"{ATTENTION}.k_proj.weight"]) // head_dim,
        head_dim=head_dim,
        image_contract=METHODS[layout.method].image_contract,
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or 10000.0),
        qkv_bias=f"{ATTENTION}.q_proj.bias" in state,
        input_norm="layers.0.input_layernorm.weight" in state,
        tree=layout.tree,
        options=layout.options(state, target),
    )


def _check_kind(values: Mapping[str, Any]) -> None:
    """Refuse what our layer does not compute."""
    scaling = values.get("rope_scaling") or {}
    for name, value, known in (
        ("rope_scaling", scaling.get("rope_type") or scaling.get("type"), PLAIN_ROPE),
        ("hidden_act", values.get("hidden_act", "silu"), ("silu",)),
        ("num_hidden_layers", values.get("num_hidden_layers", 1), (1,)),
    ):
        if value not in known:
            raise UserError(f"A published drafter whose {name} is {value} cannot be used here; known is {known[-1]}.")


def _check_embedding(given: Tensor, target: Target, folder: Path) -> None:
    """A copy of another target's embedding means another target. 256 tokens over the vocabulary tell."""
    if target.device.type == "meta":  # an outline without weights
        return
    tokens = torch.linspace(0, min(len(given), target.vocab_size) - 1, 256).long()
    own = target.embed(tokens.to(target.device)).float().cpu()
    far = (given[tokens].float() - own).norm(dim=1) > 0.05 * own.norm(dim=1)
    if far.float().mean() > 0.1:  # a few may be tokens that were added later
        raise UserError(f"{folder} was made for another target: the embedding stored in it is not this target's.")


# Writing


def save_published(drafter: TrainedDrafter, layout: str, folder: str | Path, target: Target) -> Path:
    """Write a drafter for the public code of its paper. Returns the folder.

    Raises UserError if that code would compute something else than this drafter does.
    """
    folder, config = Path(folder), drafter.config
    state = {name: tensor.detach().cpu() for name, tensor in drafter.state_dict().items()}
    _check_writable(drafter, layout, target)
    state |= _as_published(state)
    tokens = torch.arange(target.vocab_size, device=target.device)
    state[EMBEDDING] = target.embed(tokens).detach().cpu().to(state["fc.weight"].dtype)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    values = {
        "model_type": "llama",
        "hidden_size": config.target_hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": target.context,
        "vocab_size": target.vocab_size,
        "pad_token_id": getattr(target.tokenizer, "pad_token_id", None) or 0,
        "qkv_bias": config.qkv_bias,
        "bias": True,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "torch_dtype": str(state["fc.weight"].dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    return folder


def _as_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are written otherwise than we hold them: `f + W g` is `[I | W]` on `[f ; g]`."""
    weight = state.get("img_fc.weight")
    if weight is None or weight.shape[0] != weight.shape[1]:
        return {}
    return {"img_fc.weight": torch.cat([torch.eye(len(weight), dtype=weight.dtype), weight], dim=1)}


def _check_writable(drafter: TrainedDrafter, layout: str, target: Target) -> None:
    """Refuse what the layout cannot say, since the public code would then silently compute something else."""
    config, kind = drafter.config, LAYOUTS[layout]
    if kind.method != drafter.name:
        own = next((name for name, other in LAYOUTS.items() if other.method == drafter.name), "ours")
        raise UserError(f"A drafter of the method {drafter.name} cannot be written in the layout {layout}: use {own}.")
    if config.draft_vocab_size is not None:
        raise UserError(f"The layout {layout} drafts every token: export the drafter from which this one was trimmed.")
    if config.input_norm:
        raise UserError(f"The layout {layout} has no input norm: train the drafter with drafter.input_norm=false.")
    if config.num_attention_heads * config.head_dim != config.target_hidden_size:
        raise UserError(
            f"The layout {layout} has heads of width {config.target_hidden_size} / {config.num_attention_heads}, "
            f"and this drafter's are {config.head_dim} wide."
        )
    if reason := kind.misfit(drafter, target):
        raise UserError(f"The public code of {layout} cannot run this drafter: {reason}.")
