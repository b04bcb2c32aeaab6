"""A conversation as a record of a named format; what the format cannot hold is refused by name, never dropped.

    LLaVA JSON   no system turn, turns alternate, every answer is learnt, `<image>` is always a picture
    pairs        the same, and turns come in pairs: a question, then its answer
    ShareGPT     the same as LLaVA, with a system text (not an empty one)
    OpenAI       all of it

What a record holds beside its conversation (other keys) goes along as it is. Not covered: tools, video and audio, which
the parsers refuse.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from llava.errors import DataError
from llava.prompt.conversation import IMAGE_MARK, Conversation, Image, Message, Part, Text

_FROM = {"user": "human", "assistant": "gpt", "system": "system"}
#: The keys that a record's conversation and pictures stand under; all others are passed on.
CONVERSATION_KEYS = ("id", "conversations", "messages", "texts", "image", "images", "system")
# What each picture begins with, for the type that a data: URL names and the ending that a file gets.
_KINDS = ((b"\xff\xd8\xff", "jpeg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"RIFF", "webp"))


@dataclass(frozen=True)
class Item:
    """A conversation under conversion: its pictures stand in it as bytes, or as paths that `names` spells as its
    record did. extras: the record's other keys."""

    conversation: Conversation
    names: Mapping[Path, str] = field(default_factory=dict)
    id: object = None
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        return self.conversation.origin

    def name(self, image: Image) -> str:
        """How a record names a picture: as its own record did, or its bytes as a data: URL."""
        source = image.source
        if isinstance(source, bytes):
            return f"data:image/{picture_kind(source)};base64,{base64.b64encode(source).decode('ascii')}"
        assert isinstance(source, Path)
        return self.names.get(source, str(source))


def picture_kind(data: bytes) -> str:
    """jpeg, png, gif, bmp or webp, by the first bytes; "octet-stream" for anything else."""
    return next((kind for magic, kind in _KINDS if data.startswith(magic)), "octet-stream")


def to_llava(item: Item) -> dict[str, Any]:
    """`{id, image, conversations: [{from, value}]}`; one picture as a string, several as a list."""
    if any(message.role == "system" for message in item.conversation.messages):
        _refuse(item, "a system turn", "LLaVA JSON", "sharegpt or openai")
    turns = _marked_turns(item, "LLaVA JSON")
    return _record(item, _one_or_all(_pictures(item), "image"), {"conversations": turns})


def to_pairs(item: Item) -> dict[str, Any]:
    """`{id, image, conversations: [[question, answer], ...]}`, PaddleMIX's."""
    if any(message.role == "system" for message in item.conversation.messages):
        _refuse(item, "a system turn", "a list of pairs", "sharegpt or openai")
    turns = _marked_turns(item, "a list of pairs")
    if len(turns) % 2 or any(turn["from"] != "human" for turn in turns[::2]):
        _refuse(item, "a turn without its question or answer", "a list of pairs", "llava")
    pairs = [[asked["value"], told["value"]] for asked, told in zip(turns[::2], turns[1::2], strict=True)]
    return _record(item, _one_or_all(_pictures(item), "image"), {"conversations": pairs})


def to_sharegpt(item: Item) -> dict[str, Any]:
    """`{id, images: [...], system, conversations: [{from, value}]}`, as LLaMA-Factory reads it."""
    turns = _marked_turns(item, "ShareGPT")
    fields: dict[str, Any] = {"conversations": turns}
    if turns and turns[0]["from"] == "system":
        if not turns[0]["value"]:
            _refuse(item, "an empty system turn", "ShareGPT", "openai")
        fields = {"system": turns[0]["value"], "conversations": turns[1:]}
    pictures = _pictures(item)
    return _record(item, {"images": pictures} if pictures else {}, fields)


def to_openai(item: Item) -> dict[str, Any]:
    """`{id, messages: [{role, content}]}`, pictures as image_url parts; `loss: false` on what is not learnt."""
    return _messages(item, lambda image: {"type": "image_url", "image_url": {"url": item.name(image)}})


def to_messages_beside_pictures(item: Item) -> dict[str, Any]:
    """The same for files that hold the pictures themselves: `{"type": "image"}` parts take them in order."""
    return _messages(item, lambda image: {"type": "image"})


RECORD_WRITERS: dict[str, Callable[[Item], dict[str, Any]]] = {
    "llava": to_llava,
    "pairs": to_pairs,
    "sharegpt": to_sharegpt,
    "openai": to_openai,
}


def joined_parts(message: Message) -> tuple[Part, ...]:
    """A message's parts with neighbouring texts joined and empty ones left out: what every format can hold."""
    parts: list[Part] = []
    for part in message.parts:
        last = parts[-1] if parts else None
        if isinstance(part, Image):
            parts.append(part)
        elif isinstance(last, Text):
            parts[-1] = Text(last.text + part.text)
        elif part.text:
            parts.append(part)
    return tuple(parts)


def _messages(item: Item, write_picture: Callable[[Image], dict[str, Any]]) -> dict[str, Any]:
    messages = []
    for message in item.conversation.messages:
        parts = joined_parts(message)
        content: str | list[dict[str, Any]] = message.text
        if message.images:
            content = [
                write_picture(part) if isinstance(part, Image) else {"type": "text", "text": part.text}
                for part in parts
            ]
        entry: dict[str, Any] = {"role": message.role, "content": content}
        if not message.supervised:
            entry["loss"] = False
        messages.append(entry)
    return _record(item, {}, {"messages": messages})


def _marked_turns(item: Item, target: str) -> list[dict[str, str]]:
    """Turns with a mark a picture. Refuses what marks cannot say."""
    messages = item.conversation.messages
    spoken = [message.role for message in messages if message.role != "system"]
    if any(before == here for before, here in pairwise(spoken)):
        _refuse(item, "two turns of one speaker in a row", target, "openai")
    turns = []
    for message in messages:
        if not message.supervised:
            _refuse(item, "a turn marked loss: false", target, "openai")
        if any(IMAGE_MARK in part.text for part in joined_parts(message) if isinstance(part, Text)):
            _refuse(item, f"the word {IMAGE_MARK} in a text, which it would read as a picture", target, "openai")
        value = "".join(IMAGE_MARK if isinstance(part, Image) else part.text for part in message.parts)
        if value.count(IMAGE_MARK) != len(message.images):
            _refuse(item, f"a text beside a picture that together spell {IMAGE_MARK}", target, "openai")
        turns.append({"from": _FROM[message.role], "value": value})
    return turns


def _record(item: Item, pictures: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    named = {} if item.id is None else {"id": item.id}
    return {**named, **pictures, **fields, **item.extras}


def _pictures(item: Item) -> list[str]:
    return [item.name(image) for image in item.conversation.images]


def _one_or_all(pictures: list[str], key: str) -> dict[str, Any]:
    if not pictures:
        return {}
    return {key: pictures[0] if len(pictures) == 1 else pictures}


def _refuse(item: Item, what: str, target: str, instead: str) -> NoReturn:
    where = f"{item.origin}: " if item.origin else ""
    raise DataError(f"{where}{what} cannot be written as {target}; convert with --to {instead}, or drop the record")
