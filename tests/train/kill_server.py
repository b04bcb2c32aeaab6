"""A process that has everything imported and forks a child for each run, so that a run that is killed costs 0.2 s.

    python -m tests.train.kill_server WORLD     then one JSON request a line on stdin, one JSON answer a line on stdout

A request is an `Order` as JSON. The child runs `run_recipe`; it is killed with SIGKILL after a time (by the parent, so
anywhere), or kills itself at the k-th call that changes the disk inside a region (fail points); or such a call fails
with an error number. Nothing of this is in the package: the fail points patch the child's own modules.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Order:
    """One child. region: where calls are counted (the run once all is opened, save_state, the run's last act).

    kill_after: seconds from the fork. kill_at: the call, from 1, that the child dies at, before or just after it is
    done. fail_at: the first of fail_for calls that raise OSError(fail_with). file_bytes: the longest file that can be
    written from then on (RLIMIT_FSIZE: the kernel refuses the rest).
    """

    changes: list[str] = field(default_factory=list)
    region: Literal["run", "save", "finish"] = "run"
    kill_after: float | None = None
    kill_at: int | None = None
    kill_before: bool = True
    fail_at: int | None = None
    fail_for: int = 1
    fail_with: int = errno.ENOSPC
    file_bytes: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a child: calls counted in the region; message of the error, log: warnings and errors."""

    status: Literal["finished", "killed", "refused", "broken"]
    calls: int = 0
    first_step: int = 0
    message: str = ""
    log: str = ""
    seconds: float = 0.0


class KillServer:
    """The other end of the pipe: starts the server, sends orders."""

    def __init__(self, world: Path) -> None:
        self.kills = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.kill_server", str(world)],
            cwd=ROOT,
            # One thread: a child of a process with a pool of OpenMP threads would wait for them for ever.
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert self._answer() == {"ready": True}
        except AssertionError:
            self.close()
            raise

    def run(self, *changes: str, **order: Any) -> Outcome:
        """Run once and say what became of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(Order(changes=list(changes), **order))) + "\n")
        self._process.stdin.flush()
        outcome = Outcome(**self._answer())
        self.kills += outcome.status == "killed"
        return outcome

    def close(self) -> None:
        """Let the server end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the kill server ended with {self._process.wait(timeout=30)}"
        return json.loads(line)


# --- a world to train in -----------------------------------------------------------------------------------------


def write_world(world: Path) -> None:
    """Two bases, twelve pictures with two questions each, and a recipe of nine steps."""
    from PIL import Image

    from tests.train.tiny_training import write_tiny_bases

    write_tiny_bases(world)
    config = world / "language_model" / "config.json"
    # With dropout the generators' state matters.
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.1}))
    (world / "images").mkdir()
    records = []
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 200 - 10 * number, 90)).save(world / "images" / f"{number}.png")
        for question in ("Colour?", "Which one is it?"):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": f"number {number}"}]
            records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (world / "mix.json").write_text(json.dumps(records, indent=1))
    records[5]["image"] = "missing.png"
    (world / "faulty.json").write_text(json.dumps(records, indent=1))
    (world / "recipe.yaml").write_text(
        f"""\
model: {{language_model: {world}/language_model, vision_tower: {world}/vision_tower, template: llava_hf}}
data: {{files: [{world}/mix.json], images: {world}/images, max_tokens: 200, row_tokens: 256, workers: 0}}
optim: {{learning_rate: 5e-3, batch_conversations: 4, epochs: 1.5}}
run: {{out: {world}/none, device: cpu, dtype: float32, save_every: 2}}
"""
    )


# --- the server --------------------------------------------------------------------------------------------------


def serve(world: Path) -> None:
    """Answer orders until stdin ends."""
    import torch

    torch.set_num_threads(1)
    from llava.train.plot import Figure
    from llava.train.recipe import load_recipe
    from llava.train.run import run_recipe

    # Written and moved as ever, but not drawn: that alone costs more than the nine steps.
    Figure.png = lambda self: b""  # type: ignore[method-assign]
    # Every lazy import and cache of a run, once: children inherit them.
    for number, changes in enumerate(([], ["tune.language_model=full"])):
        run_recipe(load_recipe(world / "recipe.yaml", [f"run.out={world}/warm{number}", *changes]))
    answer({"ready": True})
    for line in sys.stdin:
        answer(asdict(fork_one(world, Order(**json.loads(line)))))


