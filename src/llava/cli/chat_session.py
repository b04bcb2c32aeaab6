"""A conversation under way: what was said, the pictures waiting for the next question, and the slash commands.

Knows nothing of the terminal, so that it can be tested without one: `answer` and `run_command` give back text.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from llava.errors import LlavaError, UsageError, name_nearest
from llava.inference.answer import AnswerStream, Assistant
from llava.inference.sampling import SamplingParams
from llava.prompt.conversation import Conversation, Image, Message, Text, from_openai

# What /set may change, with the type that a typed value becomes.
_SETTINGS: dict[str, Callable[[str], float | int | None]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": lambda text: None if text in ("none", "random") else int(text),
    "max_new_tokens": int,
}

COMMANDS: dict[str, str] = {
    "/image": "PATH ...: show the model pictures with your next question",
    "/clear": "forget the conversation",
    "/undo": "take back the last question and its answer",
    "/retry": "answer the last question again",
    "/set": "NAME VALUE: change a setting; alone it lists them",
    "/system": "TEXT: replace the system text; alone it returns to the template's",
    "/save": "FILE: write the conversation as OpenAI chat messages",
    "/load": "FILE: continue a saved conversation",
    "/help": "list the commands",
    "/quit": "leave (also Ctrl-D)",
}
TAKES_PATH = ("/image", "/save", "/load")


class Session:
    """One conversation with an assistant."""

    def __init__(
        self, assistant: Assistant, params: SamplingParams, *, images: Sequence[Path] = (), system: str | None = None
    ) -> None:
        self._assistant = assistant
        self.params = params
        self.messages: list[Message] = []
        self.system = system
        self.pending: list[Image] = []
        self.ended = False
        self._stream: AnswerStream | None = None
        for path in images:
            self._attach(path)

    def answer(self, question: str) -> Iterator[str]:
        """Ask, and get the answer's text piece by piece. An error leaves the conversation as it was."""
        message = Message("user", (*self.pending, Text(question)))
        yield from self._answer(message)
        self.pending.clear()

    def stop(self) -> None:
        """End the answer under way; what was said of it stays in the conversation."""
        if self._stream is not None:
            self._stream.cancel()

    def run_command(self, line: str) -> Iterator[str]:
        """Run a line that begins with a slash; gives text to show. Raises LlavaError when it cannot be done."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name == "/exit":
            name = "/quit"
        if name not in COMMANDS:
            raise UsageError(f"{name}: no such command; {name_nearest(name, COMMANDS)}")
        run: Callable[[str], Iterator[str]] = getattr(self, "_" + name[1:])
        yield from run(rest)

    def _answer(self, question: Message) -> Iterator[str]:
        system = () if self.system is None else (Message("system", (Text(self.system),)),)
        conversation = Conversation((*system, *self.messages, question))
        stream = self._stream = self._assistant.stream(conversation, self.params)
        started = False
        try:
            for piece in stream:
                piece = piece if started else piece.lstrip()
                started = started or bool(piece)
                yield piece
        finally:
            self._stream = None
        self.messages += [question, Message("assistant", (Text(stream.answer().text),))]

    def _attach(self, path: Path) -> None:
        # Decoded now, so that a wrong path is reported where it was typed and not with the next question.
        image = Image(path.expanduser())
        self._assistant.processor.prepare_image(image)
        self.pending.append(image)

    def _image(self, rest: str) -> Iterator[str]:
        if not rest:
            raise UsageError("/image needs a path: /image picture.png")
        whole = _unquoted(rest)
        paths = [whole] if Path(whole).expanduser().exists() else [_unquoted(word) for word in _split_paths(rest)]
        for path in paths:
            self._attach(Path(path))
        count = len(self.pending)
        yield f"{count} picture{'s' if count > 1 else ''} for your next question"

    def _clear(self, rest: str) -> Iterator[str]:
        self.messages.clear()
        self.pending.clear()
        yield "forgotten"

    def _undo(self, rest: str) -> Iterator[str]:
        question = self._take_back()
        yield f"took back: {question.text}"

    def _retry(self, rest: str) -> Iterator[str]:
        before = list(self.messages)
        question = self._take_back()
        try:
            yield from self._answer(question)
        except LlavaError:
            self.messages = before
            raise

    def _set(self, rest: str) -> Iterator[str]:
        if not rest:
            yield "\n".join(f"{name} {getattr(self.params, name)}" for name in _SETTINGS)
            return
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        if name not in _SETTINGS:
            raise UsageError(f"/set {name}: no such setting; {name_nearest(name, _SETTINGS)}")
        assert name in {field.name for field in fields(SamplingParams)}
        try:
            number = _SETTINGS[name](value.strip())
        except ValueError:
            raise UsageError(f"/set {name} {value.strip()!r}: must be a number") from None
        self.params = replace(self.params, **{name: number})  # type: ignore[arg-type]
        yield f"{name} {number}"

    def _system(self, rest: str) -> Iterator[str]:
        self.system = rest or None
        yield "system text set" if rest else "the template's system text"

    def _save(self, rest: str) -> Iterator[str]:
        if not rest:
            raise UsageError("/save needs a file: /save talk.json")
        path = Path(_unquoted(rest)).expanduser()
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        value = [*system, *(_as_openai(message) for message in self.messages)]
        try:
            path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; name another file") from None
        yield f"saved {len(self.messages)} messages to {path}"

    def _load(self, rest: str) -> Iterator[str]:
        if not rest:
            raise UsageError("/load needs a file: /load talk.json")
        path = Path(_unquoted(rest)).expanduser()
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; name a file written by /save") from None
        except ValueError as error:
            raise UsageError(f"{path}: not JSON ({error}); name a file written by /save") from None
        messages = list(from_openai(value, resolve_image=lambda url: path.parent / url, origin=str(path)).messages)
        self.system = messages.pop(0).text if messages and messages[0].role == "system" else None
        self.pending.clear()
        if messages and messages[-1].role == "user":
            del messages[-1]  # a question without an answer: ask it again
        self.messages = messages
        yield f"{len(messages)} messages; go on"

    def _help(self, rest: str) -> Iterator[str]:
        yield "\n".join(f"{name:<9}{what}" for name, what in COMMANDS.items())

    def _quit(self, rest: str) -> Iterator[str]:
        self.ended = True
        yield from ()

    def _take_back(self) -> Message:
        if len(self.messages) < 2:
            raise UsageError("nothing was said yet")
        question = self.messages[-2]
        del self.messages[-2:]
        return question


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


def _split_paths(text: str) -> list[str]:
    """Words, kept together inside quotes."""
    import shlex

    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
