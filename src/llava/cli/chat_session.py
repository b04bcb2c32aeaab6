"""A conversation under way: what was said, the pictures waiting for the next question, and the slash commands.

Knows nothing of the terminal, so that it can be tested without one: `answer` and `run_command` give back text.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from llava.cli.chat_files import read_messages, write_messages
from llava.cli.chat_pictures import find_picture, grab_clipboard, save_boxes
from llava.errors import LlavaError, UsageError, name_nearest
from llava.inference.sampling import SamplingParams
from llava.inference.talk import Chat, Model
from llava.prompt.conversation import Image, Message, Text

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
_SWITCH = {"on": True, "off": False}
_URLS = "allow_urls"

COMMANDS: dict[str, str] = {
    "/image": "PATH, URL or clip ...: show the model pictures with your next question",
    "/paste": "the same with the picture on the clipboard",
    "/clear": "forget the conversation",
    "/undo": "take back the last question and its answer",
    "/retry": "answer the last question again",
    "/boxes": "FILE: draw the boxes of the last answer on its picture",
    "/set": "NAME VALUE: change a setting; alone it lists them",
    "/system": "TEXT: replace the system text; alone it returns to the template's",
    "/model": "PATH: go on with another model; alone it names this one",
    "/save": "FILE: write the conversation as OpenAI chat messages",
    "/load": "FILE: continue a saved conversation",
    "/help": "list the commands",
    "/quit": "leave (also Ctrl-D)",
}
TAKES_PATH = ("/image", "/boxes", "/model", "/save", "/load")


class Session:
    """One conversation with a model. open_model: opens the one that /model names."""

    def __init__(
        self,
        model: Model,
        params: SamplingParams,
        *,
        name: str = "",
        images: Sequence[str] = (),
        system: str | None = None,
        allow_urls: bool = False,
        open_model: Callable[[str], Model] | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.chat = Chat(model.assistant, params, system=system, allow_urls=allow_urls)
        self.pending: list[Image] = []
        self.ended = False
        self._open_model = open_model
        for image in images:
            self._attach(image)

    def answer(self, question: str) -> Iterator[str]:
        """Ask, and get the answer's text piece by piece. An error leaves the conversation as it was."""
        yield from self.chat.respond(Message("user", (*self.pending, Text(question))))
        self.pending.clear()

    def stop(self) -> None:
        """End the answer under way; what was said of it stays in the conversation."""
        self.chat.stop()

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

    def _attach(self, name: str) -> None:
        if name == "clip":
            found = grab_clipboard()
        else:
            way_out = "/set allow_urls on (or start with --allow-urls)"
            found = [Image(find_picture(name, allow_urls=self.chat.allow_urls, way_out=way_out))]
        # Decoded now, so that a wrong path is reported where it was typed and not with the next question.
        for image in found:
            self.model.processor.prepare_image(image)
        self.pending += found

    def _image(self, rest: str) -> Iterator[str]:
        if not rest:
            raise UsageError("/image needs a path: /image picture.png")
        whole = unquoted(rest)
        names = [whole] if Path(whole).expanduser().exists() else split_words(rest)
        for name in names:
            self._attach(name)
        count = len(self.pending)
        yield f"{count} picture{'s' if count > 1 else ''} for your next question"

    def _paste(self, rest: str) -> Iterator[str]:
        yield from self._image("clip")

    def _clear(self, rest: str) -> Iterator[str]:
        self.chat.messages.clear()
        self.pending.clear()
        yield "forgotten"

    def _undo(self, rest: str) -> Iterator[str]:
        question = self._take_back()
        yield f"took back: {question.text}"

    def _retry(self, rest: str) -> Iterator[str]:
        before = list(self.chat.messages)
        question = self._take_back()
        try:
            yield from self.chat.respond(question)
        except LlavaError:
            self.chat.messages = before
            raise

    def _boxes(self, rest: str) -> Iterator[str]:
        if not rest:
            raise UsageError("/boxes needs a file: /boxes out.png")
        yield save_boxes(self.model, self.chat.messages, Path(unquoted(rest)).expanduser())

    def _set(self, rest: str) -> Iterator[str]:
        chat = self.chat
        if not rest:
            yield "\n".join(f"{name} {getattr(chat.params, name)}" for name in _SETTINGS)
            yield f"\n{_URLS} {'on' if chat.allow_urls else 'off'}"
            return
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        value = value.strip()
        if name == _URLS:
            if value not in _SWITCH:
                raise UsageError(f"/set {_URLS} {value!r}: it is on or off")
            chat.allow_urls = _SWITCH[value]
            yield f"{_URLS} {value}"
            return
        if name not in _SETTINGS:
            raise UsageError(f"/set {name}: no such setting; {name_nearest(name, [*_SETTINGS, _URLS])}")
        assert name in {field.name for field in fields(SamplingParams)}
        try:
            number = _SETTINGS[name](value)
        except ValueError:
            raise UsageError(f"/set {name} {value!r}: must be a number") from None
        chat.params = replace(chat.params, **{name: number})  # type: ignore[arg-type]
        yield f"{name} {number}"

    def _system(self, rest: str) -> Iterator[str]:
        self.chat.system = rest or None
        yield "system text set" if rest else "the template's system text"

    def _model(self, rest: str) -> Iterator[str]:
        if not rest:
            yield self.name
            return
        if self._open_model is None:
            raise UsageError("/model: this conversation was given its model; start `llava chat` to choose")
        name = unquoted(rest)
        if Path(name).expanduser().exists():
            name = str(Path(name).expanduser())
        # The one at work stays until the other is there: a name that does not open costs nothing.
        model = self._open_model(name)
        self.model, self.name, self.chat.assistant = model, name, model.assistant
        yield f"{name} goes on (template {model.processor.template.name})"

    def _save(self, rest: str) -> Iterator[str]:
        if not rest:
            raise UsageError("/save needs a file: /save talk.json")
        path = Path(unquoted(rest)).expanduser()
        write_messages(path, self.chat.messages, system=self.chat.system)
        yield f"saved {len(self.chat.messages)} messages to {path}"

    def _load(self, rest: str) -> Iterator[str]:
        if not rest:
            raise UsageError("/load needs a file: /load talk.json")
        path = Path(unquoted(rest)).expanduser()
        read = read_messages(str(path), allow_urls=self.chat.allow_urls, way_out="/set allow_urls on")
        messages = list(read.messages)
        self.chat.system = messages.pop(0).text if messages and messages[0].role == "system" else None
        self.pending.clear()
        if messages and messages[-1].role == "user":
            del messages[-1]  # a question without an answer: ask it again
        self.chat.messages = messages
        yield f"{len(messages)} messages; go on"

    def _help(self, rest: str) -> Iterator[str]:
        yield "\n".join(f"{name:<9}{what}" for name, what in COMMANDS.items())

    def _quit(self, rest: str) -> Iterator[str]:
        self.ended = True
        yield from ()

    def _take_back(self) -> Message:
        messages = self.chat.messages
        if len(messages) < 2:
            raise UsageError("nothing was said yet")
        question = messages[-2]
        del messages[-2:]
        return question


def split_words(text: str) -> list[str]:
    """Words, kept together inside quotes."""
    try:
        return shlex.split(text)
    except ValueError:
        return [unquoted(word) for word in text.split()]


def unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
