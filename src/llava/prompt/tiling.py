"""Anyres arithmetic: which canvas a picture is cut from, how many tokens come of it, what of the grid is padding.

Plain Python numbers, no arrays: `prompt.processor` counts placeholders with it and `model.merge` joins features with
it, so the two cannot disagree. Sizes are (height, width), a grid is (rows, cols).

The choice of the canvas repeats the floating-point expressions of the original and of transformers, rounding errors
included, because both decide ties with them. The unpad box is the exact integer floor, as transformers' `round(.., 7)`
gives it; the original's float floor is one row off for about one size in 4,500 (docs/differences.md).
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from typing import Literal, TypeAlias

from llava.errors import PromptError

Size: TypeAlias = tuple[int, int]
MergeType: TypeAlias = Literal["flat", "spatial", "spatial_unpad"]

_RANGE = re.compile(r"\((\d+)\s*x\s*(\d+)\)")


def parse_pinpoints(
    value: str | Sequence[Sequence[int]], *, tile_size: int, order: Literal["hw", "wh"] = "wh"
) -> tuple[Size, ...]:
    """Candidate canvases as (height, width) pairs.

    value: a list of pairs, its string literal, or LLaVA-NeXT's range "(1x1),...,(6x6)", which counts tiles.
    order: "wh" as in the original's config, "hw" as in transformers'.

    >>> parse_pinpoints("(1x1),...,(2x2)", tile_size=336)
    ((336, 336), (672, 336), (336, 672), (672, 672))
    """
    if isinstance(value, str):
        ends = _RANGE.findall(value)
        if ends:
            (first_w, first_h), (last_w, last_h) = [tuple(map(int, end)) for end in (ends[0], ends[-1])]
            value = [
                (cols * tile_size, rows * tile_size)
                for cols in range(first_w, last_w + 1)
                for rows in range(first_h, last_h + 1)
            ]
        else:
            value = _literal(value)
    points: list[Size] = []
    for pair in value:
        if len(pair) != 2 or any(not isinstance(side, int) or side <= 0 for side in pair):
            raise PromptError(f"image_grid_pinpoints: {pair!r} is not a pair of positive numbers")
        first, second = pair
        points.append((first, second) if order == "hw" else (second, first))
    if not points:
        raise PromptError("image_grid_pinpoints: empty; give at least one pair")
    return tuple(points)


def _literal(text: str) -> Sequence[Sequence[int]]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, (list, tuple)):
        raise PromptError(f"image_grid_pinpoints {text!r}: neither a list of pairs nor a range of tiles")
    return value


def choose_canvas(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The candidate that keeps most of the picture's pixels, and among those the one that wastes least.

    >>> choose_canvas((480, 640), [(672, 336), (336, 672), (672, 672)])
    (672, 672)
    """
    height, width = size
    best: Size | None = None
    most, least_waste = 0, 0
    for canvas_height, canvas_width in pinpoints:
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = canvas_width * canvas_height - effective
        if best is None or effective > most or (effective == most and waste < least_waste):
            best, most, least_waste = (canvas_height, canvas_width), effective, waste
    if best is None:
        raise PromptError("image_grid_pinpoints: empty; an anyres model needs at least one [height, width]")
    return best


def choose_grid(size: Size, pinpoints: Sequence[Size], tile_size: int) -> Size:
    """(rows, cols) of the tiles that the picture is cut into, the whole-picture tile not counted."""
    height, width = choose_canvas(size, pinpoints)
    return height // tile_size, width // tile_size


def fit_inside(size: Size, canvas: Size) -> Size:
    """The size that keeps the picture's ratio and touches the canvas; the free side is rounded up, then clipped."""
    height, width = size
    scale_width, scale_height = canvas[1] / width, canvas[0] / height
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * scale_height), canvas[1])


def unpad_box(size: Size, grid: Size) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the part of a patch grid that shows the picture and not its padding.

    size: the original picture's; grid: (rows, cols) of patches. A picture so thin that it covers no patch gives an
    empty box, in the original and in transformers too: its whole-picture tile and the newlines are all that is left.
    """
    height, width = size
    rows, cols = grid
    if width * rows > cols * height:
        margin = (rows - height * cols // width) // 2
        return margin, rows - margin, 0, cols
    margin = (cols - width * rows // height) // 2
    return 0, rows, margin, cols - margin


def shrink_grid(grid: Size, *, max_tiles: int | None, patches_per_side: int) -> Size:
    """The grid after `anyres_max_N`: interpolated down when it holds over 1.1 times (in side) N tiles' patches."""
    if max_tiles is None:
        return grid
    rows, cols = grid
    ratio: float = (rows * cols / (max_tiles * patches_per_side**2)) ** 0.5
    return grid if ratio <= 1.1 else (int(rows // ratio), int(cols // ratio))


def count_image_tokens(
    size: Size,
    *,
    num_tiles: int,
    grid: Size | None,
    patches_per_side: int,
    tokens_per_tile: int,
    merge: MergeType,
    max_tiles: int | None = None,
) -> int:
    """Feature rows that the model makes of one picture, newlines included.

    size: the original picture's (height, width). num_tiles: tiles fed to the tower. grid: (rows, cols) of the tiles
    behind the whole-picture one, None without. tokens_per_tile: patches_per_side ** 2, one more with a class token.
    """
    if grid is None or num_tiles == 1:
        return num_tiles * tokens_per_tile + (1 if merge == "spatial_unpad" else 0)
    if merge != "spatial_unpad":
        return num_tiles * tokens_per_tile
    top, bottom, left, right = unpad_box(size, (grid[0] * patches_per_side, grid[1] * patches_per_side))
    rows, cols = shrink_grid((bottom - top, right - left), max_tiles=max_tiles, patches_per_side=patches_per_side)
    return tokens_per_tile + rows * (cols + 1)
