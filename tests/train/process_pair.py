"""Two processes that stay up and run one function after another, so that importing torch is paid for once.

    with ProcessPair() as pair:
        first, second = pair.run(function, argument)     # function(argument) on both, joined through gloo

`function` must be importable (the processes are spawned). An exception on either is raised here with its traceback.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

SIZE = 2
_CASE_TIMEOUT_SECONDS = 120.0


class ProcessPair:
    """Starts at the first `run`, ends behind `with`. After a failure the next `run` gets a new pair."""

    def __enter__(self) -> ProcessPair:
        self._folder = tempfile.TemporaryDirectory()
        self._ends: list[Connection] = []
        self._workers: list[BaseProcess] = []
        self._started = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(patience_seconds=10)
        self._folder.cleanup()

    def run(self, function: Callable[[Any], Any], argument: Any = None) -> list[Any]:
        """What `function(argument)` returns on each of the two."""
        if not self._workers:
            self._start()
        results, problems = [], []
        try:
            for end in self._ends:
                end.send((function, argument))
            for number, end in enumerate(self._ends):
                assert end.poll(_CASE_TIMEOUT_SECONDS), f"process {number} hangs in {function.__name__}({argument!r})"
                result, problem = end.recv()
                results.append(result)
                problems += [f"process {number}:\n{problem}"] if problem else []
            assert not problems, "\n".join(problems)
        except (AssertionError, OSError):
            self._end(patience_seconds=0)
            raise
        return results

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._started += 1
        store = str(Path(self._folder.name) / f"store-{self._started}")
        for number in range(SIZE):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(number, store, theirs))
            worker.start()
            theirs.close()
            self._ends.append(ours)
            self._workers.append(worker)

    def _end(self, *, patience_seconds: float) -> None:
        for end in self._ends:
            end.close()
        for worker in self._workers:
            worker.join(patience_seconds)
            if worker.is_alive():
                worker.kill()
                worker.join()
        self._ends.clear()
        self._workers.clear()


def _work(number: int, store_path: str, pipe: Connection) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(SIZE)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(store_path, SIZE)
    dist.init_process_group("gloo", store=store, rank=number, world_size=SIZE, timeout=timedelta(seconds=30))
    try:
        while True:
            function, argument = pipe.recv()
            try:
                pipe.send((function(argument), ""))
            except Exception:
                pipe.send((None, traceback.format_exc()))
    except EOFError:
        pass  # the test is over
    finally:
        dist.destroy_process_group()