def answer(message: dict[str, Any]) -> None:
    """One line to the test."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def fork_one(world: Path, order: Order) -> Outcome:
    """Fork, wait (or kill), and collect what the child wrote before its end."""
    reading, writing = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            outcome = run_child(world, order)
            os.write(writing, json.dumps(asdict(outcome)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    if order.kill_after is not None:
        select.select([reading], [], [], order.kill_after)
        os.kill(child, signal.SIGKILL)  # it is not waited for yet, so the number is still its own
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    _, how = os.waitpid(child, 0)
    seconds = time.perf_counter() - started
    if text:
        return Outcome(**{**json.loads(text), "seconds": seconds})
    killed = os.WIFSIGNALED(how) and os.WTERMSIG(how) == signal.SIGKILL
    return Outcome("killed" if killed else "broken", message=f"wait status {how}", seconds=seconds)


def run_child(world: Path, order: Order) -> Outcome:
    """One run in the child, with its fail points set."""
    import traceback

    from llava.errors import LlavaError
    from llava.train.recipe import load_recipe
    from llava.train.run import run_recipe

    log = io.StringIO()
    logging.basicConfig(stream=log, level=logging.WARNING, force=True)
    points = FailPoints(order)
    recipe = load_recipe(world / "recipe.yaml", order.changes)
    try:
        with points.set():
            result = run_recipe(recipe)
    except LlavaError as error:
        return Outcome("refused", points.calls, message=str(error), log=log.getvalue())
    except BaseException:
        return Outcome("broken", points.calls, message=traceback.format_exc(), log=log.getvalue())
    return Outcome("finished", points.calls, result.first_step, log=log.getvalue())


class FailPoints:
    """Counts the calls that change the disk, and dies or fails at one of them."""

    def __init__(self, order: Order) -> None:
        self.calls = 0
        self._order = order
        self._active = False

    @contextlib.contextmanager
    def set(self) -> Iterator[None]:
        """Patch the os calls, and the entrances of the regions, for the child's life."""
        import llava.train.run as run_module
        import llava.train.state as state_module

        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._counted(getattr(os, name)))
        whole_open, whole_os_open = io.open, os.open

        def opened(path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            call = self._counted(whole_open) if set(mode) & set("wxa+") else whole_open
            return call(path, mode, *args, **more)

        def os_opened(path: Any, flags: int, *args: Any, **more: Any) -> Any:
            call = self._counted(whole_os_open) if flags & (os.O_WRONLY | os.O_RDWR) else whole_os_open
            return call(path, flags, *args, **more)

        io.open = opened
        os.open = os_opened
        whole_save = state_module.save_file

        def saved(tensors: Any, path: Path) -> None:
            """The file is written half before the call's fate is known."""

            def half(*args: Any) -> None:
                whole_save(tensors, path)

            whole_save(tensors, path)
            data = path.read_bytes()
            with whole_open(path, "wb") as file:
                file.write(data[: len(data) // 2])
            self._counted(half)()

        state_module.save_file = saved
        for region, name in (("save", "save_state"), ("finish", "_finish")):
            setattr(run_module, name, self._entered(region, getattr(run_module, name)))
        prepare = run_module.prepare_run

        def prepared(*args: Any, **more: Any) -> Any:
            result = prepare(*args, **more)
            self._active = self._order.region == "run"
            if (limit := self._order.file_bytes) is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return result

        run_module.prepare_run = prepared
        yield

    def _entered(self, region: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def entered(*args: Any, **more: Any) -> Any:
            self._active |= self._order.region == region
            try:
                return call(*args, **more)
            finally:
                self._active = self._order.region == "run"

        return entered

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **more: Any) -> Any:
            if not self._active:
                return call(*args, **more)
            self.calls += 1
            order = self._order
            if order.fail_at is not None and order.fail_at <= self.calls < order.fail_at + order.fail_for:
                raise OSError(order.fail_with, os.strerror(order.fail_with), str(args[0]) if args else None)
            dies = self.calls == order.kill_at
            if dies and order.kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*args, **more)
            finally:
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)

        return counted


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
