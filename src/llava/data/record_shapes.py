"""Rows and tar samples as records that the parsers know: captions, pairs of user and assistant, JSON as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llava.errors import DataError
from llava.prompt.conversation import IMAGE_MARK

#: What a record may hold its conversation under, besides a caption.
CONVERSATION_KEYS = ("conversations", "messages", "texts")
CAPTION_KEYS = ("caption", "text")


def shape_record(fields: Mapping[str, Any], pictures: Sequence[str], *, origin: str) -> dict[str, Any]:
    """A record of one of the known formats from loose fields and the names of the pictures that belong to it.

    `conversations` and `messages` stay as they are (JSON text is read); `texts` [{user, assistant}] and a caption are
    written out as turns with a mark a picture. Raises DataError when there is no conversation in the fields.
    """
    record = {key: value for key, value in fields.items() if value is not None and key not in ("image", "images")}
    if pictures:
        record["image"] = list(pictures)
    elif fields.get("images") is not None:
        record["images"] = []
    for key in CONVERSATION_KEYS:
        if isinstance(value := record.get(key), str) and value.lstrip().startswith("["):
            try:
                record[key] = json.loads(value)
            except (ValueError, RecursionError):
                raise DataError(f"{origin}: {key!r} is neither a list nor JSON text of one") from None
    if record.get("conversations") is not None:
        return record
    if record.get("messages") is not None:
        return _fill_image_parts(record, pictures)
    if record.get("texts") is not None:
        record["conversations"] = _turns_of_texts(record.pop("texts"), pictures, origin)
        return record
    caption = next((record[key] for key in CAPTION_KEYS if isinstance(record.get(key), str)), None)
    if caption is None:
        found = ", ".join(sorted(map(str, fields))) or "nothing"
        raise DataError(f"{origin}: no conversation in it (conversations, messages, texts or caption); found {found}")
    turns = [("human", "\n".join([IMAGE_MARK] * len(pictures))), ("gpt", caption.strip())]
    return {**record, "conversations": [{"from": role, "value": value} for role, value in turns]}


def _turns_of_texts(texts: object, pictures: Sequence[str], origin: str) -> list[dict[str, str]]:
    if not isinstance(texts, Sequence) or isinstance(texts, str):
        raise DataError(f"{origin}: 'texts' must be a list of {{user, assistant}}")
    turns = []
    for number, pair in enumerate(texts):
        if not isinstance(pair, Mapping) or not all(isinstance(pair.get(key), str) for key in ("user", "assistant")):
            raise DataError(f"{origin}: texts[{number}] must be an object with user and assistant")
        turns += [{"from": "human", "value": pair["user"]}, {"from": "gpt", "value": pair["assistant"]}]
    marks = sum(turn["value"].count(IMAGE_MARK) for turn in turns)
    if turns and pictures and not marks:
        turns[0]["value"] = f"{IMAGE_MARK}\n" * len(pictures) + turns[0]["value"]
    return turns


def _fill_image_parts(record: dict[str, Any], pictures: Sequence[str]) -> dict[str, Any]:
    """Give `{"type": "image"}` parts without an address the pictures beside them, in order."""
    messages = record["messages"]
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return record
    remaining = list(pictures)
    filled = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, Sequence) and not isinstance(content, str):
            parts = [_fill(part, remaining) for part in content]
            message = {**message, "content": parts}
        filled.append(message)
    if len(remaining) == len(pictures):
        return record
    record = {**record, "messages": filled, "image": remaining}
    if not remaining:
        del record["image"]
    return record


def _fill(part: object, remaining: list[str]) -> object:
    if not isinstance(part, Mapping) or part.get("type") != "image" or not remaining:
        return part
    if any(part.get(key) for key in ("image", "url")):
        return part
    return {"type": "image", "image": remaining.pop(0)}
