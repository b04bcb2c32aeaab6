"""A command on several processes: starting them, and letting them speak with one voice."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import typer

from llava.distributed import is_main, rank, world_size
from llava.errors import LlavaError, PeerFailedError, UsageError


def start_processes(arguments: Sequence[str], devices: int | None) -> None:
    """Run this same command on `devices` processes, and leave with their exit code when they are done.

    Returns at once where there is nothing to start: one device, or this is one of the processes already. Raises
    UsageError when torchrun has started another number of them.
    """
    if devices is None or (devices == 1 and world_size() == 1):
        return
    if world_size() > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        if devices != here:
            raise UsageError(f"--devices {devices}, but {here} processes were started here already; leave it out")
        return
    from llava.train.launch import launch

    raise typer.Exit(launch(arguments, processes=devices))


@contextmanager
def one_voice() -> Iterator[None]:
    """What this process of several has to say: an error of its own, under its number; never the echo of another's.

    Warnings come from process 0 alone. For one process: nothing changes.
    """
    if world_size() == 1:
        yield
        return
    from llava.train.launch import ECHO

    if not is_main():
        logging.getLogger("llava").setLevel(logging.ERROR)
    try:
        yield
    except PeerFailedError:
        _leave(ECHO)
    except LlavaError as error:
        text = " ".join(str(error).split())
        print(f"llava train: process {rank()} of {world_size()}: {text}", file=sys.stderr)
        _leave(2)


def _leave(code: int) -> NoReturn:
    """End at once: taking apart what the processes talk through may wait for one that is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
