"""The OpenAI chat-completions request, checked strictly: types as JSON has them, known keys, values in range.

What this server does not offer is refused by name instead of being left out in silence; a key that is null counts as
absent. Extensions beyond OpenAI's: `top_k`, `min_p`, `repetition_penalty`. Accepted without effect, because they do not
change an answer: `user`, `metadata`, `safety_identifier`, `prompt_cache_key`, `service_tier`, an image's `detail`.
Pictures are only addresses here; `pictures.py` reads them. No torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from llava.errors import name_nearest
from llava.serve.limits import ServeLimits
from llava.serve.problems import ApiError, invalid

_MAX_SEED = 2**63 - 1
_MAX_NAME = 512
_NO_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")

# OpenAI's parameters that this server does not offer, with the values that ask for nothing.
_NOT_OFFERED: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "store": (False,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": (),
    "moderation": (),
    "prompt_cache_retention": (),
}
_INSTEAD = {
    "presence_penalty": "; use repetition_penalty",
    "frequency_penalty": "; use repetition_penalty",
    "response_format": "; ask for the form in words",
}
# Keys of a message that hold nothing here; clients send them back as null.
_MESSAGE_NOT_OFFERED = ("tool_calls", "function_call", "audio", "refusal", "annotations", "tool_call_id")
_PARTS_NOT_OFFERED = ("input_audio", "file", "refusal", "video_url", "audio_url", "input_image", "input_text")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(_Strict):
    """Words."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture is: a `data:` URL, or a web address where the server fetches those."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _as_parts(content: object) -> object:
    """A plain string is one text part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Part: TypeAlias = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(_Strict):
    """One turn. `developer` is another word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]
    name: Annotated[str, Field(max_length=_MAX_NAME)] | None = None


class StreamOptions(_Strict):
    """include_usage: a last chunk counts the tokens. include_obfuscation: accepted; nothing is ever padded here."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Strict):
    """A request for answers to a conversation. Read one with `read_request`."""

    model: Annotated[str, Field(max_length=_MAX_NAME)]
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    # Near 0 a float32 logit divided by it is no number any more.
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=-_MAX_SEED, le=_MAX_SEED)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=64)]],
        Field(max_length=4),
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop, json_schema_input_type=str | list[str]),
    ] = []
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=_MAX_NAME)] | None = None
    safety_identifier: Annotated[str, Field(max_length=_MAX_NAME)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=_MAX_NAME)] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @field_validator("model")
    @classmethod
    def _check_model(cls, value: str) -> str:
        return _whole(value)

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def token_limit(self) -> int | None:
        """The longest answer wanted, None for as long as the context has room."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def read_request(data: dict[str, Any], limits: ServeLimits) -> ChatRequest:
    """Check a request's object. Raises ApiError that names the parameter, before any picture is decoded."""
    data = {key: value for key, value in data.items() if value is not None}
    for key in data:
        if key in _NOT_OFFERED:
            _check_not_offered(key, data[key])
        elif key not in ChatRequest.model_fields:
            raise _unknown(key, ChatRequest.model_fields)
    data = {key: value for key, value in data.items() if key not in _NOT_OFFERED}
    messages = data.get("messages")
    if isinstance(messages, list):
        if len(messages) > limits.max_messages:
            raise invalid("too_many_messages", f"{len(messages)} messages, at most {limits.max_messages}", "messages")
        data["messages"] = [_read_message(turn, f"messages[{i}]", limits) for i, turn in enumerate(messages)]
    try:
        request = ChatRequest.model_validate(data)
    except ValidationError as error:
        raise _first_problem(error) from None
    _check_content(request, limits)
    return request


