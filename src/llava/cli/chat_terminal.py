"""The conversation in the terminal: a line editor with completion of commands and paths, and Ctrl-C for the answer."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory

from llava.cli.chat_session import COMMANDS, TAKES_PATH, Session
from llava.errors import LlavaError


class CommandCompleter(Completer):
    """Slash commands at the start of the line, and file names behind those that take one."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        command, space, rest = before.partition(" ")
        if not command.startswith("/"):
            return
        if not space:
            for name, what in COMMANDS.items():
                if name.startswith(command):
                    yield Completion(name, start_position=-len(command), display_meta=what)
        elif command in TAKES_PATH:
            yield from self._complete_path(rest.lstrip(), complete_event)

    def _complete_path(self, rest: str, event: CompleteEvent) -> Iterator[Completion]:
        """The path at the end of `rest`: in quotes that are open, all of it (blanks too), or its last word."""
        quote = _open_quote(rest)
        if quote is not None:
            begun = rest.rpartition(quote)[2]
            for found in self._paths.get_completions(Document(begun, len(begun)), event):
                path = Path(begun + found.text).expanduser()
                closing = "" if path.is_dir() else quote
                yield Completion(found.text + closing, found.start_position, display=found.display)
            return
        found_any = False
        for found in self._paths.get_completions(Document(rest, len(rest)), event):
            found_any = True
            yield found
        last = rest.rpartition(" ")[2]
        if not found_any and last != rest:
            for found in self._paths.get_completions(Document(last, len(last)), event):
                name = last + found.text
                if " " in name:  # the others on the line are words: this one must be told from two
                    yield Completion(f"'{name}'", start_position=-len(last), display=found.display)
                else:
                    yield found


def _open_quote(text: str) -> str | None:
    """The quote that the text leaves open."""
    quote: str | None = None
    before = " "
    for letter in text:
        if quote is None and letter in "'\"" and before == " ":
            quote = letter
        elif letter == quote:
            quote = None
        before = letter
    return quote


def talk(session: Session) -> None:
    """Ask and answer until the user leaves with Ctrl-D or /quit."""
    editor: PromptSession[str] = PromptSession(
        history=InMemoryHistory(), completer=CommandCompleter(), complete_while_typing=False
    )
    print(f"{session.name}: ask, or show a picture with /image PATH. /help lists the commands, Ctrl-D leaves.")
    while not session.ended:
        pictures = len(session.pending)
        try:
            line = editor.prompt(f"[{pictures} picture{'s' if pictures > 1 else ''}] > " if pictures else "> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if line:
            respond(session, line)


def respond(session: Session, line: str) -> None:
    """Run a command or answer a question, printing as it goes; an error is one line and the talk goes on."""
    pieces = session.run_command(line) if line.startswith("/") else session.answer(line)
    try:
        with _interrupt(session.stop):
            said = False
            for piece in pieces:
                print(piece, end="", flush=True)
                said = said or bool(piece)
            if said:
                print()
    except LlavaError as error:
        print(" ".join(str(error).split()))


@contextmanager
def _interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop` instead of raising somewhere inside the engine; a second one raises as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
