"""Conversations: who said what, with the pictures where they were said; and parsers for the formats in use.

`<image>` is a mark in data files only. The parsers here turn it into an `Image` part, so that nothing behind this
module ever looks for it in text again: somebody who types `<image>` in a chat types seven characters.

Formats read: LLaVA and XTuner (`from`/`value` turns), PaddleMIX (pairs), ShareGPT as LLaMA-Factory reads it, OpenAI
chat messages (parts with `image_url`), and ms-swift (`messages` with `<image>` marks and an `images` list).
Not covered: tool calls, video, audio; they are refused by name.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import unquote_to_bytes

from llava.errors import DataError, LlavaError, PromptError

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

Role: TypeAlias = Literal["system", "user", "assistant"]
ImageSource: TypeAlias = "Path | bytes | PIL.Image.Image | np.ndarray[Any, Any]"
ResolveImage: TypeAlias = Callable[[str], "ImageSource"]

IMAGE_MARK = "<image>"

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True, eq=False)
class Image:
    """A picture in a message: a file, encoded bytes, a PIL picture, or an array (height, width[, channels])."""

    source: ImageSource

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Image):
            return NotImplemented
        if self.source is other.source:
            return True
        return isinstance(self.source, (Path, bytes)) and self.source == other.source

    def __hash__(self) -> int:
        return hash(self.source) if isinstance(self.source, (Path, bytes)) else id(self.source)


@dataclass(frozen=True)
class Text:
    """Words of a message. They are only ever words: no string in them becomes a special token."""

    text: str


Part: TypeAlias = Image | Text


@dataclass(frozen=True)
class Message:
    """One turn. `supervised` counts for assistant turns only: False keeps an answer out of the labels."""

    role: Role
    parts: tuple[Part, ...]
    supervised: bool = field(default=True, kw_only=True)

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.parts if isinstance(part, Image))

    @property
    def text(self) -> str:
        """The words alone, pictures left out."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True)
class Conversation:
    """Messages in order; `origin` ("mix.json:17") leads every error text about them."""

    messages: tuple[Message, ...]
    origin: str = ""

    @property
    def images(self) -> tuple[Image, ...]:
        """Every picture, in reading order."""
        return tuple(image for message in self.messages for image in message.images)


def from_record(record: object, *, resolve_image: ResolveImage = Path, origin: str = "") -> Conversation:
    """Read one record of any format known here, told apart by its keys (never by a file's name)."""
    where = _at(origin)
    if not isinstance(record, Mapping):
        raise DataError(f"{where}a record must be an object, not {type(record).__name__}")
    if "messages" in record:
        turns = record["messages"]
        if isinstance(turns, Sequence) and turns and isinstance(turns[0], Mapping) and "from" in turns[0]:
            return from_sharegpt(record, resolve_image=resolve_image, origin=origin)
        return from_openai(record, resolve_image=resolve_image, origin=origin, error=DataError)
    turns = record.get("conversations")
    if isinstance(turns, Sequence) and not isinstance(turns, str) and turns and not isinstance(turns[0], Mapping):
        return from_pairs(record, resolve_image=resolve_image, origin=origin)
    if "images" in record or "system" in record:
        return from_sharegpt(record, resolve_image=resolve_image, origin=origin)
    return from_llava(record, resolve_image=resolve_image, origin=origin)


def from_llava(record: Mapping[str, Any], *, resolve_image: ResolveImage = Path, origin: str = "") -> Conversation:
    """Read `{id?, image?: path or list of paths, conversations: [{from: human|gpt, value}]}`.

    Each `<image>` takes the next picture. A first turn by `gpt` is kept here; most templates leave it out, as the
    original LLaVA and XTuner do. Raises DataError when turns do not alternate or marks and pictures differ in number.
    """
    where = _at(origin)
    turns = _turns(record, "conversations", where)
    pairs = [(_role(turn, "from", where), _string(turn, "value", where)) for turn in turns]
    sources = _sources(record.get("image"), "image", resolve_image, where)
    return _assemble(pairs, sources, origin)


def from_pairs(record: Mapping[str, Any], *, resolve_image: ResolveImage = Path, origin: str = "") -> Conversation:
    """Read PaddleMIX's `{image?, conversations: [[question, answer], ...]}`."""
    where = _at(origin)
    pairs: list[tuple[Role, str]] = []
    for number, pair in enumerate(_list(record, "conversations", where), start=1):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise DataError(f"{where}conversations[{number - 1}] must be a [question, answer] pair, not {_short(pair)}")
        for role, value in zip(("user", "assistant"), pair, strict=True):
            if not isinstance(value, str):
                raise DataError(
                    f"{where}conversations[{number - 1}]: {role} text must be a string, not {_short(value)}"
                )
            pairs.append((_ROLES[role], value))
    sources = _sources(record.get("image"), "image", resolve_image, where)
    return _assemble(pairs, sources, origin)


