"""A drawn world of coloured shapes: what the quickstart's pictures show, and how they are painted.

A scene is one to four flat shapes on a background; it knows every fact that can be asked of its picture. Scenes and
pictures are functions of the random generator handed in, on every machine: the drawing uses Python's own generator for
the world and NumPy's for pixel noise. Sizes are fractions of the picture's side, so a scene can be painted at any size.
"""

from __future__ import annotations

import colorsys
import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black")
SIZES = ("small", "large")
REGIONS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
MAX_OBJECTS = 4
PICTURE_SIDE = 64
SUPERSAMPLING = 3
PADDING_GREY = 127  # what a picture that is not square is padded with: the mean .5 of the tower's normalisation

# hue in degrees, saturation, value; each range holds the CSS colour of its name (green holds lime too)
_HSV_RANGES = {
    "red": ((-10, 8), (0.75, 1.0), (0.65, 1.0)),
    "green": ((95, 150), (0.5, 1.0), (0.4, 1.0)),
    "blue": ((205, 245), (0.6, 1.0), (0.5, 1.0)),
    "yellow": ((50, 64), (0.65, 1.0), (0.85, 1.0)),
    "orange": ((22, 40), (0.8, 1.0), (0.85, 1.0)),
    "purple": ((268, 302), (0.45, 1.0), (0.45, 0.95)),
    "black": ((0, 360), (0.0, 1.0), (0.0, 0.14)),
}
_SMALL_RADIUS = (0.095, 0.135)
_LARGE_RADIUS = {1: (0.175, 0.36), 2: (0.175, 0.31), 3: (0.175, 0.25), 4: (0.175, 0.225)}
_MIN_COLOUR_DISTANCE = 95.0  # RGB, 0..255: an object never melts into its background
_REGION_MARGIN = 0.015  # no centre lies nearer than this to a border between two regions

