"""Boxes in answers: read from text, brought back to the original picture's pixels, drawn.

A model names a place by corners x1, y1, x2, y2 as shares of a picture's width and height: 0 to 1 (LLaVA), 0 to 100
(XTuner's RefCOCO) or 0 to 1000. Of which picture depends on how it was trained: of what the tower saw, so that in a
picture padded to a square the shares are of the square, or of the original picture. Both are in the model's config, in
its `llava` block: "boxes": {"scale": 1, "frame": "seen"}. That is what is taken when nothing is said there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from llava.errors import CheckpointError, UsageError
from llava.prompt.images import ImageSettings

Box = tuple[float, float, float, float]
Frame = Literal["seen", "picture"]

_NUMBER = r"\s*(-?\d+(?:\.\d+)?|-?\.\d+)\s*"
_SHAPES = (
    # [0.1, 0.2, 0.3, 0.4], with round or no inner brackets; [[...]] too
    re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]"),
    re.compile(rf"\({_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\)"),
    re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,?\s*\({_NUMBER},{_NUMBER}\)"),
    re.compile(rf"\{{\s*<{_NUMBER}>\s*<{_NUMBER}>\s*<{_NUMBER}>\s*<{_NUMBER}>\s*\}}"),
)
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


@dataclass(frozen=True)
class BoxFormat:
    """How a model writes boxes. scale: what stands for the far edge; frame: the picture that the shares are of."""

    scale: float = 1.0
    frame: Frame = "seen"

    @classmethod
    def of(cls, block: Mapping[str, Any]) -> BoxFormat:
        """From the `llava` block of a config. Raises CheckpointError for values that mean nothing."""
        given = block.get("boxes", {})
        if not isinstance(given, Mapping) or set(given) - {"scale", "frame"}:
            raise CheckpointError(f'config: llava.boxes {given!r}; write {{"scale": 1, "frame": "seen"}}')
        scale, frame = given.get("scale", 1.0), given.get("frame", "seen")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or scale <= 0:
            raise CheckpointError(f"config: llava.boxes.scale {scale!r}; it is 1, 100 or 1000")
        if frame not in get_args(Frame):
            raise CheckpointError(f'config: llava.boxes.frame {frame!r}; it is "seen" or "picture"')
        return cls(float(scale), frame)


@dataclass(frozen=True)
class FoundBox:
    """A box in a text. shares: corners 0 to 1 with x1 <= x2 and y1 <= y2; start, end: where in the text it stands."""

    shares: Box
    start: int
    end: int


def find_boxes(text: str, *, scale: float = 1.0) -> list[FoundBox]:
    """All boxes of a text in reading order; what reaches beyond the scale is not one.

    >>> find_boxes("the cat is at [0.5, 0.25, 1.0, 0.75]")[0].shares
    (0.5, 0.25, 1.0, 0.75)
    """
    found = []
    for shape in _SHAPES:
        for match in shape.finditer(text):
            x1, y1, x2, y2 = (float(number) / scale for number in match.groups())
            if all(0.0 <= share <= 1.0 for share in (x1, y1, x2, y2)):
                shares = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
                found.append(FoundBox(shares, match.start(), match.end()))
    return sorted(found, key=lambda box: box.start)


def to_pixels(shares: Box, *, size: tuple[int, int], settings: ImageSettings, frame: Frame = "seen") -> Box:
    """Corners in pixels of the original picture, cut at its edges. size: its (height, width).

    The inverse of what `llava.prompt.images.preprocess` does to a place of the picture. Anyres models see the whole
    picture squashed as well as in tiles; their shares are of the whole.
    """
    height, width = size
    if frame == "picture" or settings.mode in ("squash", "anyres"):
        left, top, across, down = 0.0, 0.0, float(width), float(height)
    else:
        left, top, across, down = _seen(height, width, settings)
    x1, y1, x2, y2 = shares
    return (
        min(max(left + x1 * across, 0.0), width),
        min(max(top + y1 * down, 0.0), height),
        min(max(left + x2 * across, 0.0), width),
        min(max(top + y2 * down, 0.0), height),
    )


def draw_boxes(image: PIL.Image.Image, boxes: Sequence[Box], labels: Sequence[str] = ()) -> PIL.Image.Image:
    """A copy of a picture with boxes (pixels) drawn in different colours, and a label at each where given."""
    drawn = image.convert("RGB")
    draw = PIL.ImageDraw.Draw(drawn)
    line = max(1, round(max(drawn.size) / 200))
    font = PIL.ImageFont.load_default(size=max(10, max(drawn.size) // 30))
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        colour = _COLOURS[number % len(_COLOURS)]
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=line)
        if number < len(labels) and labels[number]:
            place = draw.textbbox((x1, y1), labels[number], font=font)
            # Above the box where there is room, else inside of it.
            lift = place[3] - y1 + line if place[3] - y1 + line <= y1 else 0
            place = draw.textbbox((x1 + line, y1 - lift), labels[number], font=font)
            draw.rectangle((place[0] - line, place[1] - line, place[2] + line, place[3] + line), fill=colour)
            draw.text((x1 + line, y1 - lift), labels[number], fill="white", font=font)
    return drawn


def draw_answer(
    image: PIL.Image.Image, text: str, *, settings: ImageSettings, form: BoxFormat
) -> tuple[PIL.Image.Image, int]:
    """The picture with an answer's boxes drawn on it, and how many there are. Raises UsageError when there is none."""
    found = find_boxes(text, scale=form.scale)
    if not found:
        raise UsageError(
            f"the answer holds no box with corners from 0 to {form.scale:g}; where the model counts otherwise, its "
            'config.json says so: "llava": {"boxes": {"scale": 100}}'
        )
    size = (image.height, image.width)
    pixels = [to_pixels(box.shares, size=size, settings=settings, frame=form.frame) for box in found]
    labels = [str(number) for number in range(1, len(pixels) + 1)] if len(pixels) > 1 else []
    return draw_boxes(image, pixels, labels), len(pixels)


def _seen(height: int, width: int, settings: ImageSettings) -> tuple[float, float, float, float]:
    """The part of the original picture's plane that the tower saw: left, top, width and height in its pixels."""
    left, top = 0.0, 0.0
    if settings.mode == "pad" and width != height:
        side = max(width, height)
        left, top = -float((side - width) // 2), -float((side - height) // 2)
        height = width = side
    edge = settings.shortest_edge or settings.size
    if width <= height:
        resized = (int(edge * height / width), edge)
    else:
        resized = (edge, int(edge * width / height))
    side = settings.size
    by_x, by_y = width / resized[1], height / resized[0]  # original pixels a resized one
    cut_top, cut_left = (resized[0] - side) // 2, (resized[1] - side) // 2
    return left + cut_left * by_x, top + cut_top * by_y, side * by_x, side * by_y
