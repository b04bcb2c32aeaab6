"""`metrics.jsonl`, one line a step: what a run did, in numbers (train/plot.py draws them)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.train.journal import Journal, read_lines

if TYPE_CHECKING:
    from llava.train.loop import StepRecord
    from llava.train.meter import Meter


class MetricsLog:
    """`metrics.jsonl`: a line a step, each step once whatever happened to the run. meter: adds MFU and memory."""

    def __init__(self, path: Path, *, resume_at: int = 0, meter: Meter | None = None) -> None:
        self.path = path
        self._meter = meter
        self._journal = Journal(path, resume_at=resume_at)

    def write(self, record: StepRecord) -> None:
        """Add a step."""
        self._journal.write(describe_step(record, self._meter))

    def sync(self) -> None:
        """Put every line on the disk. Raises OSError when that cannot be done: numbers must not vanish in silence."""
        self._journal.sync()


def describe_step(record: StepRecord, meter: Meter | None = None) -> dict[str, Any]:
    """The line of a step: plain numbers; what is not finite becomes null, as JSON has no other way."""
    line: dict[str, Any] = {
        "step": record.step,
        "epoch": round(record.epoch, 6),
        "loss": _finite(record.loss),
        "learning_rate": record.learning_rate,
        "grad_norm": _finite(record.grad_norm),
        "tokens": record.tokens,
        "answer_tokens": record.answer_tokens,
        "conversations": record.conversations,
        "padding_share": round(1 - record.tokens / max(record.positions, 1), 4),
        "supervised_share": round(record.supervised_share, 4),
        "tokens_per_second": round(record.tokens_per_second, 1),
        "seconds": round(record.seconds, 4),
        "waited_seconds": round(record.waited_seconds, 4),
    }
    if meter is not None:
        line["mfu"] = round(meter.mfu(record), 4)
        line["memory_gib"] = round(meter.memory() / 2**30, 3)
    for name, count in (("dropped", record.dropped), ("truncated", record.truncated), ("bad", record.bad)):
        if count:
            line[name] = count
    if record.skipped:
        line["skipped"] = True
    if record.overflowed:
        line["overflowed"] = True
    return line


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out. No file: no lines."""
    return read_lines(path)


def running_mean(values: Sequence[float], *, window: int = 25) -> list[float]:
    """The mean of the last `window` values at each place (of fewer at the beginning)."""
    means = []
    total = 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        means.append(total / min(index + 1, window))
    return means


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
