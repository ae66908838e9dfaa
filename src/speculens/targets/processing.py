"""From a conversation to the tensors of one forward pass, for any Hugging Face image-text-to-text model."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoProcessor,
    AutoTokenizer,
    Idefics3Processor,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers import logging as transformers_logging
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from speculens.conversation import Conversation
from speculens.errors import UserError, first_line

# Families whose prompt is no dialogue: pictures first, then one text. Their processors have no chat template by nature.
PLAIN_PROMPT = {"paligemma"}
# Image processors made of Pillow and NumPy alone that the Auto classes of 5.17 refuse to load without torchvision.
PILLOW_ONLY = {"idefics3": "Idefics3ImageProcessorPil", "smolvlm": "SmolVLMImageProcessorPil"}


def load_processor(
    name: str, config: PreTrainedConfig, revision: str | None = None, chat_template: str | None = None
) -> ProcessorMixin:
    """The processor in the folder or Hub repository `name`, for pictures and text; it never touches videos.

    `chat_template` (Jinja) replaces the stored one. Raises UserError where there is no usable processor or template.
    """
    try:
        with _quiet():
            processor = _load(name, config, revision)
    except (OSError, ValueError, TypeError, ImportError, AttributeError, LookupError) as error:
        raise UserError(
            f"{name} has no usable processor for a {config.model_type} model: {first_line(error)}"
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UserError(f"{name} has no processor for pictures and text, so it is no vision-language model.")
    processor.chat_template = chat_template or processor.chat_template or processor.tokenizer.chat_template
    _require_template(processor, config)
    return processor


def _load(name: str, config: PreTrainedConfig, revision: str | None) -> Any:
    cls: Any = PROCESSOR_MAPPING.get(type(config), None)
    if config.model_type in PILLOW_ONLY and not is_torchvision_available():
        cls, images = image_only(cls), _pillow_class(config.model_type)
        settings, _ = cls.get_processor_dict(name, revision=revision)
        parts = [part.from_pretrained(name, revision=revision) for part in (images, AutoTokenizer)]
        return cls.from_args_and_dict(parts, settings)
    if cls is not None and "video_processor" in cls.get_attributes():
        return image_only(cls).from_pretrained(name, revision=revision)
    return AutoProcessor.from_pretrained(name, revision=revision)


def image_only(cls: Any) -> Any:
    """The processor class `cls` without its video half, which would need torchvision (and SmolVLM's num2words)."""
    # `__init__` stays the parent's: `from_pretrained` reads its argument names to decide which saved settings to pass.
    # SmolVLM's wants its video half; what it does with pictures is Idefics3's, token for token.
    parent = Idefics3Processor if cls.__name__ == "SmolVLMProcessor" else cls
    attributes = ["image_processor", "tokenizer"]
    return type(cls.__name__, (parent,), {"get_attributes": classmethod(lambda _: attributes), "video_processor": None})


def _pillow_class(family: str) -> Any:
    module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    return getattr(module, PILLOW_ONLY[family])


def described(processor: ProcessorMixin) -> dict[str, Any]:
    """All that its encodings depend on, in plain JSON types: versions, settings, template and tokenizer."""
    tokenizer: Any = processor.tokenizer
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = fast.to_str() if fast is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "transformers": transformers.__version__,
        "processor": json.loads(processor.to_json_string()),
        "chat_template": processor.chat_template,
        "tokenizer": type(tokenizer).__name__,
        "bos": tokenizer.bos_token,
        "words": hashlib.sha256(words.encode()).hexdigest(),
    }


