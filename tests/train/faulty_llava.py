"""`llava` with a fault in one of its processes: `LLAVA_TEST_FAULT=raise:1:3` in process 1 before its step 3.

raise: a LlavaError; crash: a bug's exception; kill: SIGKILL; wait: nothing goes wrong, but every step takes its time.
"""

import os
import signal
import sys
import time
from typing import Any

from llava.cli.main import main
from llava.errors import DataError
from llava.train.loop import Trainer


def put_in_fault(kind: str, process: int, step: int) -> None:
    take_step = Trainer.step

    def faulty(self: Trainer, made: Any, **kwargs: Any) -> Any:
        if kind == "wait":
            time.sleep(0.2)
        elif int(os.environ["RANK"]) == process and made.step + 1 == step:
            if kind == "raise":
                raise DataError("mix.json:3: it cannot be read any more; put it back")
            if kind == "crash":
                raise ZeroDivisionError("a bug of ours")
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(self, made, **kwargs)

    Trainer.step = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    name, number, at = os.environ["LLAVA_TEST_FAULT"].split(":")
    put_in_fault(name, int(number), int(at))
    sys.exit(main())
