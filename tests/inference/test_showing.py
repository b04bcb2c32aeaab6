from __future__ import annotations

import numpy as np
import PIL.Image
import PIL.ImageFont
import pytest

from llava.inference.showing import show, wrap
from llava.prompt.boxes import BoxFormat
from llava.prompt.images import ImageSettings

SETTINGS = ImageSettings(size=56, mode="pad", patches_per_side=4)
FONT = PIL.ImageFont.load_default(size=16)


def drawn(picture: PIL.Image.Image | None, answer: str, error: str | None = None) -> PIL.Image.Image:
    return show(picture, question="What?", answer=answer, error=error, settings=SETTINGS, form=BoxFormat())


@pytest.mark.parametrize("size", [(60, 40), (3000, 900), (200, 1500), (1, 1)])
def test_the_picture_stands_above_room_for_its_words(size: tuple[int, int]) -> None:
    short, long = (drawn(PIL.Image.new("RGB", size, "blue"), "word " * count) for count in (3, 300))
    assert 512 <= short.width == long.width <= 1280
    assert long.height > short.height
    assert (np.asarray(short) == (0, 0, 255)).all(axis=2).any()


def test_a_box_is_drawn_where_the_answer_says() -> None:
    picture = PIL.Image.new("RGB", (600, 600), "white")
    pixels = np.asarray(drawn(picture, "[0.25, 0.5, 0.75, 0.9]"))[:600]
    rows, columns = np.nonzero((pixels == (0xE6, 0x19, 0x4B)).all(axis=2))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (150, 300, 449, 539)


def test_a_picture_that_cannot_be_read_shows_why() -> None:
    assert (np.asarray(drawn(None, "", "broken")) != np.asarray(drawn(None, "", "b")))[:, :, 0].any()


@pytest.mark.parametrize("text", ["", "one two three " * 20, "x" * 400, "two\n\nparagraphs " * 9, "a " + "w" * 90])
def test_wrapped_lines_fit_and_lose_nothing(text: str) -> None:
    lines = wrap(text, FONT, 120)
    assert all(FONT.getlength(line) <= 120 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
