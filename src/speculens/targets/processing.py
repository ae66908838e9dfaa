"""From a conversation to the tensors of one forward pass, for any Hugging Face image-text-to-text model."""

import importlib
import inspect
import json
import warnings
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoProcessor,
    AutoTokenizer,
    Idefics3Processor,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from speculens.conversation import Conversation
from speculens.errors import UserError

# Families whose prompt is not a dialogue: pictures first, then one text. Their processors carry no chat template.
PLAIN_PROMPT = {"paligemma"}
# Pure Pillow image processors that the Auto classes believe to need torchvision.
PILLOW_ONLY = {"idefics3": "Idefics3ImageProcessorPil", "smolvlm": "SmolVLMImageProcessorPil"}


def load_processor(
    name: str, config: PreTrainedConfig, revision: str | None = None, chat_template: str | None = None
) -> ProcessorMixin:
    """The processor in the folder or Hub repository `name`, which must carry a picture side and a chat template.

    `chat_template` (Jinja) replaces the stored one. Raises UserError where no usable processor is found.
    """
    try:
        processor = _load(name, config, revision)
    except (OSError, ValueError, TypeError, ImportError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"No usable processor in {name!r} for a {config.model_type} model: {_line(error)}") from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise UserError(f"{name!r} has no processor for pictures and text; Speculens decodes vision-language models.")
    processor.chat_template = chat_template or processor.chat_template or processor.tokenizer.chat_template
    _require_template(processor, config, name)
    return processor


def _load(name: str, config: PreTrainedConfig, revision: str | None) -> ProcessorMixin:
    cls = PROCESSOR_MAPPING[type(config)] if type(config) in PROCESSOR_MAPPING else None
    pillow = PILLOW_ONLY.get(config.model_type) if not is_torchvision_available() else None
    if cls is not None and pillow is not None:
        cls = image_only(cls)
        module = importlib.import_module(f"transformers.models.{config.model_type}.image_processing_pil_{config.model_type}")
        images = getattr(module, pillow).from_pretrained(name, revision=revision)
        settings, _ = cls.get_processor_dict(name, revision=revision)
        return cls.from_args_and_dict([images, AutoTokenizer.from_pretrained(name, revision=revision)], settings)
    if cls is not None and "video_processor" in cls.get_attributes():
        return image_only(cls).from_pretrained(name, revision=revision)
    return AutoProcessor.from_pretrained(name, revision=revision)


def image_only(cls: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """`cls` without its video half, which needs torchvision; pictures never touch that half."""
    # `__init__` stays the parent's: `from_pretrained` reads its argument names to decide which saved settings to pass.
    # SmolVLM insists on `num2words` (for videos); its picture layout is Idefics3's, token for token.
    parent = Idefics3Processor if cls.__name__ == "SmolVLMProcessor" else cls
    attributes = ["image_processor", "tokenizer"]
    return type(cls.__name__, (parent,), {"get_attributes": classmethod(lambda _: attributes), "video_processor": None})


def encode(
    processor: ProcessorMixin, config: PreTrainedConfig, conversation: Conversation, add_generation_prompt: bool = True
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The inputs of one forward (`input_ids (1, n)`, pixels, masks, ...) and which of the n rows are image rows, bool.

    Raises UserError where the prompt and the pictures do not belong together, or the family cannot take them.
    """
    text = _prompt(processor, config, conversation, add_generation_prompt)
    images = list(conversation.images)
    _check_placeholders(processor, config, text, len(images))
    inputs = _call(processor, text, images)
    ids = inputs["input_ids"]
    image = ids[0] == image_token_id(config)
    if int(image.sum()) < len(images):
        raise UserError(f"{len(images)} pictures left only {int(image.sum())} image tokens in the prompt.")
    return _fit(inputs, config, image), image


def image_token_id(config: PreTrainedConfig) -> int:
    """The token id that stands for one row of picture features."""
    found = getattr(config, "image_token_id", None)
    found = getattr(config, "image_token_index", None) if found is None else found
    if found is None:
        raise UserError(f"A {config.model_type} model names no image token; Speculens cannot tell pictures from text.")
    return int(found)


def _require_template(processor: ProcessorMixin, config: PreTrainedConfig, name: str) -> None:
    if processor.chat_template is None and config.model_type not in PLAIN_PROMPT:
        raise UserError(
            f"Neither the processor nor the tokenizer of {name!r} has a chat template, so it is not a chat model; "
            "pass a Jinja template as chat_template=... if you know its prompt format."
        )


def _prompt(processor: ProcessorMixin, config: PreTrainedConfig, conversation: Conversation, open_end: bool) -> str:
    if processor.chat_template is None and config.model_type in PLAIN_PROMPT:
        return _plain_prompt(processor, conversation)
    _require_template(processor, config, type(processor).__name__)
    try:
        return processor.apply_chat_template(conversation.to_chat(), tokenize=False, add_generation_prompt=open_end)
    except TemplateError as error:
        raise UserError(f"The target's chat template refuses this conversation: {_line(error)}") from error


def _plain_prompt(processor: ProcessorMixin, conversation: Conversation) -> str:
    """PaliGemma: all pictures first, then the text; its processor adds <bos> between them and a line break at the end."""
    texts = [part for message in conversation.messages for part in message.content if isinstance(part, str)]
    return processor.image_token * len(conversation.images) + "\n".join(texts)


def _check_placeholders(processor: ProcessorMixin, config: PreTrainedConfig, text: str, pictures: int) -> None:
    """One placeholder a picture, and none of the model's own special image or video tokens written out by the user."""
    placeholder = getattr(processor, "image_token", None)
    ids = (image_token_id(config), getattr(config, "video_token_id", None))
    names = {processor.tokenizer.convert_ids_to_tokens(number) for number in ids if number is not None}
    for name in names - {placeholder, None}:
        if name in text:
            raise UserError(f"The text contains {name!r}, which the target reserves for pictures; take it out.")
    if placeholder is not None and (found := text.count(placeholder)) != pictures:
        raise UserError(
            f"The prompt has {found} {placeholder!r} placeholders for {pictures} pictures: either a message spells out "
            f"{placeholder!r} itself, or the target's chat template leaves pictures out."
        )


def _call(processor: ProcessorMixin, text: str, images: list[Any]) -> dict[str, Any]:
    bos = processor.tokenizer.bos_token
    extra = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # NumPy 2 on how some processors read torch tensors
            return dict(processor(text=[text], images=[images] if images else None, return_tensors="pt", **extra))
    except ValueError as error:  # PaliGemma, for one, refuses a prompt without a picture
        raise UserError(f"The target's processor refuses this conversation: {_line(error)}") from error


def _fit(inputs: dict[str, Any], config: PreTrainedConfig, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keep what the model takes, and add the token types that it silently goes wrong without."""
    kept = {name: value for name, value in inputs.items() if torch.is_tensor(value) and name != "labels"}
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return kept
    taken = inspect.signature(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in taken and name not in kept:
            kept[name] = image[None].to(kept["input_ids"].dtype)
    return {name: value for name, value in kept.items() if name in taken}


def _line(error: Exception) -> str:
    """The first line of a message that may be a page."""
    return str(error).strip().split("\n")[0] or type(error).__name__
