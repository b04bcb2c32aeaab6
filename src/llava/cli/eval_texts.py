"""What `llava eval` says: a benchmark's facts, how far it is, figures and comparisons."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llava.eval.run import Progress

if TYPE_CHECKING:
    from llava.errors import LlavaError
    from llava.eval.compare import Comparison
    from llava.eval.result import Result
    from llava.eval.task import Task

# How often progress is said where stderr is a file.
_SAY_EVERY_SECONDS = 15.0


def description(task: Task) -> str:
    """All facts of a benchmark: files, prompt, decoding, published figures, traps."""
    from llava.eval.figures import number

    facts = task.describe()
    lines = [f"{task.name}: {facts.title}", "", "files, within --data:"]
    for file in facts.files:
        rows = "" if file.rows is None else f", {file.rows:,} rows"
        lines += [f"  {file.path}", f"      {file.what}{rows}; from {file.source}"]
        if file.sha256:
            lines.append(f"      sha256 {file.sha256}")
    lines += ["", "prompt:", *(f"  {line}" for line in facts.prompt.split("\n"))]
    decoding = ", ".join(f"{name} {value}" for name, value in facts.decoding.items())
    lines += ["", f"decoding: {decoding}"]
    if facts.splits:
        lines.append(f"splits: {', '.join(facts.splits)} (the first is the usual one)")
    if facts.needs:
        lines.append(f"needs: {', '.join(facts.needs)}")
    if facts.published:
        lines += ["", f"published ({facts.published_metric}):"]
        width = max(map(len, facts.published))
        lines += [f"  {model:<{width}}  {number(value)}" for model, value in facts.published.items()]
    if facts.traps:
        lines += ["", "traps:", *(f"  - {trap}" for trap in facts.traps)]
    return "\n".join(lines)


def summary(results: Sequence[Result]) -> str:
    """A line a figure, the published ones behind the first."""
    from llava.eval.figures import interval_text, number

    lines = []
    for result in results:
        for name, value in result.headline.items():
            line = f"{result.task:<16} {name:<18} {number(value):>10}"
            if name == result.published_metric:
                between = interval_text(result)
                line += f"  [{between}]" * bool(between)
                line += "".join(f"  {model} {number(figure)}" for model, figure in list(result.published.items())[:2])
            lines.append(line)
        lines += [f"    note: {note}" for note in result.notes]
    return "\n".join(lines)


def comparison_lines(comparisons: Sequence[Comparison]) -> str:
    """A line a benchmark."""
    from llava.eval.figures import number

    lines = []
    for one in comparisons:
        lines.append(
            f"{one.task:<16} {number(one.first)} -> {number(one.second)} {one.metric}: of {one.questions:,} questions "
            f"{one.changed:,} answered differently, {one.better:,} better, {one.worse:,} worse; {one.verdict}"
        )
        lines += [f"    note: {note}" for note in one.notes]
    return "\n".join(lines)


class Bar(Progress):
    """A bar with the time left in a terminal; else a line now and then."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task_id: Any = None
        self._name = ""
        self._total = self._done = self._first = self._failed = 0
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, task: str, total: int, done: int) -> None:
        self._name, self._total, self._done, self._first, self._failed = task, total, done, done, 0
        self._began = self._said = time.monotonic()
        if done:
            print(f"{task}: {done:,} of {total:,} are answered already; going on", file=sys.stderr)
        if self._bar is not None:
            self._task_id = self._bar.add_task(task, total=total, completed=done)

    def answered(self, error: LlavaError | None) -> None:
        self._done += 1
        self._failed += error is not None
        if self._bar is not None:
            failed = f", {self._failed} left out" * bool(self._failed)
            self._bar.update(self._task_id, advance=1, description=self._name + failed)
            return
        now = time.monotonic()
        if now - self._said >= _SAY_EVERY_SECONDS:
            self._said = now
            left = (now - self._began) / (self._done - self._first) * (self._total - self._done)
            print(f"{self._name}: {self._done:,} of {self._total:,}, {_lasting(left)} left", file=sys.stderr)

    def end(self) -> None:
        seconds = time.monotonic() - self._began
        asked = self._done - self._first
        if asked and self._bar is None:
            print(f"{self._name}: {asked:,} answered in {_lasting(seconds)}", file=sys.stderr)


def _lasting(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
