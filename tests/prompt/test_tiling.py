"""Anyres arithmetic against the original's recorded counts, against transformers' model code, and its invariants."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import PromptError
from llava.prompt.images import ImageSettings
from llava.prompt.tiling import (
    choose_canvas,
    choose_grid,
    count_image_tokens,
    fit_inside,
    parse_pinpoints,
    shrink_grid,
    unpad_box,
)
from tests.prompt.prompt_recordings import read

RECORDED = read("images.json")
REAL = parse_pinpoints(RECORDED["real_pinpoints"], tile_size=336)
TINY = parse_pinpoints(RECORDED["tiny_pinpoints"], tile_size=56)
sizes = st.tuples(st.integers(1, 2000), st.integers(1, 2000))


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: "x".join(map(str, case["size"])))
def test_canvas_grid_unpad_box_and_count_equal_the_originals(case: dict) -> None:
    width, height = case["size"]
    size = (height, width)
    assert choose_canvas(size, REAL) == tuple(reversed(case["real336_best"]))
    assert choose_canvas(size, TINY) == tuple(reversed(case["tiny56_best"]))
    rows, cols = choose_grid(size, REAL, 336)
    assert [cols, rows] == case["real336_grid_wh"]
    tiny_rows, tiny_cols = choose_grid(size, TINY, 56)
    assert [tiny_cols, tiny_rows] == case["tiny56_grid_wh"]
    for grid, name in (((rows * 24, cols * 24), "real"), ((tiny_rows * 4, tiny_cols * 4), "tiny")):
        top, bottom, left, right = unpad_box(size, grid)
        assert [bottom - top, right - left] == case[f"unpad_{name}_out"]
        if case[f"unpad_{name}_first"] is not None:
            assert top * grid[1] + left == case[f"unpad_{name}_first"]
            assert (bottom - 1) * grid[1] + right - 1 == case[f"unpad_{name}_last"]
    settings = ImageSettings(mode="anyres", size=336, pinpoints=REAL, merge="spatial_unpad")
    assert settings.count_tokens(size) == case["anyres_tokens_real_spatial_unpad"]


@settings(max_examples=150, deadline=None)
@given(size=sizes)
def test_canvas_and_unpad_box_equal_transformers(size: tuple[int, int]) -> None:
    import torch
    from transformers.models.llava_next.modeling_llava_next import select_best_resolution, unpad_image

    canvas = choose_canvas(size, REAL)
    assert canvas == tuple(select_best_resolution(list(size), [list(point) for point in REAL]))
    grid = (canvas[0] // 14, canvas[1] // 14)
    cells = torch.arange(grid[0] * grid[1]).view(1, *grid)
    top, bottom, left, right = unpad_box(size, grid)
    assert torch.equal(unpad_image(cells, list(size)), cells[:, top:bottom, left:right])


@settings(max_examples=150, deadline=None)
@given(size=sizes)
def test_a_fitted_picture_touches_its_canvas_and_stays_inside(size: tuple[int, int]) -> None:
    canvas = choose_canvas(size, REAL)
    height, width = fit_inside(size, canvas)
    assert (height == canvas[0] or width == canvas[1]) and 1 <= height <= canvas[0] and 1 <= width <= canvas[1]


@settings(max_examples=200, deadline=None)
@given(
    size=sizes, merge=st.sampled_from(["flat", "spatial", "spatial_unpad"]), max_tiles=st.sampled_from([None, 1, 2, 9])
)
def test_as_many_tokens_are_counted_as_features_are_made(
    size: tuple[int, int], merge: str, max_tiles: int | None
) -> None:
    # The features' side, written out naively: rows of a grid, cut, shrunk, a newline each.
    rows, cols = choose_grid(size, REAL, 336)
    side = 24
    num_tiles = 1 + rows * cols
    if merge != "spatial_unpad":
        made = num_tiles * side * side
    else:
        top, bottom, left, right = unpad_box(size, (rows * side, cols * side))
        high, wide = shrink_grid((bottom - top, right - left), max_tiles=max_tiles, patches_per_side=side)
        made = side * side + sum(wide + 1 for _ in range(high))
    counted = count_image_tokens(
        size,
        num_tiles=num_tiles,
        grid=(rows, cols),
        patches_per_side=side,
        tokens_per_tile=side * side,
        merge=merge,
        max_tiles=max_tiles,
    )
    assert counted == made


def test_a_lone_tile_gets_one_newline_only_where_newlines_are_used() -> None:
    for merge, expected in (("flat", 576), ("spatial", 576), ("spatial_unpad", 577)):
        settings = ImageSettings(mode="pad", merge=merge)
        assert settings.count_tokens((100, 300)) == expected


def test_pinpoints_are_read_as_lists_literals_and_ranges() -> None:
    assert parse_pinpoints([[336, 672]], tile_size=336) == ((672, 336),)
    assert parse_pinpoints([[336, 672]], tile_size=336, order="hw") == ((336, 672),)
    assert parse_pinpoints("[[336, 672], [672, 336]]", tile_size=336) == ((672, 336), (336, 672))
    assert len(parse_pinpoints("(1x1),...,(6x6)", tile_size=384)) == 36
    assert parse_pinpoints("(1x1),...,(2x2)", tile_size=10) == ((10, 10), (20, 10), (10, 20), (20, 20))
    for wrong in ("nonsense", "[1, 2", [], [[1, 2, 3]], [[0, 5]]):
        with pytest.raises(PromptError, match="image_grid_pinpoints"):
            parse_pinpoints(wrong, tile_size=336)
    with pytest.raises(PromptError, match="needs at least one"):
        choose_canvas((10, 10), ())
