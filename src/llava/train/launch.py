"""Start a command on N processes of this machine, watch them, and end them together.

    launch(["train", "mine.yaml", "--devices", "2"], processes=2)

Each process finds the others through the environment, as under torchrun, which does the same over many machines. The
store that they meet in is kept here, so that it outlives any of them. A process that fails has said why itself; the
others are given a little time to notice, and are killed then. Ctrl-C and SIGTERM are passed on: the processes finish
their step, save and end. If this process is killed, theirs ends its standard input, which they take for a SIGTERM.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from llava.distributed import FAILED_KEY
from llava.train.stopping import LIFELINE

# Exit codes of a command beside 0: what it could not do and has said, stopped, and another process failed first.
_REFUSED, _STOPPED, ECHO = 2, 130, 75
# What a process that is still starting may end by when it is asked to stop.
_ASKED = (signal.SIGINT, signal.SIGTERM)
# How long the others may take to end by themselves after one has failed. A collective on a GPU never ends by itself.
_GRACE_SECONDS = 20.0
_POLL_SECONDS = 0.1
# What torch puts before the names of keys, in newer and older versions.
_PREFIXES = ("", "/worker/attempt_0/")


def launch(arguments: Sequence[str], *, processes: int, module: str = "llava") -> int:
    """Run `llava ARGUMENTS` on that many processes to their end; returns the exit code that stands for all.

    module: what is run in the place of `llava`. The code is 0 when all went well, 2 when one was refused (it has said
    why in a line), 130 when they were stopped, 1 for a bug or a process that was killed.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not by name

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))
    workers: list[subprocess.Popen[bytes]] = []
    try:
        with _signals_passed_on(workers) as passed:
            for number in range(processes):
                workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, *arguments],
                        env=_environment(number, processes, port=store.port),
                        stdin=subprocess.PIPE,
                        # A Ctrl-C in the terminal comes here alone, and is passed on once.
                        start_new_session=True,
                    )
                )
            for signal_number in passed:  # what came while they were being started reached the first ones only
                _send(workers, signal_number)
            _wait(workers, lambda: any(store.check([prefix + FAILED_KEY]) for prefix in _PREFIXES))
    finally:
        ours = _kill(workers)
    codes = [ECHO if worker in ours else worker.returncode for worker in workers]
    for number, code in enumerate(codes):
        if code < 0 and -code not in _ASKED:
            _tell_killed(number, -code)
    return _summarise(codes)


def _environment(number: int, processes: int, *, port: int) -> dict[str, str]:
    """What a process finds the others by, in torchrun's words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        # Threads that share a core wait for each other in turns: two to ten times slower.
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        **os.environ,
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        LIFELINE: "1",
    }


def _wait(workers: Sequence[subprocess.Popen[bytes]], one_has_failed: Callable[[], bool]) -> None:
    """Until all have ended, or one has failed (and said so, or ended) and all have had their time."""
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers):
        failed = any(worker.poll() not in (None, 0, _STOPPED) for worker in workers) or one_has_failed()
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + _GRACE_SECONDS
        if time.monotonic() > deadline:
            return
        time.sleep(_POLL_SECONDS)


@contextmanager
def _signals_passed_on(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass Ctrl-C and SIGTERM on to the workers there are; the list that it gives grows by each."""
    passed: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        passed.append(number)
        _send(workers, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(workers: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def _kill(workers: Sequence[subprocess.Popen[bytes]]) -> list[subprocess.Popen[bytes]]:
    """End whoever has not ended, and return them. SIGTERM is of no use: it asks to finish a step that never ends."""
    alive = [worker for worker in workers if worker.poll() is None]
    for worker in alive:
        worker.kill()
    for worker in workers:
        worker.wait()
        if worker.stdin is not None:
            worker.stdin.close()
    return alive


def _tell_killed(number: int, by: int) -> None:
    hint = "; the machine may be out of memory" if by == signal.SIGKILL else ""
    sys.stderr.write(f"llava: process {number} was ended by {signal.Signals(by).name}{hint}\n")


def _summarise(codes: Sequence[int]) -> int:
    """One exit code for all: the gravest."""
    told = [_STOPPED if -code in _ASKED else code for code in codes if code not in (0, ECHO)]
    if any(code not in (_REFUSED, _STOPPED) for code in told):
        return 1
    if _REFUSED in told:
        return _REFUSED
    if told:
        return _STOPPED
    return 1 if ECHO in codes else 0