def from_sharegpt(record: Mapping[str, Any], *, resolve_image: ResolveImage = Path, origin: str = "") -> Conversation:
    """Read LLaMA-Factory's ShareGPT: `{conversations: [{from, value}], images?: [...], system?: text}`."""
    where = _at(origin)
    for unknown in ("videos", "audios", "tools"):
        if record.get(unknown):
            raise DataError(f"{where}{unknown!r} are not supported; drop them from the record")
    key = "conversations" if "conversations" in record else "messages"
    turns = _turns(record, key, where)
    pairs = [(_role(turn, "from", where), _string(turn, "value", where)) for turn in turns]
    system = record.get("system")
    if isinstance(system, str) and system:
        pairs.insert(0, ("system", system))
    pictures = record.get("images", record.get("image"))
    sources = _sources(pictures, "images", resolve_image, where)
    return _assemble(pairs, sources, origin)


def from_openai(
    messages: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    *,
    resolve_image: ResolveImage = Path,
    origin: str = "",
    error: type[LlavaError] = PromptError,
) -> Conversation:
    """Read OpenAI chat messages, or a record `{messages, images?}` (ms-swift, LLaMA-Factory's openai format).

    Content is a string or a list of parts: `text`, `image_url` (a `data:` URL, or anything that `resolve_image` takes,
    a path by default) and `image`. In a string, `<image>` is a mark only when the record has an `images` list, even an
    empty one; otherwise it is seven characters. `loss: false` on an answer keeps it out of the labels.
    """
    where = _at(origin)
    sources: list[ImageSource] | None = None
    turns: object = messages
    if isinstance(messages, Mapping):
        record = messages
        for unknown in ("videos", "audios", "tools", "objects"):
            if record.get(unknown):
                raise error(f"{where}{unknown!r} are not supported; drop them from the record")
        turns = _list(record, "messages", where, error)
        pictures = record.get("images", record.get("image"))
        if pictures is not None:
            sources = _sources(pictures, "images", resolve_image, where, error)
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        raise error(f"{where}messages must be a list of objects, not {_short(turns)}")
    read: list[Message] = []
    for number, turn in enumerate(turns):
        here = f"{where}messages[{number}]: "
        if not isinstance(turn, Mapping):
            raise error(f"{here}must be an object with role and content, not {_short(turn)}")
        role = _role(turn, "role", here, error)
        parts = tuple(_content_parts(turn.get("content"), resolve_image, here, error))
        read.append(Message(role, parts, supervised=turn.get("loss", True) not in (False, 0, 0.0)))
    if sources is not None:
        read = _place(read, sources, where, error)
    _check_system_first([message.role for message in read], where, error)
    if not read:
        raise error(f"{where}no messages")
    return Conversation(tuple(read), origin)


def split_marks(text: str) -> list[str]:
    """Cut a text at its `<image>` marks; n marks give n + 1 pieces."""
    return text.split(IMAGE_MARK)


def read_data_url(url: str) -> bytes:
    """The bytes of a `data:` URL. Raises ValueError when it is not one or its base64 is broken."""
    head, comma, body = url.partition(",")
    if not comma or not head.lower().startswith("data:"):
        raise ValueError("not a data: URL")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("broken base64 in a data: URL") from None


def _content_parts(content: object, resolve_image: ResolveImage, where: str, error: type[LlavaError]) -> Iterator[Part]:
    if content is None:
        content = ""
    if isinstance(content, str):
        if content:
            yield Text(_checked(content, where, error))
        return
    if not isinstance(content, Sequence):
        raise error(f"{where}content must be a string or a list of parts, not {_short(content)}")
    for part in content:
        if isinstance(part, str):
            yield Text(_checked(part, where, error))
            continue
        if not isinstance(part, Mapping):
            raise error(f"{where}a content part must be an object, not {_short(part)}")
        kind = part.get("type")
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise error(f"{where}a text part needs a string 'text', not {_short(text)}")
            yield Text(_checked(text, where, error))
        elif kind in ("image_url", "image"):
            url = part.get("image_url") if kind == "image_url" else part.get("image", part.get("url"))
            if isinstance(url, Mapping):
                url = url.get("url")
            yield Image(_source(url, resolve_image, where, error))
        else:
            raise error(f"{where}unknown part type {kind!r}; known: text, image_url, image")


