"""The curves of a run as one picture: the loss, and below it learning rate and gradient norm.

    figure = draw_run(read_metrics(path), title="runs/mine")
    figure.svg(), figure.png()

Drawn by ourselves from lines and labels, once for a browser (SVG) and once for everything else (PNG, by PIL), so that
no plotting package is needed. Not covered: interaction; trackers (train/trackers.py) have that.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llava.train.metrics import running_mean

Point = tuple[float, float]

WIDTH, HEIGHT = 800, 520
_PNG_SCALE = 2  # pixels a unit, so that letters are sharp on dense screens
_MOST_POINTS = 1200  # more than the picture is wide tell nothing
_INK, _GREY, _GRID, _FAINT, _STRONG = "#222222", "#666666", "#e4e4e4", "#a6cbe8", "#1f5fa8"


@dataclass(frozen=True)
class Line:
    """A line through points, in units from the upper left corner."""

    points: Sequence[Point]
    colour: str
    width: float


@dataclass(frozen=True)
class Label:
    """A text whose baseline is at y; x is its left end, middle or right end."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "start"
    size: int = 13
    colour: str = _INK


@dataclass(frozen=True)
class Figure:
    """Shapes on white, painted in order."""

    title: str
    shapes: Sequence[Line | Label]
    width: int = WIDTH
    height: int = HEIGHT

    def svg(self) -> str:
        """The figure as a whole SVG text."""
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="system-ui, sans-serif" role="img">'
            f'<title>{html.escape(self.title)}</title><rect width="100%" height="100%" fill="white"/>'
        ]
        for shape in self.shapes:
            if isinstance(shape, Label):
                parts.append(
                    f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" text-anchor="{shape.anchor}" '
                    f'font-size="{shape.size}" fill="{shape.colour}">{html.escape(shape.text)}</text>'
                )
            else:
                points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
                parts.append(
                    f'<polyline points="{points}" fill="none" stroke="{shape.colour}" stroke-width="{shape.width}" '
                    'stroke-linejoin="round"/>'
                )
        return "".join([*parts, "</svg>\n"])

    def png(self) -> bytes:
        """The figure as a PNG file's bytes, two pixels a unit."""
        from PIL import Image, ImageDraw, ImageFont

        oversize = 2 * _PNG_SCALE  # drawn larger and shrunk: PIL's lines are not smoothed
        image = Image.new("RGB", (self.width * oversize, self.height * oversize), "white")
        draw = ImageDraw.Draw(image)
        for shape in self.shapes:
            if isinstance(shape, Line):
                points = [(x * oversize, y * oversize) for x, y in shape.points]
                draw.line(points, fill=shape.colour, width=round(shape.width * oversize), joint="curve")
        image = image.resize((self.width * _PNG_SCALE, self.height * _PNG_SCALE), Image.Resampling.LANCZOS)
        draw = ImageDraw.Draw(image)
        anchors = {"start": "ls", "middle": "ms", "end": "rs"}
        for shape in self.shapes:
            if isinstance(shape, Label):
                font = ImageFont.load_default(shape.size * _PNG_SCALE)
                place = (shape.x * _PNG_SCALE, shape.y * _PNG_SCALE)
                draw.text(place, shape.text, fill=shape.colour, font=font, anchor=anchors[shape.anchor])
        out = io.BytesIO()
        image.save(out, "PNG", optimize=True)
        return out.getvalue()


@dataclass(frozen=True)
class _Panel:
    """Where one curve stands: the inner edges of its axes."""

    left: float
    top: float
    right: float
    bottom: float
    name: str
    ticks: int


_PANELS = {
    "loss": _Panel(70, 68, 780, 318, "", 6),
    "learning_rate": _Panel(70, 380, 390, 480, "learning rate", 4),
    "grad_norm": _Panel(460, 380, 780, 480, "gradient norm, before clipping", 4),
}


