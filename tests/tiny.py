"""Tiny random vision-language models with real processors: every family Speculens is tested on, built offline in code.

`model(family)` and `processor(family)` fit each other: one byte-level vocabulary, pictures of 4 to 24 image tokens.
Both are cached, so treat them as read-only. Their text is nonsense, but never constant, and it depends on the picture.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from speculens.conversation import Conversation, Message
from speculens.targets import processing

HIDDEN = 64
LAYERS = 4
TEXT = dict(
    hidden_size=HIDDEN,
    intermediate_size=128,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
)
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
SIGLIP = dict(TOWER, model_type="siglip_vision_model", vision_use_head=False)
GRID = [[28, 56], [56, 28], [56, 56]]
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_TOWER = dict(depth=2, num_heads=2, patch_size=14, temporal_patch_size=2, spatial_merge_size=2)
QWEN_TOKENS = dict(
    image_token="<|image_pad|>",
    video_token="<|video_pad|>",
    vision_start_token="<|vision_start|>",
    vision_end_token="<|vision_end|>",
)
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_IDS = {f"{name}_id": name for name in QWEN_TOKENS}
QWEN_SIZE = dict(
    patch_size=14, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
)
IDEFICS_TOKENS = dict(
    image_token="<image>",
    fake_image_token="<fake_token_around_image>",
    global_image_token="<global-img>",
    end_of_utterance_token="<end_of_utterance>",
) | {f"row_{row}_col_{column}": f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)}
GEMMA3_TOKENS = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")


@dataclass(frozen=True)
class Family:
    """What makes one family differ from another.

    `name` is the Hugging Face class prefix; `text`, `vision` and `config` are configuration values; `ids` maps a key of
    the configuration to a name in `tokens`; `images` is an image processor (package.prefix) and its arguments;
    `placeholder` is what the chat template writes for a picture, before the processor expands it.
    """

    name: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    images: tuple[str, Mapping[str, Any]]
    tokens: Mapping[str, str] = field(default_factory=lambda: {"image_token": "<image>"})
    placeholder: str = "<image>"
    ids: Mapping[str, str] = field(default_factory=lambda: {"image_token_id": "image_token"})
    config: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = True  # False: the family has no chat template by nature
    attention: str = "sdpa"
    embedding: float = 0.6  # standard deviation of the token embeddings
    final_norm: float | None = None  # weight of the last norm, where tied embeddings make the logits too flat


LLAVA = Family(
    name="Llava",
    text={"model_type": "llama"},
    vision=dict(TOWER, model_type="clip_vision_model", num_hidden_layers=3, image_size=28, projection_dim=32),
    config={"image_seq_length": 4},
    images=("clip.CLIP", {"size": {"shortest_edge": 28}, "crop_size": 28}),
    processor={"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
)
QWEN2_VL = Family(
    name="Qwen2VL",
    text={"rope_parameters": ROPE},
    vision=dict(QWEN_TOWER, embed_dim=32, hidden_size=HIDDEN, mlp_ratio=2, in_channels=3),
    tokens=QWEN_TOKENS,
    placeholder=QWEN_PICTURE,
    ids=QWEN_IDS,
    images=("qwen2_vl.Qwen2VL", QWEN_SIZE),
)
QWEN_VISION = dict(QWEN_TOWER, hidden_size=32, intermediate_size=48, out_hidden_size=HIDDEN)
IDEFICS3 = Family(
    name="Idefics3",
    text={"model_type": "llama"},
    vision=dict(TOWER, image_size=56),
    config={"scale_factor": 2},
    tokens=IDEFICS_TOKENS,
    images=("idefics3.Idefics3", {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}),
    processor={"image_seq_len": 4},
)
# Gemma multiplies embeddings by sqrt(HIDDEN) and norms by 1 + weight; small embeddings keep it from echoing its input.
GEMMA = dict(embedding=0.02, final_norm=16.0)
GEMMA3 = Family(
    name="Gemma3",
    text=dict(
        sliding_window=24, layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2), query_pre_attn_scalar=16
    ),
    vision=dict(SIGLIP, image_size=56),
    config={"mm_tokens_per_image": 4},
    tokens=GEMMA3_TOKENS,
    placeholder="<start_of_image>",
    ids={"image_token_id": "image_token", "boi_token_index": "boi_token", "eoi_token_index": "eoi_token"},
    images=("gemma3.Gemma3", {"size": {"height": 56, "width": 56}}),
    processor={"image_seq_length": 4},
    **GEMMA,
)
PALIGEMMA = Family(
    name="PaliGemma",
    text={"model_type": "gemma"},
    vision=dict(SIGLIP, image_size=28, projection_dim=HIDDEN),
    config={"projection_dim": HIDDEN, "hidden_size": HIDDEN},
    images=("siglip.Siglip", {"size": {"height": 28, "width": 28}, "image_seq_length": 4}),
    chat=False,
    **GEMMA,
)


def _like(family: Family, **changes: Any) -> Family:
    merged = {k: {**getattr(family, k), **v} if isinstance(v, dict) else v for k, v in changes.items()}
    return Family(**{**vars(family), **merged})


TABLE: dict[str, Family] = {
    "llava": LLAVA,
    "llava_next": Family(
        name="LlavaNext",
        text=LLAVA.text,
        vision=LLAVA.vision,
        config={"image_seq_length": 4, "image_grid_pinpoints": GRID},
        images=("llava_next.LlavaNext", {"size": {"shortest_edge": 28}, "crop_size": 28, "image_grid_pinpoints": GRID}),
        processor=LLAVA.processor,
    ),
    "llava_onevision": Family(
        name="LlavaOnevision",
        text={"model_type": "qwen2"},
        vision=dict(SIGLIP, image_size=28),
        config=dict(image_grid_pinpoints=GRID, vision_feature_layer=-1, vision_feature_select_strategy="full"),
        tokens={"image_token": "<image>", "video_token": "<video>"},
        ids={"image_token_id": "image_token", "video_token_id": "video_token"},
        images=("llava_onevision.LlavaOnevision", {"size": {"height": 28, "width": 28}, "image_grid_pinpoints": GRID}),
        processor={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
    ),
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": Family(
        name="Qwen2_5_VL",
        text={"rope_parameters": ROPE},
        vision=dict(QWEN_VISION, window_size=56, fullatt_block_indexes=[1]),
        tokens=QWEN_TOKENS,
        placeholder=QWEN_PICTURE,
        ids=QWEN_IDS,
        images=QWEN2_VL.images,
    ),
    "qwen3_vl": Family(
        name="Qwen3VL",
        text={"rope_parameters": ROPE | {"mrope_interleaved": True}},
        vision=dict(QWEN_VISION, depth=3, deepstack_visual_indexes=[0, 1], num_position_embeddings=64),
        tokens=QWEN_TOKENS,
        placeholder=QWEN_PICTURE,
        ids=QWEN_IDS,
        images=QWEN2_VL.images,
    ),
    "smolvlm": _like(IDEFICS3, name="SmolVLM", images=("smolvlm.SmolVLM", IDEFICS3.images[1])),
    "idefics3": IDEFICS3,
    "internvl": Family(
        name="InternVL",
        text={"model_type": "qwen2"},
        vision=dict(TOWER, image_size=[56, 56], patch_size=[14, 14]),
        config={"image_seq_length": 4, "downsample_ratio": 0.5},
        tokens=dict(
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        placeholder="<IMG_CONTEXT>",
        ids={"image_token_id": "context_image_token"},
        images=(
            "got_ocr2.GotOcr2",
            dict(size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4),
        ),
        processor={"image_seq_length": 4},
    ),
    "gemma3": GEMMA3,
    "gemma3_wide": _like(GEMMA3, text={"sliding_window": 4096}),
    "paligemma": PALIGEMMA,
    "paligemma2": _like(
        PALIGEMMA,
        text={"model_type": "gemma2", "sliding_window": 4096, "query_pre_attn_scalar": 16},
        attention="eager",  # sdpa forgets this family's soft cap on the attention scores
    ),
}
FAMILIES = list(TABLE)

TEMPLATE = """{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: \
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}PLACEHOLDER{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\
{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
SENTENCES = [
    "What is in the picture? The picture shows a small red square on a blue field.",
    "Describe the image in detail. Two circles and one triangle are drawn near the left edge.",
    "USER: How many bars are taller than the green one? ASSISTANT: Three of the bars are taller.",
    "The chart has a title, two axes and a legend, and the largest value is forty seven.",
    "Which colour is the line that rises most between the first and the last year?",
]


@functools.cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens: any text goes in, and each single token can be decoded."""
    row = TABLE[family]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(row.tokens),
        special_tokens=["<pad>", "<s>", "</s>", *row.tokens.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=dict(row.tokens),
    )


@functools.cache
def pieces(*, leading_space: bool) -> PreTrainedTokenizerFast:
    """Pieces with ▁ for the space, and bytes for what they lack; Llama's put a space in front, and take it away."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyzüH!", "\ufffd"]
    merges = [("▁", "w"), ("▁", "▁"), ("o", "r"), ("▁w", "or"), ("l", "d"), ("▁wor", "ld")]
    names += ["".join(pair) for pair in merges]
    vocabulary = {name: token for token, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    spaces, text = normalizers.Replace(" ", "▁"), [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if leading_space else spaces
    made.decoder = decoders.Sequence([*text, decoders.Strip(" ", 1, 0)] if leading_space else text)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


@functools.cache
def processor(family: str) -> ProcessorMixin:
    """The family's own processor class over `tokenizer(family)`, with a multi-turn, multi-image chat template."""
    row = TABLE[family]
    place, arguments = row.images
    package, prefix = place.split(".")
    module = importlib.import_module(f"transformers.models.{package}.image_processing_pil_{package}")
    images = getattr(module, f"{prefix}ImageProcessorPil")(**arguments)
    cls = processing.image_only(getattr(transformers, f"{row.name}Processor"))
    made = cls(images, tokenizer(family), **row.processor)
    made.chat_template = TEMPLATE.replace("PLACEHOLDER", row.placeholder) if row.chat else None
    return made


def model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, attn: str | None = None) -> PreTrainedModel:
    """A frozen random model in evaluation mode, about 0.3 M parameters; the same weights in every `dtype` and `attn`.

    `attn` is a Hugging Face attention implementation; without it, the fastest one that is right for the family.
    """
    return _model(family, dtype, seed, attn or TABLE[family].attention)


@functools.cache
def _model(family: str, dtype: torch.dtype, seed: int, attn: str) -> PreTrainedModel:
    row = TABLE[family]
    words = tokenizer(family)
    processor(family)  # PaliGemma's adds words of its own to the tokenizer
    special = {
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    config = getattr(transformers, f"{row.name}Config")(
        text_config={**TEXT, **row.text, **special, "vocab_size": len(words)},
        vision_config=dict(row.vision),
        **{key: words.convert_tokens_to_ids(row.tokens[name]) for key, name in row.ids.items()},
        **row.config,
        **special,
    )
    cls = getattr(transformers, f"{row.name}ForConditionalGeneration")
    made = cls._from_config(config, attn_implementation=attn, dtype=dtype)
    _enliven(made, row, seed)
    _never_say(made, [words.pad_token_id, words.eos_token_id, *words.convert_tokens_to_ids(list(row.tokens.values()))])
    return made.eval().requires_grad_(False)


@torch.no_grad()
def _enliven(made: PreTrainedModel, row: Family, seed: int) -> None:
    """Weights large enough for peaked attention and logits of standard deviation 2 to 5, drawn in float64 by name."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(made.named_parameters()):
        if weight.dim() >= 2 or not name.endswith(("weight", "lambda_1", "lambda_2")):  # all but the gains of norms
            scale = 0.6 if "embed" in name else 0.25 if weight.dim() >= 2 else 0.1
            scale = row.embedding if "embed_tokens" in name else scale
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * scale)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.fill_(2)  # normalised queries and keys of unit gain would attend to everything alike
    if row.final_norm is not None:
        made.get_decoder().norm.weight.fill_(row.final_norm)


@torch.no_grad()
def _never_say(made: PreTrainedModel, ids: list[int]) -> None:
    """Logit 0, far below the best, for special tokens: the texts then have full length and can be encoded again.

    A test of the end of text declares some ordinary token of the text to be the end.
    """
    made.get_output_embeddings().weight[ids] = 0


SIZES = [(84, 56), (56, 112), (112, 84)]  # width, height: no two alike, so that grids differ


def picture(seed: int = 0, size: tuple[int, int] = SIZES[0]) -> Image.Image:
    """A random RGB picture of a few coloured blocks, so that neighbouring patches differ."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def conversation(family: str | None = None, images: int = 1, turns: int = 1, seed: int = 0) -> Conversation:
    """`turns` questions with the answers between them; the pictures come first in the first question."""
    assert images or family is None or TABLE[family].chat, f"{family} refuses a prompt without a picture"
    pictures = [picture(seed + 100 * i, SIZES[i % len(SIZES)]) for i in range(images)]
    first = (*pictures, SENTENCES[seed % len(SENTENCES)])
    messages = [Message("user", first)]
    for turn in range(1, turns):
        messages += [
            Message("assistant", (SENTENCES[(seed + turn) % len(SENTENCES)],)),
            Message("user", (SENTENCES[(seed + turn + 1) % len(SENTENCES)],)),
        ]
    return Conversation(tuple(messages))


def prompt_inputs(
    family: str, images: int = 1, turns: int = 1, seed: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """`processing.encode` of `conversation(...)`: the inputs of one forward and the (n,) bool image rows."""
    return processing.encode(processor(family), model(family).config, conversation(family, images, turns, seed))


def save(family: str, folder: Path, dtype: torch.dtype = torch.float64) -> Path:
    """Write model and processor as one directory: a checkpoint for `load_target`, as a published one would be."""
    model(family, dtype).save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return folder
