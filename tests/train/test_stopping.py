"""Ctrl-C before a run has begun ends it, whatever the libraries that are being imported do with it."""

import os
import signal
import subprocess
import sys

import pytest

from llava.train.stopping import leaving_on_request

PROGRAM = """
import time, sys
from llava.train import stopping
stopping._PATIENCE_SECONDS = .2
@stopping.leaving_on_request(lambda: print("stopped", file=sys.stderr))
def work():
    class Swallows:
        def __del__(self):  # what is raised in here goes no further
            print("ready", flush=True)
            time.sleep(60)
    Swallows()
    while True:
        time.sleep(.01)
work()
"""


def test_an_interrupt_that_a_library_swallows_still_ends_the_process() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Exception ignored in" in told and told.endswith("\nstopped\n")


def test_an_interrupt_that_a_library_turns_into_an_error_is_an_interrupt() -> None:
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt), leaving_on_request(lambda: told.append("stopped")):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once") from None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not told


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ImportError, match="mine"), leaving_on_request(lambda: None):
        raise ImportError("mine")
