"""The testbed's two small VLMs as ordinary Hugging Face models: configs, processors, prompts, saving and loading.

Both families share one text shape (256 wide, 16 layers, 2 query heads of 128 over 1 KV head, tied embeddings,
vocabulary 2048: Qwen2.5-VL ties the head width to hidden / heads in its modelling code, so 256 it is for both)
and one vision shape (160 wide, 6 layers, 5 heads of 32). A picture becomes about 256 tokens of 16 x 16 pixels.
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from testbed.tokenizer import LLAVA_SPECIALS, QWEN_SPECIALS, VOCAB_SIZE

CONTEXT = 4096
SIDE = 256  # LLaVA pictures, pixels
TOKEN_PIXELS = 16  # side of the square one visual token stands for, both families
QWEN_PIXELS = {"shortest_edge": 57_344, "longest_edge": 65_536}  # least and most pixels of a Qwen picture

LLAVA_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- 'ASSISTANT: ' if message['role'] == 'assistant' else ('USER: ' if message['role'] == 'user' else '') -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '</s>' if message['role'] == 'assistant' else ' ' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
QWEN_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Family:
    """A family's text: the prompt is `before` + the image tokens + `after`; the answer ends in `end`."""

    name: str
    specials: tuple[str, ...]  # ids 0, 1, 2, ... in this order
    image: str
    before: str
    after: str  # with {question}
    answer: str  # with {answer}
    pad: str
    end: str
    template: str


LLAVA = Family(
    name="llava",
    specials=LLAVA_SPECIALS,
    image="<image>",
    before="USER: ",
    after="\n{question} ASSISTANT:",
    answer=" {answer}</s>",
    pad="<pad>",
    end="</s>",
    template=LLAVA_TEMPLATE,
)
QWEN = Family(
    name="qwen2_5_vl",
    specials=QWEN_SPECIALS,
    image="<|image_pad|>",
    before="<|im_start|>user\n<|vision_start|>",
    after="<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n",
    answer="{answer}<|im_end|>",
    pad="<|endoftext|>",
    end="<|im_end|>",
    template=QWEN_TEMPLATE,
)
FAMILIES = {family.name: family for family in (LLAVA, QWEN)}


@dataclass(frozen=True)
class Shape:
    """Widths and depths; `TINY` is for tests and dry runs."""

    hidden: int = 256
    layers: int = 16
    mlp: int = 272
    vision: int = 160
    vision_layers: int = 6
    clip_mlp: int = 512
    qwen_mlp: int = 224

    @property
    def head(self) -> int:
        """Width of one of the two query heads."""
        return self.hidden // 2

    @property
    def full_attention(self) -> tuple[int, int]:
        """The two Qwen vision blocks that see the whole picture: the middle one and the last."""
        return (self.vision_layers - 1) // 2, self.vision_layers - 1


FULL = Shape()
TINY = Shape(hidden=64, layers=2, mlp=128, vision_layers=3, clip_mlp=160, qwen_mlp=160)


def build(family: str, shape: Shape = FULL) -> PreTrainedModel:
    """A freshly initialised model (on the current default device), embeddings tied, in float32."""
    config = _llava_config(shape) if family == LLAVA.name else _qwen_config(shape)
    kind = LlavaForConditionalGeneration if family == LLAVA.name else Qwen2_5_VLForConditionalGeneration
    model = kind(config)
    ids = {name: FAMILIES[family].specials.index(name) for name in (FAMILIES[family].pad, FAMILIES[family].end)}
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ids[FAMILIES[family].end], pad_token_id=ids[FAMILIES[family].pad]
    )
    return model


def initialise(model: PreTrainedModel) -> PreTrainedModel:
    """Normal weights of 0.02; what writes into a residual stream of L layers is scaled by 1/sqrt(2L) (GPT-2)."""
    text, vision = model.config.get_text_config(), model.config.vision_config
    depth = {True: getattr(vision, "depth", None) or vision.num_hidden_layers, False: text.num_hidden_layers}
    writers = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight", "attn.proj.weight")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2 and "embedding" not in name:
                continue  # norms stay at one, biases at zero
            is_vision = "visual" in name or "vision" in name
            scale = 1 / math.sqrt(2 * depth[is_vision]) if name.endswith(writers) else 1.0
            nn.init.normal_(weight, std=0.02 * scale)
    return model