def encode(
    processor: ProcessorMixin,
    config: PreTrainedConfig,
    conversation: Conversation,
    *,
    add_generation_prompt: bool = True,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The inputs of one forward (`input_ids (1, n)`, pixels, token types, ...), and `image (n,)` bool, its image rows.

    Never truncated. Raises UserError where there is no message, where the prompt and the pictures do not belong
    together, or where the family refuses the conversation (PaliGemma's processor one without a picture, for one).
    """
    if not conversation.messages:
        raise UserError("The conversation has no message before an answer.")
    pictures = list(conversation.images)
    if processor.chat_template is None and config.model_type in PLAIN_PROMPT:
        text, extra = _plain_prompt(processor, conversation, add_generation_prompt)
    else:
        text, extra = _chat_prompt(processor, config, conversation, add_generation_prompt), {}
    _check_placeholders(processor, config, text, len(pictures))
    inputs = _call(processor, text, pictures, extra)
    image = inputs["input_ids"][0] == image_token_id(config)
    if int(image.sum()) < len(pictures):
        raise UserError(
            f"{len(pictures)} pictures became {int(image.sum())} image tokens: this processor does not fit the model."
        )
    return _fit(inputs, config, image), image


def image_token_id(config: PreTrainedConfig) -> int:
    """The token id that stands for one row of picture features."""
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise UserError(f"A {config.model_type} model names no image token, so its picture rows cannot be found.")


def pixel_bounds(processor: Any) -> tuple[int | None, int | None]:
    """Least and most pixels of a picture, where the processor scales pictures to an area; else None and None."""
    images = getattr(processor, "image_processor", None)
    size = getattr(images, "size", None)
    least, most = (getattr(size, name, None) for name in ("shortest_edge", "longest_edge"))
    # Other processors mean the length of an edge; those whose patches are merged mean areas.
    return (least, most) if least and most and hasattr(images, "merge_size") else (None, None)


def _require_template(processor: Any, config: PreTrainedConfig) -> None:
    if processor.chat_template is None and config.model_type not in PLAIN_PROMPT:
        raise UserError(
            "This target has no chat template, neither in its processor nor in its tokenizer: it was not trained to "
            "chat. If you know its prompt format, give it as a Jinja chat_template."
        )


def _chat_prompt(processor: Any, config: PreTrainedConfig, conversation: Conversation, open_end: bool) -> str:
    _require_template(processor, config)
    try:
        return str(processor.apply_chat_template(conversation.to_chat(), add_generation_prompt=open_end))
    except (TemplateError, ValueError, TypeError) as error:
        raise UserError(f"The target's chat template refuses this conversation: {first_line(error)}") from error


def _plain_prompt(processor: Any, conversation: Conversation, open_end: bool) -> tuple[str, dict[str, Any]]:
    """All pictures, then the text; PaliGemma's processor puts <bos> between them and a line break behind.

    Within the prompt its attention is bidirectional. A last answer must not be part of that, so it goes in as a suffix.
    """
    messages, extra = conversation.messages, {}
    if not open_end and messages and messages[-1].role == "assistant":
        extra = {"suffix": _text(messages[-1:])}
        messages = messages[:-1]
    return processor.image_token * len(conversation.images) + _text(messages), extra


def _text(messages: Any) -> str:
    return "\n".join(part for message in messages for part in message.content if isinstance(part, str))


def _check_placeholders(processor: Any, config: PreTrainedConfig, text: str, pictures: int) -> None:
    """One placeholder per picture, and none of the tokens that only a processor may write."""
    placeholder = getattr(processor, "image_token", None)
    ids = (image_token_id(config), getattr(config, "video_token_id", None))
    reserved = {processor.tokenizer.convert_ids_to_tokens(token) for token in ids if token is not None}
    for name in sorted(reserved - {placeholder, None}):
        if name in text:
            raise UserError(f"A message contains {name!r}, which this target reserves for itself: please reword it.")
    if placeholder is not None and text.count(placeholder) != pictures:
        raise UserError(
            f"The prompt has {text.count(placeholder)} marks {placeholder!r} for {pictures} pictures: either a message "
            "spells that mark out, which must be reworded, or the target's chat template leaves pictures out."
        )


def _call(processor: Any, text: str, pictures: list[Any], extra: dict[str, Any]) -> dict[str, Any]:
    # A tokenizer's saved settings may ask for truncation or padding; a cut prompt would be another prompt.
    plain: dict[str, Any] = {"truncation": False, "padding": False}
    bos = processor.tokenizer.bos_token
    if bos is not None and text.startswith(bos):  # the template wrote it; once is enough
        plain["add_special_tokens"] = False
    try:
        with _quiet():
            return dict(
                processor(
                    text=[text],
                    images=[pictures] if pictures else None,
                    text_kwargs=plain,
                    return_tensors="pt",
                    **extra,
                )
            )
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"The target's processor refuses this conversation: {first_line(error)}") from error


def _fit(inputs: dict[str, Any], config: PreTrainedConfig, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keep what the model takes; add the token types, without which some families go wrong silently."""
    kept = {name: value for name, value in inputs.items() if torch.is_tensor(value) and name != "labels"}
    model: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if model is None:
        return kept
    taken = inspect.signature(model.forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in taken and name not in kept:
            kept[name] = image[None].to(kept["input_ids"].dtype)
    return {name: value for name, value in kept.items() if name in taken}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hush what the library says to its developers: deprecations, renamed files, fallbacks to Pillow."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