Box = tuple[float, float, float, float]
Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class SceneObject:
    """One flat shape. Centre and radius are fractions of the picture's side; the angle is in radians."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    proportion: float  # how fat a star or cross is, how high a triangle: -1..1
    rgb: Rgb

    @property
    def name(self) -> str:
        """Colour and shape: "red circle"."""
        return f"{self.colour} {self.shape}"

    @property
    def region(self) -> str:
        """Which of the nine parts of the picture holds the centre."""
        return REGIONS[3 * min(int(self.y * 3), 2) + min(int(self.x * 3), 2)]

    @property
    def box(self) -> Box:
        """x1, y1, x2, y2 around the outline, in 0..1, y downwards."""
        points = outline(self)
        xs, ys = [x for x, _ in points], [y for _, y in points]
        return (max(min(xs), 0.0), max(min(ys), 0.0), min(max(xs), 1.0), min(max(ys), 1.0))


@dataclass(frozen=True)
class Background:
    """Base colour, a second one it fades into (equal when flat), the direction, noise sigma, and grey padding bars."""

    rgb: Rgb
    rgb_end: Rgb
    direction: float
    noise: float
    bars: float = 0.0  # width of each of two bars, a fraction of the side; 0 when the picture is not padded
    bars_vertical: bool = False
    smooth_edges: bool = True


@dataclass(frozen=True)
class Scene:
    """Objects in order of their top edge (the order in which a picture's patches meet them), and what lies behind."""

    objects: tuple[SceneObject, ...]
    background: Background


def draw_scene(rng: random.Random, *, num_objects: int | None = None) -> Scene:
    """A random scene; num_objects fixes how many shapes it has (1 to 4, else every number equally often).

    No two objects share both colour and shape, so a name means one object; colours and shapes repeat on purpose, so
    that whose colour it is has to be looked up.
    """
    count = num_objects or rng.randint(1, MAX_OBJECTS)
    objects = _place_objects(rng, count)
    objects.sort(key=lambda item: item.box[1])
    return Scene(tuple(objects), _draw_background(rng, objects))


def outline(item: SceneObject) -> list[tuple[float, float]]:
    """The corners of an object's polygon in 0..1 (a circle has 32)."""
    r, p = item.radius, item.proportion
    if item.shape == "circle":
        corners = [(r * math.cos(k * math.pi / 16), r * math.sin(k * math.pi / 16)) for k in range(32)]
    elif item.shape == "square":
        h = r * (0.86 + 0.04 * p)
        corners = [(-h, -h), (h, -h), (h, h), (-h, h)]
    elif item.shape == "triangle":
        h = r * (0.9 + 0.1 * p)
        corners = [(0, -h), (r * 0.95, h * 0.8), (-r * 0.95, h * 0.8)]
    elif item.shape == "star":
        inner = r * (0.43 + 0.06 * p)
        corners = [
            (radius * math.sin(k * math.pi / 5), -radius * math.cos(k * math.pi / 5))
            for k, radius in enumerate((r * 1.05, inner) * 5)
        ]
    else:
        w, h = r * (0.32 + 0.06 * p), r * 0.98
        corners = [(-w, -h), (w, -h), (w, -w), (h, -w), (h, w), (w, w), (w, h), (-w, h), (-w, w), (-h, w), (-h, -w),
                   (-w, -w)]  # fmt: skip
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    return [(item.x + cos * x - sin * y, item.y + sin * x + cos * y) for x, y in corners]


def draw_masks(scene: Scene, *, side: int) -> Image.Image:
    """A palette picture of side x side whose pixel is the object's number plus one, 0 where there is none."""
    mask = Image.new("P", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    for number, item in enumerate(scene.objects, start=1):
        # PIL's polygon covers the pixels whose coordinates it names: half a pixel to the centre of each
        draw.polygon([(x * side - 0.5, y * side - 0.5) for x, y in outline(item)], fill=number)
    return mask


def render(scene: Scene, *, noise_seed: int, side: int = PICTURE_SIDE) -> NDArray[np.uint8]:
    """Paint a scene: (side, side, 3) uint8 RGB; edges smoothed by drawing three times larger unless it says no."""
    factor = SUPERSAMPLING if scene.background.smooth_edges else 1
    return render_masks(scene, draw_masks(scene, side=side * factor), noise_seed=noise_seed, side=side)


def render_masks(scene: Scene, mask: Image.Image, *, noise_seed: int, side: int) -> NDArray[np.uint8]:
    """`render` for a mask drawn before (draw_masks); its side is a whole multiple of the picture's."""
    factor = mask.width // side
    palette = [0, 0, 0]
    for item in scene.objects:
        palette.extend(item.rgb)
    covered = mask.point([0] + [255] * 255, "L")
    mask.putpalette(palette)
    painted = mask.convert("RGB")
    if factor > 1:
        covered, painted = covered.reduce(factor), painted.reduce(factor)
    cover = np.asarray(covered, dtype=np.float32)[:, :, None] / 255.0
    pixels = np.asarray(painted, dtype=np.float32) + (1.0 - cover) * _paint_background(scene.background, side)
    if scene.background.noise > 0:
        noise = np.random.default_rng(noise_seed).standard_normal(pixels.shape, dtype=np.float32)
        pixels += scene.background.noise * noise
    _paint_bars(pixels, scene.background)
    return (pixels + 0.5).clip(0, 255).astype(np.uint8)


def _place_objects(rng: random.Random, count: int) -> list[SceneObject]:
    while True:  # a crowded draw is thrown away whole
        objects: list[SceneObject] = []
        for _ in range(3 * count):
            item = _draw_object(rng, objects, count)
            if item is not None:
                objects.append(item)
                if len(objects) == count:
                    return objects


def _draw_object(rng: random.Random, others: list[SceneObject], count: int) -> SceneObject | None:
    """An object beside the others; None where its name is taken or thirty places were not free."""
    shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
    if others and rng.random() < 0.3:
        shape = rng.choice(others).shape
    elif others and rng.random() < 0.3:
        colour = rng.choice(others).colour
    if any(other.shape == shape and other.colour == colour for other in others):
        return None
    size = rng.choice(SIZES)
    radius = rng.uniform(*(_SMALL_RADIUS if size == "small" else _LARGE_RADIUS[count]))
    angle = math.radians(rng.uniform(-7, 7)) if rng.random() < 0.4 else 0.0
    proportion, rgb = rng.uniform(-1, 1), _draw_colour(rng, colour)
    room = radius * 1.06 + 0.01
    for _ in range(30):
        x, y = rng.uniform(room, 1 - room), rng.uniform(room, 1 - room)
        if any(abs(place - border) < _REGION_MARGIN for place in (x, y) for border in (1 / 3, 2 / 3)):
            continue
        if all(math.hypot(x - other.x, y - other.y) > 1.05 * (radius + other.radius) + 0.02 for other in others):
            return SceneObject(shape, colour, size, x, y, radius, angle, proportion, rgb)
    return None


def _draw_colour(rng: random.Random, colour: str) -> Rgb:
    hue, saturation, value = _HSV_RANGES[colour]
    if rng.random() < 0.2 and colour != "black":  # pure and vivid, as a drawing program's palette has it
        saturation, value = (0.97, 1.0), (0.97, 1.0) if colour not in ("green", "purple") else (value[0], 1.0)
    r, g, b = colorsys.hsv_to_rgb((rng.uniform(*hue) % 360) / 360, rng.uniform(*saturation), rng.uniform(*value))
    return round(r * 255), round(g * 255), round(b * 255)


def _draw_background(rng: random.Random, objects: list[SceneObject]) -> Background:
    while True:
        start = _draw_background_colour(rng)
        end = start
        if rng.random() < 0.45:
            end = _near_colour(rng, start, 70)
        middle = _mix(start, end)
        if all(math.dist(item.rgb, rgb) > _MIN_COLOUR_DISTANCE for item in objects for rgb in (start, middle, end)):
            break
    noise = rng.uniform(2, 14) if rng.random() < 0.4 else 0.0
    bars, vertical = 0.0, rng.random() < 0.5
    if rng.random() < 0.12:
        axis = 0 if vertical else 1
        free = min(min(item.box[axis], 1 - item.box[axis + 2]) for item in objects) - 0.01
        if free > 0.04 and all(math.dist(item.rgb, (PADDING_GREY,) * 3) > _MIN_COLOUR_DISTANCE for item in objects):
            bars = rng.uniform(0.03, free)
    return Background(start, end, rng.uniform(0, 2 * math.pi), noise, bars, vertical, rng.random() > 0.15)


def _draw_background_colour(rng: random.Random) -> Rgb:
    kind = rng.random()
    if kind < 0.1:
        return 255, 255, 255
    if kind < 0.25:
        level = rng.randint(225, 255)
        return _near_colour(rng, (level, level, level), 6)
    if kind < 0.35:
        level = 0 if rng.random() < 0.4 else rng.randint(0, 60)
        return _near_colour(rng, (level, level, level), 6) if level else (0, 0, 0)
    if kind < 0.5:
        level = rng.randint(0, 255)
        return level, level, level
    if kind < 0.62:
        r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.25), rng.uniform(0.85, 1.0))
        return round(r * 255), round(g * 255), round(b * 255)
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def _near_colour(rng: random.Random, rgb: Rgb, spread: int) -> Rgb:
    r, g, b = (min(max(level + rng.randint(-spread, spread), 0), 255) for level in rgb)
    return r, g, b


def _mix(first: Rgb, second: Rgb) -> Rgb:
    r, g, b = ((one + other) // 2 for one, other in zip(first, second, strict=True))
    return r, g, b


def _paint_background(background: Background, side: int) -> NDArray[np.float32]:
    """(1, 1, 3) when flat, else (side, side, 3): a straight fade between the two colours."""
    start = np.array(background.rgb, dtype=np.float32)
    if background.rgb == background.rgb_end:
        return start[None, None, :]
    place = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    across = math.cos(background.direction) * place[None, :] + math.sin(background.direction) * place[:, None]
    fade = (across / 1.4142 + 0.5).astype(np.float32)[:, :, None]  # 0..1 whatever the direction
    return start * (1 - fade) + np.array(background.rgb_end, dtype=np.float32) * fade


def _paint_bars(pixels: NDArray[np.float32], background: Background) -> None:
    width = round(background.bars * pixels.shape[0])
    if width > 0:
        lines = pixels.transpose(1, 0, 2) if background.bars_vertical else pixels
        lines[:width] = PADDING_GREY
        lines[-width:] = PADDING_GREY