def _assemble(pairs: Sequence[tuple[Role, str]], sources: Sequence[ImageSource], origin: str) -> Conversation:
    where = _at(origin)
    if not pairs:
        raise DataError(f"{where}no turns; a conversation needs at least one human turn")
    _check_system_first([role for role, _ in pairs], where, DataError)
    spoken = [role for role, _ in pairs if role != "system"]
    for number, (before, role) in enumerate(pairwise(spoken), start=2):
        if before == role:
            raise DataError(f"{where}turns {number - 1} and {number} are both by the {role}; turns must alternate")
    messages = [Message(role, (Text(_checked(value, where, DataError)),)) for role, value in pairs]
    return Conversation(tuple(_place(messages, sources, where, DataError)), origin)


def _place(
    messages: Sequence[Message], sources: Sequence[ImageSource], where: str, error: type[LlavaError]
) -> list[Message]:
    """Put the pictures where the marks are; both counts are named when they differ."""
    marks = sum(part.text.count(IMAGE_MARK) for m in messages for part in m.parts if isinstance(part, Text))
    if marks != len(sources):
        pictures = f"{len(sources)} picture" + ("" if len(sources) == 1 else "s")
        way_out = "add a mark or drop a picture" if marks < len(sources) else "add a picture or drop a mark"
        raise error(f"{where}{pictures} but {marks} {IMAGE_MARK} in the text; {way_out}")
    if not marks:
        return list(messages)
    remaining = iter(sources)
    placed: list[Message] = []
    for message in messages:
        parts: list[Part] = []
        for part in message.parts:
            if isinstance(part, Image):
                parts.append(part)
                continue
            for number, piece in enumerate(split_marks(part.text)):
                if number:
                    parts.append(Image(next(remaining)))
                if piece:
                    parts.append(Text(piece))
        placed.append(Message(message.role, tuple(parts), supervised=message.supervised))
    return placed


def _check_system_first(roles: Sequence[Role], where: str, error: type[LlavaError]) -> None:
    for number, role in enumerate(roles):
        if role == "system" and number:
            raise error(f"{where}turn {number + 1} is a system turn; only the first turn may be one")


def _sources(
    value: object, key: str, resolve_image: ResolveImage, where: str, error: type[LlavaError] = DataError
) -> list[ImageSource]:
    if value is None or value == "":
        return []
    if isinstance(value, (str, Mapping)):
        value = [value]
    if not isinstance(value, Sequence):
        raise error(f"{where}{key!r} must be a path or a list of paths, not {_short(value)}")
    found: list[ImageSource] = []
    for entry in value:
        if isinstance(entry, Mapping):
            entry = entry.get("path") or entry.get("url")
        found.append(_source(entry, resolve_image, where, error))
    return found


def _source(url: object, resolve_image: ResolveImage, where: str, error: type[LlavaError]) -> ImageSource:
    if not isinstance(url, str) or not url:
        raise error(f"{where}a picture must be a path or a data: URL, not {_short(url)}")
    if url[:5].lower() == "data:":
        try:
            return read_data_url(url)
        except ValueError as problem:
            raise error(f"{where}{problem}") from None
    if resolve_image is Path and url[:8].lower().startswith(("http://", "https://")):
        raise error(f"{where}picture {url!r} is a web address; download it and give its path")
    return resolve_image(url)


def _turns(record: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    turns = _list(record, key, where)
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise DataError(f"{where}{key}[{number}] must be an object with from and value, not {_short(turn)}")
    return turns


def _list(record: Mapping[str, Any], key: str, where: str, error: type[LlavaError] = DataError) -> list[Any]:
    if not isinstance(record, Mapping):
        raise error(f"{where}a record must be an object, not {type(record).__name__}")
    if key not in record:
        raise error(f"{where}no {key!r} in the record; found {', '.join(map(repr, sorted(record))) or 'no keys'}")
    value = record[key]
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise error(f"{where}{key!r} must be a list, not {_short(value)}")
    return list(value)


def _role(turn: Mapping[str, Any], key: str, where: str, error: type[LlavaError] = DataError) -> Role:
    name = turn.get(key)
    if not isinstance(name, str) or name not in _ROLES:
        raise error(f"{where}unknown {key} {_short(name)}; known: {', '.join(_ROLES)}")
    return _ROLES[name]


def _string(turn: Mapping[str, Any], key: str, where: str) -> str:
    value = turn.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}{key!r} must be a string, not {_short(value)}")
    return value


def _checked(text: str, where: str, error: type[LlavaError]) -> str:
    """Refuse lone surrogates here, where the record is known: no tokenizer can encode them."""
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise error(
            f"{where}broken character at position {problem.start} of a text (half of a surrogate pair)"
        ) from None
    return text


def _at(origin: str) -> str:
    return f"{origin}: " if origin else ""


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
