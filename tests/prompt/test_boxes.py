from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest

from llava.errors import CheckpointError, UsageError
from llava.prompt.boxes import BoxFormat, draw_answer, draw_boxes, find_boxes, to_pixels
from llava.prompt.images import ImageSettings, preprocess

WHOLE = (0.0, 0.0, 1.0, 1.0)


def settings(mode: str, size: int = 64, **changes: Any) -> ImageSettings:
    return ImageSettings(mode=mode, size=size, mean=(0.5,) * 3, std=(0.5,) * 3, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "scale", "shares"),
    [
        ("at [0.1, 0.2, 0.3, 0.4].", 1, (0.1, 0.2, 0.3, 0.4)),
        ("[[.5,.25,1,0.75]]", 1, (0.5, 0.25, 1.0, 0.75)),
        ("(0.1, 0.2, 0.3, 0.4)", 1, (0.1, 0.2, 0.3, 0.4)),
        ("<box>(100,200),(300,400)</box>", 1000, (0.1, 0.2, 0.3, 0.4)),
        ("{<10><20><30><40>}", 100, (0.1, 0.2, 0.3, 0.4)),
        ("[0.3, 0.4, 0.1, 0.2]", 1, (0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_every_way_of_writing_a_box_is_read(text: str, scale: float, shares: tuple[float, ...]) -> None:
    (found,) = find_boxes(text, scale=scale)
    assert found.shares == pytest.approx(shares)
    assert text[found.start : found.end][0] in "[({"


@pytest.mark.parametrize(
    "text", ["", "[1, 2, 3]", "[0.1, 0.2, 0.3, 1.4]", "0.1 0.2 0.3 0.4", "[a, b, c, d]", "[-1,0,1,1]"]
)
def test_what_is_no_box_is_left(text: str) -> None:
    assert find_boxes(text) == []


def test_boxes_come_in_reading_order_whatever_their_shape() -> None:
    found = find_boxes("(0.5,0.5),(0.6,0.6) then [0, 0, 1, 1] then (0.1, 0.1, 0.2, 0.2)")
    assert [box.shares[0] for box in found] == [0.5, 0.0, 0.1]


@pytest.mark.parametrize(
    ("mode", "size", "pixels"),
    [
        ("pad", (100, 200), (0.0, 0.0, 200.0, 100.0)),
        ("crop", (100, 200), (50.0, 0.0, 150.0, 100.0)),
        ("crop", (200, 100), (0.0, 50.0, 100.0, 150.0)),
        ("squash", (100, 200), (0.0, 0.0, 200.0, 100.0)),
        ("pad", (100, 100), (0.0, 0.0, 100.0, 100.0)),
    ],
)
def test_the_whole_of_what_was_seen_is_this_part_of_the_picture(
    mode: str, size: tuple[int, int], pixels: tuple[float, ...]
) -> None:
    assert to_pixels(WHOLE, size=size, settings=settings(mode)) == pytest.approx(pixels)


def test_a_box_in_the_padded_square_is_moved_back_by_the_padding() -> None:
    # 200 wide, 100 high: the square is 200, with 50 above and below.
    half = (0.25, 0.5, 0.75, 1.0)
    assert to_pixels(half, size=(100, 200), settings=settings("pad")) == pytest.approx((50.0, 50.0, 150.0, 100.0))
    of_picture = to_pixels(half, size=(100, 200), settings=settings("pad"), frame="picture")
    assert of_picture == pytest.approx((50.0, 50.0, 150.0, 100.0))
    quarter = (0.25, 0.25, 0.5, 0.5)
    assert to_pixels(quarter, size=(100, 200), settings=settings("pad")) == pytest.approx((50.0, 0.0, 100.0, 50.0))
    assert to_pixels(quarter, size=(100, 200), settings=settings("pad"), frame="picture")[1] == pytest.approx(25.0)


@pytest.mark.parametrize("size", [(90, 160), (160, 90), (64, 64), (131, 77), (50, 333)])
@pytest.mark.parametrize("mode", ["pad", "crop", "squash"])
@pytest.mark.parametrize("edge", [None, 80])
def test_a_mark_is_found_again_where_the_model_sees_it(mode: str, size: tuple[int, int], edge: int | None) -> None:
    """A white square on black goes through the real preprocessing; its corners there come back to where it was."""
    if mode == "squash" and edge:
        pytest.skip("a squashed picture has no shortest edge")
    height, width = size
    x1, y1 = width // 2 - 8, height // 2 - 12
    x2, y2 = x1 + 16, y1 + 20
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[y1:y2, x1:x2] = 255
    how = settings(mode, size=64, shortest_edge=edge) if edge else settings(mode, size=64)
    seen = preprocess(PIL.Image.fromarray(picture), how)[0, 0] > 0.5  # (64, 64); the padding is grey
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    shares = (columns[0] / 64, rows[0] / 64, (columns[-1] + 1) / 64, (rows[-1] + 1) / 64)
    back = to_pixels(shares, size=size, settings=how)
    pixel = max(size) / 64 if mode != "crop" else min(size) / 64
    if mode == "squash":
        pixel = max(width, height) / 64
    assert back == pytest.approx((x1, y1, x2, y2), abs=max(1.0, pixel))


def test_the_config_says_how_boxes_are_written() -> None:
    assert BoxFormat.of({}) == BoxFormat(1.0, "seen")
    assert BoxFormat.of({"boxes": {"scale": 100, "frame": "picture"}}) == BoxFormat(100.0, "picture")
    for wrong in ({"scale": 0}, {"scale": "1"}, {"frame": "tile"}, {"size": 1}, 7):
        with pytest.raises(CheckpointError, match=r"llava\.boxes"):
            BoxFormat.of({"boxes": wrong})


def test_the_drawn_lines_lie_on_the_boxs_edge_and_nowhere_else() -> None:
    image = PIL.Image.new("RGB", (60, 40), "black")
    drawn = np.asarray(draw_boxes(image, [(10.0, 5.0, 30.0, 25.0)]))
    lit = drawn.any(axis=2)
    assert lit[5, 10:30].all() and lit[24, 10:30].all() and lit[5:25, 10].all() and lit[5:25, 29].all()
    assert lit.sum() == 2 * 20 + 2 * 18
    assert not np.asarray(image).any()


def test_an_answers_boxes_are_drawn_on_the_original_picture() -> None:
    image = PIL.Image.new("RGB", (200, 100), "black")
    drawn, count = draw_answer(image, "[0.25, 0.25, 0.5, 0.5]", settings=settings("pad"), form=BoxFormat())
    lit = np.asarray(drawn).any(axis=2)
    assert count == 1
    assert lit[0:50, 50].all() and not lit[51:, :].any()


def test_an_answer_without_a_box_says_what_was_looked_for() -> None:
    image = PIL.Image.new("RGB", (20, 20))
    with pytest.raises(UsageError, match="no box with corners from 0 to 1;"):
        draw_answer(image, "at [10, 20, 30, 40]", settings=settings("pad"), form=BoxFormat())