def draw_run(lines: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """The figure of a run's metrics lines; each curve with every step faint and its running mean strong."""
    curves = {
        key: [(int(line["step"]), float(line[key])) for line in lines if line.get(key) is not None] for key in _PANELS
    }
    window = smoothing_window(len(curves["loss"]))
    shapes: list[Line | Label] = [Label(70, 30, _shorten(title, 78), size=17)]
    if curves["loss"]:
        step, _ = curves["loss"][-1]
        mean = running_mean([value for _, value in curves["loss"]], window=window)[-1]
        shapes.append(
            Label(70, 51, f"step {step:,}: loss {mean:.4g}" + f" (mean of {window} steps)" * (window > 1), colour=_GREY)
        )
    for key, panel in _PANELS.items():
        smooth = key != "learning_rate"
        shapes += _draw_panel(panel, curves[key], window=window if smooth else 1)
    return Figure(title, shapes)


def smoothing_window(steps: int) -> int:
    """Steps that a running mean covers: a fortieth of the run, 1 to 200."""
    return min(200, max(1, steps // 40))


def _draw_panel(panel: _Panel, curve: Sequence[tuple[int, float]], *, window: int) -> list[Line | Label]:
    """Grid, axis labels, the curve and its mean. Values above all but .5 % are drawn at the upper edge."""
    shapes: list[Line | Label] = [Label(panel.left, panel.top - 8, panel.name, size=12, colour=_GREY)]
    if not curve:
        middle = ((panel.left + panel.right) / 2, (panel.top + panel.bottom) / 2)
        return [*shapes, Label(*middle, "no steps yet", anchor="middle", colour=_GREY)]
    steps, values = [step for step, _ in curve], [value for _, value in curve]
    mean = running_mean(values, window=window)
    high = max(sorted(values)[max(0, math.ceil(0.995 * len(values)) - 1)], *mean)
    low = min(0.0, *values)
    high = high if high > low else low + 1.0
    across, up = panel.right - panel.left, panel.bottom - panel.top

    def place(step: float, value: float) -> Point:
        share = (step - steps[0]) / max(steps[-1] - steps[0], 1)
        return panel.left + share * across, panel.bottom - (min(value, high) - low) / (high - low) * up

    for tick in round_numbers(low, high, most=panel.ticks):
        _, y = place(steps[0], tick)
        shapes.append(Line([(panel.left, y), (panel.right, y)], _GRID, 1))
        shapes.append(Label(panel.left - 8, y + 4, f"{tick:g}", anchor="end", size=12, colour=_GREY))
    shapes.append(Label(panel.right, panel.bottom + 35, "steps", anchor="end", size=12, colour=_GREY))
    wanted = round_numbers(steps[0], steps[-1], most=panel.ticks) if steps[-1] > steps[0] else [float(steps[0])]
    for tick in (tick for tick in wanted if tick == int(tick)):
        x, _ = place(tick, low)
        shapes.append(Line([(x, panel.bottom), (x, panel.bottom + 4)], _GREY, 1))
        shapes.append(Label(x, panel.bottom + 19, f"{int(tick):,}", anchor="middle", size=12, colour=_GREY))
    if window > 1:
        shapes.append(Line(_thin(curve, place), _FAINT, 1))
    smoothed = [*zip(steps, mean, strict=True)]
    shapes.append(Line(_thin(smoothed, place), _STRONG, 2))
    return shapes


def _thin(curve: Sequence[tuple[int, float]], place: Callable[[float, float], Point]) -> list[Point]:
    """Points of a curve; of a long one the lowest and highest of each stretch, so that no spike is lost."""
    if len(curve) == 1:  # a point would not be seen
        x, y = place(*curve[0])
        return [(x - 2, y), (x + 2, y)]
    if len(curve) <= _MOST_POINTS:
        return [place(*point) for point in curve]
    stretch = math.ceil(2 * len(curve) / _MOST_POINTS)
    kept: list[tuple[int, float]] = []
    for start in range(0, len(curve), stretch):
        part = curve[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [place(*point) for point in kept]


def round_numbers(low: float, high: float, *, most: int = 6) -> list[float]:
    """At most `most` + 1 round numbers between two.

    >>> round_numbers(0.0, 2.6, most=3)
    [0.0, 1.0, 2.0]
    """
    span = high - low
    power = 10.0 ** math.floor(math.log10(span))
    step = next(s for s in (power / 5, power / 2, power, power * 2, power * 5, power * 10) if span / s <= most)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
