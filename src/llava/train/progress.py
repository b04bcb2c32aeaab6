"""Who watches a run: a base that does nothing, and one that draws a progress line in the terminal with rich.

The library itself prints nothing; commands hand one of these to run_recipe.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.train.loop import StepRecord
from llava.train.metrics import running_mean
from llava.train.stages import TABLE_HEAD


@dataclass(frozen=True)
class RunInfo:
    """What is known before the first step. table: rows under stages.TABLE_HEAD."""

    out_dir: Path
    table: Sequence[tuple[str, ...]]
    total_steps: int
    first_step: int
    conversations: int
    device: str
    dtype: str


@dataclass(frozen=True)
class Sample:
    """An answer of the model as it stands, to a fixed picture and question."""

    step: int
    image: Path
    question: str
    answer: str


class Watcher:
    """Does nothing at every event; subclasses answer those they care for."""

    def started(self, info: RunInfo) -> None:
        """The model is loaded, the data is indexed, the first step is next."""

    def stepped(self, record: StepRecord) -> None:
        """A step is done."""

    def sampled(self, sample: Sample) -> None:
        """The model answered one of the fixed questions."""

    def saved(self, folder: Path) -> None:
        """A checkpoint is safe on the disk."""

    def stopped(self, message: str) -> None:
        """Somebody asked the run to stop, and it is saved; `message` says how to go on."""

    def ended(self) -> None:
        """The run is over, finished or not."""


class TerminalWatcher(Watcher):
    """One progress line: loss, tokens a second, share of supervised tokens, time left. Falls back to plain lines where
    there is no terminal, one every `plain_seconds`."""

    def __init__(self, *, label: str = "training", plain_seconds: float = 30.0) -> None:
        self._label = label
        self._plain_seconds = plain_seconds
        self._losses: list[float] = []
        self._progress: Any = None
        self._console: Any = None
        self._task: Any = None
        self._info: RunInfo | None = None
        self._told = 0.0

    def started(self, info: RunInfo) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Table

        self._info = info
        self._console = Console(stderr=True)
        table = Table(*TABLE_HEAD, title=f"{self._label}: {info.out_dir}", title_justify="left")
        for row in info.table:
            table.add_row(*row)
        self._console.print(table)
        resumed = f", resuming after step {info.first_step}" if info.first_step else ""
        self._console.print(
            f"{info.conversations:,} conversations, {info.total_steps:,} steps, {info.device}, {info.dtype}{resumed}"
        )
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn(self._label),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
        )
        self._progress.start()
        self._task = self._progress.add_task("steps", total=info.total_steps, completed=info.first_step, facts="")

    def stepped(self, record: StepRecord) -> None:
        self._losses.append(record.loss)
        loss = running_mean(self._losses[-25:])[-1]
        facts = f"loss {loss:.3f}  {record.tokens_per_second:,.0f} tokens/s  {record.supervised_share:.0%} supervised"
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step, facts=facts)
        elif self._info is not None and time.monotonic() - self._told > self._plain_seconds:
            self._told = time.monotonic()
            self._console.print(f"step {record.step}/{self._info.total_steps}  {facts}")

    def sampled(self, sample: Sample) -> None:
        if self._console is not None:
            self._console.print(
                f"step {sample.step}, {sample.image.name}: {sample.question} -> {sample.answer}", markup=False
            )

    def stopped(self, message: str) -> None:
        self.ended()
        self._console.print(message, markup=False)

    def ended(self) -> None:
        if self._progress is not None:
            with contextlib.suppress(RuntimeError):
                self._progress.stop()
            self._progress = None
