"""Joining the features of a picture's tiles into the rows that stand in the token sequence.

Tile 0 is the whole picture; the others are a grid cut from the resized picture, row by row. The arithmetic of grids
and padding is llava.prompt.tiling's, so that the rows made here are as many as the placeholders counted there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava.errors import PromptError
from llava.model.config import LlavaConfig
from llava.prompt.tiling import choose_grid, shrink_grid, unpad_box


def merge_tiles(tiles: Tensor, image_size: tuple[int, int], config: LlavaConfig, *, newline: Tensor | None) -> Tensor:
    """The rows of one picture.

    tiles: (N, P, D), the whole picture first; image_size: its original (height, width) in pixels; newline: (D,) for
    merge type "spatial_unpad". Returns (F, D). Raises PromptError when N is not what the size gives.
    """
    if tiles.shape[0] == 1:
        lone = tiles[0]
        return lone if newline is None else torch.cat([lone, newline[None].to(lone)])
    base, rest = tiles[0], tiles[1:]
    side = config.patches_per_side
    rows, cols = choose_grid(image_size, config.image_grid_pinpoints, config.image_size)
    if rest.shape[0] != rows * cols:
        raise PromptError(
            f"a picture of {image_size[0]} x {image_size[1]} (height x width) is cut in {rows} x {cols} tiles, "
            f"but {rest.shape[0]} were passed; tokens and pictures must come from the same processor"
        )
    if rest.shape[1] != side * side:
        raise PromptError(f"tiles of {rest.shape[1]} features cannot be joined to a {side} x {side} grid each")
    grid = rest.view(rows, cols, side, side, -1).permute(0, 2, 1, 3, 4)  # (rows, side, cols, side, D)
    grid = grid.reshape(rows * side, cols * side, -1)  # (gh, gw, D)
    if config.merge_type == "spatial":
        return torch.cat([base, grid.flatten(0, 1)])
    assert newline is not None
    top, bottom, left, right = unpad_box(image_size, (rows * side, cols * side))
    grid = grid[top:bottom, left:right]
    grid = _shrink(grid, config, side)
    ends = newline.to(grid).expand(grid.shape[0], 1, -1)
    return torch.cat([base, torch.cat([grid, ends], dim=1).flatten(0, 1)])


def _shrink(grid: Tensor, config: LlavaConfig, side: int) -> Tensor:
    """OneVision's anyres_max_N: interpolate a grid (gh, gw, D) of more than N tiles' patches down to about N tiles."""
    before = (grid.shape[0], grid.shape[1])
    after = shrink_grid(before, max_tiles=config.anyres_max, patches_per_side=side)
    if after == before:
        return grid
    moved = grid.permute(2, 0, 1)[None]  # (1, D, gh, gw)
    return functional.interpolate(moved, after, mode="bilinear")[0].permute(1, 2, 0)


def new_newline(width: int) -> nn.Parameter:
    """A fresh `image_newline` (D,): N(0, 1/width) from a fixed seed, HF's initialisation.

    Zeros would do too, but an embedding of another size than the words' costs the first steps.
    """
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(width, generator=generator) / width**0.5)
