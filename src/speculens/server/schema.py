"""What a client may send. Unknown fields are refused, as OpenAI does; so is what would change the answer but cannot."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NGRAM = 64  # tokens of no_repeat_ngram_size: each node's past is compared in windows of so many at once


def _sound(text: str) -> str:
    """JSON can spell half of a surrogate pair; no tokenizer takes it."""
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("the text holds half of a surrogate pair, which is no unicode character")
    return text


Words: TypeAlias = Annotated[str, AfterValidator(_sound)]


def _only(*neutral: Any) -> AfterValidator:
    """Accept what has no effect; refuse the rest rather than leave it out silently."""

    def check(value: Any) -> Any:
        if value is not None and value not in neutral:
            raise ValueError("this server does not support it; leave it out")
        return value

    return AfterValidator(check)


class Part(BaseModel):
    """Every object here: no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(Part):
    """A piece of text."""

    type: Literal["text"]
    text: Words


class ImageUrl(Part):
    """A picture's data URI, or its http(s) address; `detail` is taken and has no effect."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Part):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


Content: TypeAlias = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Part):
    """One turn. `name` and `refusal` are taken and have no effect; what follows must be empty, as in our answers."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Words | Annotated[list[Content], Field(min_length=1, max_length=1024)]
    name: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any] | None, _only([])] = None
    audio: Annotated[Any, _only()] = None
    function_call: Annotated[Any, _only()] = None
    tool_calls: Annotated[list[Any] | None, _only([])] = None


class StreamOptions(Part):
    """`include_usage` sends the counts as a last chunk."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Extension(Part):
    """Our own part of a request: `steps` shows how each chunk was decoded, `baseline` decodes without the drafter."""

    steps: bool = False
    baseline: bool = False


Text: TypeAlias = Annotated[Words, Field(min_length=1, max_length=1024)]


class ChatRequest(Part):
    """The body of /v1/chat/completions. Defaults are OpenAI's; `max_tokens` defaults to all the room there is."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=NGRAM)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    speculens: Extension | None = None

    # What would change the answer and is not there.
    frequency_penalty: Annotated[float | None, _only(0.0)] = None
    presence_penalty: Annotated[float | None, _only(0.0)] = None
    logit_bias: Annotated[dict[str, float] | None, _only({})] = None
    tools: Annotated[list[Any] | None, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    functions: Annotated[list[Any] | None, _only([])] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    response_format: Annotated[dict[str, Any] | None, _only({"type": "text"})] = None
    modalities: Annotated[list[str] | None, _only(["text"])] = None
    audio: Annotated[Any, _only()] = None
    min_tokens: Annotated[int | None, _only(0)] = None
    moderation: Annotated[Any, _only()] = None
    prediction: Annotated[Any, _only()] = None
    reasoning_effort: Annotated[str | None, _only("none")] = None
    verbosity: Annotated[str | None, _only("medium")] = None
    web_search_options: Annotated[Any, _only()] = None

    # What changes nothing here.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """How many answers are asked for."""
        return self.n or 1

    @property
    def room(self) -> int | None:
        """Tokens of an answer; None for all that fit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def steps(self) -> bool:
        return self.speculens is not None and self.speculens.steps

    @property
    def baseline(self) -> bool:
        return self.speculens is not None and self.speculens.baseline

    def sampling(self) -> dict[str, Any]:
        """Fields of `Sampling`, without `max_new_tokens`. A request without a seed gets one by chance."""
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": max(self.top_k or 0, 0),
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "no_repeat_ngram_size": self.no_repeat_ngram_size or 0,
            "ignore_eos": bool(self.ignore_eos),
            "seed": secrets.randbits(62) if self.seed is None else self.seed,
            "stop": self.stops,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }

    def urls(self) -> list[str]:
        """Of all pictures, in reading order."""
        parts = (part for message in self.messages if not isinstance(message.content, str) for part in message.content)
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]

    def turns(self, picture: Callable[[], bytes]) -> tuple[tuple[str, tuple[str | bytes, ...]], ...]:
        """Roles and contents; `picture` gives the bytes of the next one."""
        return tuple(
            (
                "system" if message.role == "developer" else message.role,
                (message.content,)
                if isinstance(message.content, str)
                else tuple(part.text if isinstance(part, TextPart) else picture() for part in message.content),
            )
            for message in self.messages
        )


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail
