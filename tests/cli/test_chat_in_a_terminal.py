"""The real program in a real (pseudo) terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.tiny_model import write_model


class Terminal:
    """A program with a terminal of its own; gathers what it shows."""

    def __init__(self, *command: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb", "PATH": ""},
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self.shown = ""
        self._seen = 0

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, pattern: str, *, timeout_seconds: float = 90) -> None:
        """Read until the pattern is shown after what was waited for before."""
        deadline = time.monotonic() + timeout_seconds
        while (found := re.search(pattern, self.shown[self._seen :])) is None:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._master], [], [], 0.1)[0]:
                self.shown += os.read(self._master, 65536).decode(errors="replace")
        self._seen += found.end()


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.slow
def test_ctrl_c_stops_a_long_answer_and_the_talk_goes_on(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", context=100_000)
    terminal = Terminal(
        sys.executable, "-m", "llava.cli.main", "chat", str(model), "--max-new-tokens", "90000", "--dtype", "float32"
    )
    try:
        terminal.wait_for("> ")
        terminal.send("Hello\r")
        terminal.wait_for("Hello")
        time.sleep(1)
        terminal.send("\x03")
        terminal.wait_for("> ", timeout_seconds=10)
        terminal.send("/undo\r")
        terminal.wait_for("took back: Hello")
        terminal.wait_for("> ")
        time.sleep(1)  # the line editor has the keys only a moment after its prompt is shown
        terminal.send("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()


@pytest.mark.slow
def test_the_tab_key_finishes_a_quoted_path_and_a_clipboard_that_is_not_there_is_one_line(
    tmp_path: Path, picture: Path
) -> None:
    model = write_model(tmp_path / "model")
    terminal = Terminal(
        *(sys.executable, "-m", "llava.cli.main", "chat", str(model), "--max-new-tokens", "4", "--dtype", "float32")
    )
    try:
        terminal.wait_for("> ")
        time.sleep(1)
        terminal.send(f"/image '{picture.parent}/a pic\t")
        time.sleep(1)
        terminal.send("\r")
        terminal.wait_for("1 picture for your next question")
        terminal.wait_for(r"\[1 picture\] > ")
        terminal.send("/paste\r")
        terminal.wait_for("clipboard")
        terminal.wait_for(r"\[1 picture\] > ")
        terminal.send("/quit\r")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
