"""A radar plot as SVG text: several models over several benchmarks, each axis with its own scale."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

_SIDE, _RADIUS = 560, 180
_MARGIN = 1.06  # the rim lies a little beyond the best figure of its axis
MIN_AXES = 3


def radar(axes: Sequence[str], series: Mapping[str, Mapping[str, float]]) -> str:
    """One polygon a model. axes: benchmarks; series: model -> benchmark -> figure. A model is drawn over the axes
    that it has figures for; "" with fewer than three axes. The centre is 0, the rim of each axis just over its best.
    """
    if len(axes) < MIN_AXES:
        return ""
    rims = {
        axis: max([values[axis] for values in series.values() if axis in values] or [0.0]) * _MARGIN or 1.0
        for axis in axes
    }
    parts = [f'<svg viewBox="0 0 {_SIDE + 260} {_SIDE}" role="img" aria-label="figures of all benchmarks">']
    for share in (0.25, 0.5, 0.75, 1.0):
        parts.append(
            f'<polygon class="grid" points="{_points([_place(n, len(axes), share) for n in range(len(axes))])}"/>'
        )
    for number, axis in enumerate(axes):
        x, y = _place(number, len(axes), 1.0)
        tx, ty = _place(number, len(axes), 1.13)
        anchor = "middle" if abs(tx - _SIDE / 2) < 12 else "start" if tx > _SIDE / 2 else "end"
        parts.append(f'<line class="grid" x1="{_SIDE / 2}" y1="{_SIDE / 2}" x2="{x:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{tx:.1f}" y="{ty + 4:.1f}" text-anchor="{anchor}">{html.escape(axis)}</text>')
    for number, (model, values) in enumerate(series.items()):
        there = [
            (_place(place, len(axes), max(values[axis], 0.0) / rims[axis]), axis)
            for place, axis in enumerate(axes)
            if axis in values
        ]
        drawn = "polygon" if len(there) == len(axes) else "polyline"
        parts.append(f'<{drawn} class="model m{number % 9}" points="{_points([point for point, _ in there])}"/>')
        for (x, y), axis in there:
            said = html.escape(f"{model}, {axis}: {values[axis]:g}")
            parts.append(
                f'<circle class="m{number % 9}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{said}</title></circle>'
            )
        y = 40 + 22 * number
        parts.append(f'<circle class="m{number % 9}" cx="{_SIDE + 20}" cy="{y - 4}" r="5"/>')
        parts.append(f'<text x="{_SIDE + 32}" y="{y}">{html.escape(model)}</text>')
    return "".join([*parts, "</svg>"])


def _place(number: int, count: int, share: float) -> tuple[float, float]:
    angle = 2 * math.pi * number / count - math.pi / 2
    return _SIDE / 2 + _RADIUS * share * math.cos(angle), _SIDE / 2 + _RADIUS * share * math.sin(angle)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
