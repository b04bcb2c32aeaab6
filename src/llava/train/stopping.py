"""Stopping a run from outside: Ctrl-C, SIGTERM, and a launcher that is gone.

A signal only raises a flag; the step that is being computed is finished and saved. With several processes the flag
of any of them stops all after the same step (train/run.py).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

# Set by train/launch.py: standard input is then a pipe whose end means that the launcher is gone.
LIFELINE = "LLAVA_LIFELINE"
# A launcher passes a Ctrl-C on that the terminal has sent to everybody: what comes so soon again is the same one.
_SAME_WISH_SECONDS = 1.0


# How long Ctrl-C may take to end a run that has not begun, and the code of a command that it ended.
_PATIENCE_SECONDS = 3.0
_STOPPED = 130


class RunStoppedError(KeyboardInterrupt):
    """The run was asked to stop: its step was finished and saved. The message says how to go on."""


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C stops at once. Only in the main thread."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    first = 0.0

    def note(number: int, frame: object) -> None:
        nonlocal first
        if asked.is_set() and number == signal.SIGINT and time.monotonic() - first > _SAME_WISH_SECONDS:
            raise KeyboardInterrupt
        if not asked.is_set():
            first = time.monotonic()
        asked.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    _watch_launcher()
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def leaving_on_request(tell: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C ends this process for certain, within seconds: while libraries are imported, some swallow it or turn it
    into an error of their own. `tell` is called where it has to end without going back through its callers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    overdue: list[threading.Timer] = []

    def leave() -> None:
        tell()
        sys.stderr.flush()
        os._exit(_STOPPED)

    def note(number: int, frame: object) -> None:
        if not overdue:
            overdue.append(threading.Timer(_PATIENCE_SECONDS, leave))
            overdue[0].daemon = True
            overdue[0].start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    _watch_launcher()
    try:
        yield
    except Exception as error:
        if overdue:
            raise KeyboardInterrupt from error
        raise
    finally:
        for timer in overdue:
            timer.cancel()
        signal.signal(signal.SIGINT, before)


@cache
def _watch_launcher() -> None:
    """Begin to look, once a process, whether the one that launched this one is still there."""
    if os.environ.get(LIFELINE):
        threading.Thread(target=_stop_with_launcher, daemon=True).start()


def _stop_with_launcher() -> None:
    """Ask this process to stop when the one that launched it has ended without saying so."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
