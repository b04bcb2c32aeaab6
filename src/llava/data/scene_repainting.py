"""A second renderer for drawn scenes, as somebody's drawing program would paint them: the gates' other world.

Flat named colours without smoothed edges, drawn at 224 to 640 pixels and then scaled down; circles and squares by
other drawing calls than the first renderer's; white, light, dark or black background; sometimes a thin outline.
"""

from __future__ import annotations

import math
import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from llava.data.scenes import PICTURE_SIDE, Scene, SceneObject, outline

CSS_COLOURS = {
    "red": ("red", "crimson"),
    "green": ("green", "lime", "limegreen"),
    "blue": ("blue", "mediumblue", "dodgerblue"),
    "yellow": ("yellow", "gold"),
    "orange": ("orange", "darkorange"),
    "purple": ("purple", "darkviolet", "blueviolet"),
    "black": ("black",),
}
LIGHT_BACKGROUNDS = ("white", "whitesmoke", "lightgray", "lightcyan", "beige")
DARK_BACKGROUNDS = ("black", "#202020", "#101828", "dimgray")
DRAWN_SIDES = (224, 336, 640)


def repaint(scene: Scene, rng: random.Random, *, side: int | None = None) -> Image.Image:
    """The scene as an RGB picture of side x side (drawn from DRAWN_SIDES when not given)."""
    side = side or rng.choice(DRAWN_SIDES)
    dark = rng.random() < 0.4 and not any(item.colour == "black" for item in scene.objects)
    picture = Image.new("RGB", (side, side), rng.choice(DARK_BACKGROUNDS if dark else LIGHT_BACKGROUNDS))
    draw = ImageDraw.Draw(picture)
    edge = "black" if rng.random() < 0.25 and not dark else None
    for item in scene.objects:
        _paint(draw, item, rng.choice(CSS_COLOURS[item.colour]), edge, side)
    return picture


def shrink(picture: Image.Image) -> NDArray[np.uint8]:
    """To the tower's side, bicubic, as the preprocessor does: (64, 64, 3) uint8."""
    return np.asarray(picture.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC))


def _paint(draw: ImageDraw.ImageDraw, item: SceneObject, colour: str, edge: str | None, side: int) -> None:
    x, y, r = item.x * side, item.y * side, item.radius * side
    width = max(side // 200, 1)
    if item.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=edge, width=width)
    elif item.shape == "square" and math.isclose(item.angle, 0.0):
        x1, y1, x2, y2 = (value * side for value in item.box)
        draw.rectangle((x1, y1, x2, y2), fill=colour, outline=edge, width=width)
    else:
        draw.polygon([(px * side, py * side) for px, py in outline(item)], fill=colour, outline=edge, width=width)
