"""Histograms and bars as SVG, drawn by ourselves: no script, no request, sharp at any size."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 420, 150, 8, 22, 16

_LABELLED_BINS = 20  # so many bars of one value each have their values below them


@dataclass(frozen=True)
class Bins:
    """counts[i] values lie in edges[i] <= value < edges[i + 1]; `beyond` more lie above the last edge."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]
    beyond: int


def bin_values(values: NDArray[Any], *, bins: int = 42) -> Bins:
    """Equal whole-numbered bins up to the 99.5th percentile, so that one giant does not flatten all the others."""
    low, high = int(values.min()), int(values.max())
    top = min(high, max(low, int(np.percentile(values, 99.5) * 1.05)))
    width = max(1, -(-(top + 1 - low) // bins))
    number = (top - low) // width + 1
    edges = low + width * np.arange(number + 1)
    counts, _ = np.histogram(values, bins=np.append(edges[:-1], edges[-1]) - 0.5)
    return Bins(tuple(int(c) for c in counts), tuple(float(e) for e in edges), int((values >= edges[-1]).sum()))


def histogram(values: NDArray[Any], *, title: str, unit: str, limit: int | None = None) -> str:
    """A histogram with its median, and a line at `limit` where that lies in the picture."""
    name = html.escape(title)
    if not len(values):
        return f"<figure><figcaption>{name}</figcaption><p class=soft>nothing to count</p></figure>"
    if values.min() == values.max():
        same = f"all {int(values[0]):,}"
        return f"<figure><figcaption>{name} <span class=soft>{same}</span></figcaption></figure>"
    found = bin_values(values)
    counts = [*found.counts, *([found.beyond] if found.beyond else [])]
    most = max(counts)
    step = (_WIDTH - 2 * _LEFT) / len(counts)
    floor = _HEIGHT - _BOTTOM
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">']
    for place, count in enumerate(counts):
        if not count:
            continue
        # A single value among thousands must be seen: at least two units high.
        tall = max(2.0, (floor - _TOP) * count / most)
        beyond = place >= len(found.counts)
        text = f"{_bin_name(found, place)} {unit}: {count:,}"
        parts.append(
            f'<rect class="{"beyond" if beyond else "bar"}" x="{_LEFT + place * step + 0.5:.1f}" '
            f'y="{floor - tall:.1f}" width="{max(1.0, step - 1):.1f}" height="{tall:.1f}"><title>{text}</title></rect>'
        )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _LEFT}" y1="{floor}" y2="{floor}"/>')
    low, high = found.edges[0], found.edges[-1]

    def place_of(value: float) -> float:
        return _LEFT + step * len(found.counts) * (value - low) / max(high - low, 1)

    if len(found.counts) <= _LABELLED_BINS and high - low == len(found.counts):
        ticks = [(_LEFT + step * (place + 0.5), f"{low + place:,.0f}", "middle") for place in range(len(found.counts))]
    else:
        middle = (low + high) // 2
        end = _LEFT + step * len(found.counts)
        ticks = [(_LEFT, f"{low:,.0f}", "start"), (place_of(middle), f"{middle:,.0f}", "middle")]
        ticks.append((end, f"{high - 1:,.0f}", "end"))
    for x, label, anchor in ticks:
        parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 7}" text-anchor="{anchor}">{label}</text>')
    if limit is not None and low <= limit <= high:
        x = place_of(limit)
        side, away = ("end", -4) if x > _WIDTH * 0.7 else ("start", 4)
        parts.append(
            f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 12}" y2="{floor}"/>'
            f'<text class="limit-text" x="{x + away:.1f}" y="{_TOP - 4}" text-anchor="{side}">limit {limit:,}</text>'
        )
    parts.append("</svg>")
    median, most_value = int(np.median(values)), int(values.max())
    caption = f"{name} <span class=soft>median {median:,}, most {most_value:,}</span>"
    return f"<figure><figcaption>{caption}</figcaption>{''.join(parts)}</figure>"


def two_bars(rows: Sequence[tuple[str, int, int]]) -> str:
    """For each (name, alone, shared): two bars on one scale, with the ratio between them."""
    cells = []
    for name, alone, shared in rows:
        most = max(alone, shared, 1)
        ratio = alone / max(shared, 1)
        cells.append(
            f"<tr><th>{html.escape(name)}</th><td class=wide>"
            f'<div class="pair alone" style="width:{100 * alone / most:.1f}%"></div>'
            f'<div class="pair shared" style="width:{max(0.5, 100 * shared / most):.1f}%"></div></td>'
            f"<td class=num>{alone:,} alone<br>{shared:,} shared</td><td class=ratio>{ratio:.2f}x</td></tr>"
        )
    return f"<table class=sharing>{''.join(cells)}</table>"


def _bin_name(found: Bins, place: int) -> str:
    if place >= len(found.counts):
        return f"{found.edges[-1]:,.0f} and more"
    low, high = int(found.edges[place]), int(found.edges[place + 1]) - 1
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
