"""What a run leaves to look at: `metrics.jsonl`, one line a step, and `loss.svg`, drawn by ourselves."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.train.journal import Journal, read_lines
from llava.train.loop import StepRecord


class MetricsLog:
    """`metrics.jsonl`: a line a step, each step once whatever happened to the run."""

    def __init__(self, path: Path, *, resume_at: int = 0) -> None:
        self.path = path
        self._journal = Journal(path, resume_at=resume_at)

    def write(self, record: StepRecord) -> None:
        """Add a step."""
        self._journal.write(describe_step(record))

    def sync(self) -> None:
        """Put every line on the disk. Raises OSError when that cannot be done: numbers must not vanish in silence."""
        self._journal.sync()


def describe_step(record: StepRecord) -> dict[str, Any]:
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
    if record.dropped:
        line["dropped"] = record.dropped
    if record.skipped:
        line["skipped"] = True
    if record.overflowed:
        line["overflowed"] = True
    return line


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out. No file: no lines."""
    return read_lines(path)


def draw_loss(lines: Sequence[Mapping[str, Any]], *, title: str, width: int = 640, height: int = 320) -> str:
    """The loss over the steps as an SVG text: every step faint, a running mean strong. Opens in any browser."""
    points = [(int(line["step"]), float(line["loss"])) for line in lines if line.get("loss") is not None]
    left, right, top, bottom = 52, 12, 30, 34
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">'
        f'<title>{html.escape(title)}</title><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{left}" y="18" font-weight="600">{html.escape(title)}</text>'
    )
    if not points:
        return head + f'<text x="{left}" y="{height // 2}">no steps yet</text></svg>'
    steps = [step for step, _ in points]
    smooth = running_mean([loss for _, loss in points])
    high = max(sorted(loss for _, loss in points)[max(0, math.ceil(0.995 * len(points)) - 1)], max(smooth))
    low = min(0.0, min(loss for _, loss in points))
    high = high if high > low else low + 1.0

    def place(step: float, loss: float) -> str:
        x = left + (step - steps[0]) / max(steps[-1] - steps[0], 1) * (width - left - right)
        y = top + (1 - (min(loss, high) - low) / (high - low)) * (height - top - bottom)
        return f"{x:.1f},{y:.1f}"

    parts = [head]
    for tick in _ticks(low, high):
        y = float(place(steps[0], tick).split(",")[1])
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end" fill="#555">{tick:g}</text>')
    for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}):
        x = place(step, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{height - 12}" text-anchor="middle" fill="#555">{step}</text>')
    raw = " ".join(place(step, loss) for step, loss in points)
    mean = " ".join(place(step, loss) for step, loss in zip(steps, smooth, strict=True))
    parts.append(f'<polyline points="{raw}" fill="none" stroke="#9ecae1" stroke-width="1"/>')
    parts.append(f'<polyline points="{mean}" fill="none" stroke="#08519c" stroke-width="2"/>')
    parts.append("</svg>")
    return "".join(parts)


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


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between two."""
    span = high - low
    step = 10.0 ** math.floor(math.log10(span))
    step = next(s for s in (step / 5, step / 2, step, step * 2) if span / s <= 6)
    first = math.ceil(low / step)
    return [round(k * step, 10) for k in range(first, int(high / step) + 1)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
