"""Conversations in files: OpenAI chat messages, read for `--messages` and `/load`, written by `/save`."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.cli.chat_pictures import find_picture
from llava.errors import PromptError, UsageError
from llava.prompt.conversation import Conversation, Image, ImageSource, Message, Text, from_openai


def read_messages(name: str, *, allow_urls: bool = False, way_out: str = "--allow-urls") -> Conversation:
    """OpenAI chat messages, a list or an object with `messages`, from a file or stdin (-).

    Paths of pictures are relative to the file's folder; web addresses are fetched with allow_urls. Raises UsageError
    for a file that cannot be read, PromptError naming file and message for what is wrong in it.
    """
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"{name}: {reason}; name a JSON file of chat messages") from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{name}: not JSON ({error}); it must hold a list of chat messages") from None
    folder = Path() if name == "-" else Path(name).parent

    def resolve(url: str) -> ImageSource:
        try:
            return find_picture(url, allow_urls=allow_urls, folder=folder, way_out=way_out)
        except UsageError as error:
            raise PromptError(f"{name}: {error}") from None

    return from_openai(value, resolve_image=resolve, origin=name)


def write_messages(path: Path, messages: Sequence[Message], *, system: str | None) -> None:
    """Write a conversation that `read_messages` and every OpenAI client read. Raises UsageError."""
    first = [] if system is None else [{"role": "system", "content": system}]
    value = [*first, *(_as_openai(message) for message in messages)]
    try:
        path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; name another file") from None


def _as_openai(message: Message) -> dict[str, object]:
    if not message.images:
        return {"role": message.role, "content": message.text}
    parts: list[dict[str, object]] = []
    for part in message.parts:
        if isinstance(part, Text):
            parts.append({"type": "text", "text": part.text})
        else:
            parts.append({"type": "image_url", "image_url": {"url": _as_url(part)}})
    return {"role": message.role, "content": parts}


def _as_url(image: Image) -> str:
    source = image.source
    if isinstance(source, Path):
        return str(source.resolve())
    if isinstance(source, bytes):
        return "data:;base64," + base64.b64encode(source).decode()
    import PIL.Image

    picture = source if isinstance(source, PIL.Image.Image) else PIL.Image.fromarray(source)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
