"""Who watches a run: a base that does nothing, and one that draws a progress line in the terminal with rich.

The library itself prints nothing; commands hand one of these to run_recipe.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.train.loop import StepRecord
from llava.train.stages import TABLE_HEAD

if TYPE_CHECKING:
    from llava.train.meter import Meter


@dataclass(frozen=True)
class RunInfo:
    """What is known before the first step. table: rows of what trains (train/stages.py names the columns); meter: reads
    MFU and memory off a step."""

    out_dir: Path
    table: Sequence[tuple[str, ...]]
    total_steps: int
    first_step: int
    conversations: int
    device: str
    dtype: str
    meter: Meter | None = None


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


class WatcherGroup(Watcher):
    """Several watchers as one, told in order."""

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers

    def started(self, info: RunInfo) -> None:
        for watcher in self._watchers:
            watcher.started(info)

    def stepped(self, record: StepRecord) -> None:
        for watcher in self._watchers:
            watcher.stepped(record)

    def sampled(self, sample: Sample) -> None:
        for watcher in self._watchers:
            watcher.sampled(sample)

    def saved(self, folder: Path) -> None:
        for watcher in self._watchers:
            watcher.saved(folder)

    def stopped(self, message: str) -> None:
        for watcher in self._watchers:
            watcher.stopped(message)

    def ended(self) -> None:
        for watcher in self._watchers:
            watcher.ended()


class TerminalWatcher(Watcher):
    """One progress line: loss, tokens a second, share of supervised tokens, MFU, memory, time left. Falls back to plain
    lines where there is no terminal, one every `plain_seconds`."""

    def __init__(self, *, label: str = "training", plain_seconds: float = 30.0) -> None:
        self._label = label
        self._plain_seconds = plain_seconds
        self._losses: list[float] = []
        self._seconds: deque[float] = deque(maxlen=50)
        self._progress: Any = None
        self._console: Any = None
        self._task: Any = None
        self._info: RunInfo | None = None
        self._told = 0.0

    def started(self, info: RunInfo) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._info = info
        self._console = Console(stderr=True)
        if not self._console.is_terminal:
            self._console = Console(stderr=True, width=140)  # a file has no width; rich would take 80 and cut numbers
        self._console.print(make_table(info.table, title=f"{self._label}: {info.out_dir}"))
        resumed = f", resuming after step {info.first_step}" if info.first_step else ""
        self._console.print(
            f"{info.conversations:,} conversations, {info.total_steps:,} steps, {info.device}, {info.dtype}{resumed}"
        )
        if info.meter is not None and info.meter.device.measured:
            device = info.meter.device
            self._console.print(
                f"MFU is the share of {device.teraflops:.3g} TFLOP/s, measured now: {device.name}", markup=False
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
        self._losses = [*self._losses[-24:], record.loss]
        self._seconds.append(record.seconds + record.waited_seconds)
        facts = self._facts(record)
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step, facts=facts)
        elif self._info is not None and time.monotonic() - self._told > self._plain_seconds:
            self._told = time.monotonic()
            total = self._info.total_steps
            left = statistics.median(self._seconds) * (total - record.step)
            self._console.print(f"step {record.step}/{total}  {facts}  {say_duration(left)} left")

    def _facts(self, record: StepRecord) -> str:
        finite = [loss for loss in self._losses if math.isfinite(loss)]
        loss = sum(finite) / len(finite) if finite else math.nan
        facts = f"loss {loss:.3f}  {record.tokens_per_second:,.0f} tokens/s  {record.supervised_share:.0%} supervised"
        if self._info is None or self._info.meter is None:
            return facts
        meter = self._info.meter
        return f"{facts}  MFU {meter.mfu(record):.1%}  {meter.memory() / 2**30:.1f} GiB"

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


def make_table(rows: Sequence[tuple[str, ...]], *, title: str) -> Any:
    """What trains as a table of rich; columns that say nothing are left out."""
    from rich.table import Table

    kept = [column for column in range(len(TABLE_HEAD)) if any(row[column] for row in rows)]
    table = Table(title=title, title_justify="left")
    for column in kept:
        right = TABLE_HEAD[column] in ("parameters", "rate", "LoRA rank")
        table.add_column(TABLE_HEAD[column], justify="right" if right else "left")
    for row in rows:
        table.add_row(*(row[column] for column in kept))
    return table


def say_duration(seconds: float) -> str:
    """A time for people: two units at most.

    >>> say_duration(45), say_duration(125), say_duration(7500), say_duration(200_000)
    ('45 s', '2 min', '2 h 5 min', '2 d 8 h')
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