def tokenizer(family: str, core: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a trained tokenizer with the family's special tokens."""
    of = FAMILIES[family]
    names = {"image_token": of.image}
    if family == QWEN.name:
        names |= {
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        }
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=of.pad,
        eos_token=of.end,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=names,
    )


def processor(family: str, core: Tokenizer) -> ProcessorMixin:
    """The family's processor around a trained tokenizer; the Qwen one has no video part (that needs torchvision)."""
    made = _processor(family, _image_processor(family), tokenizer(family, core))
    made.chat_template = FAMILIES[family].template
    return made


def load_processor(folder: str | Path) -> ProcessorMixin:
    """A saved processor, with Pillow pictures on every machine (torchvision resizes slightly differently)."""
    folder = Path(folder)
    family = json.loads((folder / "config.json").read_text())["model_type"]
    made = _processor(family, _image_processor(family), PreTrainedTokenizerFast.from_pretrained(folder))
    made.chat_template = (folder / "chat_template.jinja").read_text()
    return made


def save(model: PreTrainedModel, made: ProcessorMixin, folder: str | Path) -> None:
    """Write a bf16 checkpoint that the Auto classes load. `model` keeps its own precision."""
    folder = Path(folder)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    made.save_pretrained(folder)
    # Named by backend when saved; the plain name lets each machine take the backend it has.
    path = folder / "processor_config.json"
    path.write_text(path.read_text().replace('ImageProcessorPil"', 'ImageProcessor"'))


def load(folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A saved checkpoint, in evaluation mode."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()


def _llava_config(shape: Shape) -> LlavaConfig:
    text = LlamaConfig(
        head_dim=shape.head,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        **_text(shape, LLAVA),
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.vision,
        intermediate_size=shape.clip_mlp,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=5,
        image_size=SIDE,
        patch_size=TOKEN_PIXELS,
        projection_dim=shape.vision,
    )
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=LLAVA.specials.index(LLAVA.image),
        image_seq_length=(SIDE // TOKEN_PIXELS) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def _qwen_config(shape: Shape) -> Qwen2_5_VLConfig:
    half = shape.hidden // 4  # rotated pairs of one of the two heads, shared 2 : 3 : 3 by time, row and column
    sections = [half // 4, 3 * half // 8, 3 * half // 8]
    text = Qwen2_5_VLTextConfig(
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections},
        **_text(shape, QWEN),
    )
    vision = Qwen2_5_VLVisionConfig(
        depth=shape.vision_layers,
        hidden_size=shape.vision,
        intermediate_size=shape.qwen_mlp,
        num_heads=5,
        patch_size=TOKEN_PIXELS // 2,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=64,
        fullatt_block_indexes=list(shape.full_attention),
        out_hidden_size=shape.hidden,
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=QWEN.specials.index("<|image_pad|>"),
        video_token_id=QWEN.specials.index("<|video_pad|>"),
        vision_start_token_id=QWEN.specials.index("<|vision_start|>"),
        vision_end_token_id=QWEN.specials.index("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def _text(shape: Shape, family: Family) -> dict[str, object]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": family.specials.index(family.end),
        "pad_token_id": family.specials.index(family.pad),
    }


def _image_processor(family: str) -> CLIPImageProcessorPil | Qwen2VLImageProcessorPil:
    if family == LLAVA.name:
        side = {"height": SIDE, "width": SIDE}
        return CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
    return Qwen2VLImageProcessorPil(
        size=dict(QWEN_PIXELS), patch_size=TOKEN_PIXELS // 2, merge_size=2, temporal_patch_size=2
    )


def _processor(family: str, pictures: object, words: PreTrainedTokenizerFast) -> ProcessorMixin:
    if family == LLAVA.name:
        return LlavaProcessor(
            image_processor=pictures,
            tokenizer=words,
            patch_size=TOKEN_PIXELS,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    return _ImageOnlyQwen(image_processor=pictures, tokenizer=words)


class _ImageOnlyQwen(Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` without its video half. Saved under the parent's name, which others load."""

    video_processor = None

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


_ImageOnlyQwen.__name__ = "Qwen2_5_VLProcessor"