def _read_message(turn: object, where: str, limits: ServeLimits) -> object:
    """A message without its nulls; what it may not hold is named."""
    if not isinstance(turn, dict):
        return turn
    if turn.get("role") in ("tool", "function"):
        raise invalid("unsupported_value", f"{where}: this server does not offer tools", f"{where}.role")
    turn = {key: value for key, value in turn.items() if value is not None}
    for key in turn:
        if key in _MESSAGE_NOT_OFFERED and turn[key] != []:
            raise invalid("unsupported_parameter", f"{where}.{key}: this server does not offer {key}", f"{where}.{key}")
        if key not in ChatMessage.model_fields and key not in _MESSAGE_NOT_OFFERED:
            raise _unknown(key, ChatMessage.model_fields, where)
    parts = turn.get("content")
    if isinstance(parts, list):
        if len(parts) > limits.max_parts:
            raise invalid("too_many_parts", f"{where}: {len(parts)} parts, at most {limits.max_parts}", where)
        for i, part in enumerate(parts):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind in _PARTS_NOT_OFFERED:
                place = f"{where}.content[{i}]"
                raise invalid("unsupported_value", f"{place}: parts are text or image_url, not {kind}", f"{place}.type")
    return {key: value for key, value in turn.items() if key not in _MESSAGE_NOT_OFFERED}


def _check_not_offered(key: str, value: object) -> None:
    # 1 and True are equal in Python and are not in JSON.
    if not any(type(value) is type(nothing) and value == nothing for nothing in _NOT_OFFERED[key]):
        raise invalid(
            "unsupported_parameter", f"{key}: this server does not offer it{_INSTEAD.get(key, '; leave it out')}", key
        )


def _unknown(key: str, known: Any, where: str = "") -> ApiError:
    # The key is the sender's own word, and may be a megabyte of it.
    shown = key if len(key) <= 64 and key.isprintable() else f"a key of {len(key)} characters"
    nearest = name_nearest(key, known) if len(key) <= 64 else f"Known: {', '.join(sorted(known))}"
    place = f"{where}.{shown}" if where else shown
    return invalid("unknown_parameter", f"unknown parameter {place}; {nearest}", place)


def _check_content(request: ChatRequest, limits: ServeLimits) -> None:
    if request.n > limits.max_choices:
        raise invalid("invalid_value", f"n = {request.n}: at most {limits.max_choices}", "n")
    pictures = chars = 0
    for i, message in enumerate(request.messages):
        if message.role in ("system", "developer") and i:
            raise invalid("invalid_value", f"messages[{i}]: only the first message may be the system's", "messages")
        for j, part in enumerate(message.content):
            place = f"messages[{i}].content[{j}]"
            if isinstance(part, ImagePart):
                pictures += 1
                if message.role != "user":
                    raise invalid("invalid_value", f"{place}: only a user's message may hold pictures", place)
                continue
            chars += len(part.text)
            _check_words(part.text, place)
    for stop in request.stop:
        _check_words(stop, "stop")
    if request.messages[-1].role != "user":
        raise invalid("invalid_value", "the last message must be the user's; there is nothing to answer", "messages")
    if pictures > limits.max_pictures:
        raise invalid("too_many_images", f"{pictures} pictures in a request, at most {limits.max_pictures}", "messages")
    if chars > limits.max_text_chars:
        raise invalid(
            "context_length_exceeded", f"{chars} characters of text, at most {limits.max_text_chars}", "messages"
        )


def _check_words(text: str, place: str) -> None:
    try:
        _whole(text)
    except ValueError as error:
        raise invalid("invalid_value", f"{place}: {error}", place) from None


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair, which is no character") from None
    return text


def _first_problem(error: ValidationError) -> ApiError:
    """The protocol's error for the first thing that the schema finds wrong. Values are not repeated."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    # A union's tag stands in the path of what is wrong inside: ("content", 0, "image_url", "image_url", "url").
    place = ""
    path = list(problem["loc"])
    for step, part in enumerate(path):
        if isinstance(part, int):
            place += f"[{part}]"
        elif step >= 2 and isinstance(path[step - 1], int) and path[step - 2] == "content":
            continue
        else:
            place += f".{part}" if place else str(part)
    param = place or None
    message = problem["msg"].removeprefix("Value error, ")
    message = f"{place}: {message[0].lower()}{message[1:]}" if place else message
    kind = problem["type"]
    if kind == "missing":
        return invalid("missing_required_parameter", f"{place} is missing", param)
    if kind == "extra_forbidden":
        return invalid("unknown_parameter", f"unknown parameter {place}", param)
    if kind.endswith("_type") or kind in ("bool_parsing", "model_attributes_type"):
        return invalid("invalid_type", message, param)
    return invalid("invalid_value", message, param)
