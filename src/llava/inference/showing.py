"""A picture with what was asked and answered written below it, and the answer's boxes drawn on it."""

from __future__ import annotations

from functools import cache

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from llava.prompt.boxes import BoxFormat, draw_boxes, find_boxes, to_pixels
from llava.prompt.images import ImageSettings

# Sides of the drawn picture in pixels: small ones grow so that words below and boxes on them can be read.
_LEAST, _MOST = 512, 1280
_TEXT, _ASKED, _WRONG = "#111111", "#5a5a5a", "#b00020"
# Pillow's own font has Latin letters only; these are tried for anything else, in this order.
_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "msyh.ttc")

_Font = PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont


def show(
    picture: PIL.Image.Image | None,
    *,
    question: str,
    answer: str,
    error: str | None = None,
    settings: ImageSettings,
    form: BoxFormat,
) -> PIL.Image.Image:
    """The picture (None where it cannot be read), below it the question in grey and the answer, or the error in red."""
    above = (
        PIL.Image.new("RGB", (_LEAST, 40), "#dddddd")
        if picture is None
        else _with_boxes(picture, answer, settings, form)
    )
    width = above.width
    size = max(16, width // 40)
    margin = size
    said = [(question, _ASKED), (error, _WRONG) if error else (answer, _TEXT)]
    lines = [
        (line, colour, font)
        for text, colour in said
        for font in [_font(text or "", size)]
        for line in wrap(text or "", font, width - 2 * margin)
    ]
    height = round(1.35 * size)
    canvas = PIL.Image.new("RGB", (width, above.height + height * len(lines) + 2 * margin), "white")
    canvas.paste(above, (0, 0))
    draw = PIL.ImageDraw.Draw(canvas)
    for number, (line, colour, font) in enumerate(lines):
        draw.text((margin, above.height + margin + number * height), line, fill=colour, font=font)
    return canvas


def wrap(text: str, font: _Font, width: float) -> list[str]:
    """Lines no wider than `width` pixels, broken at blanks where there are some and within words where not."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            line = word
            while font.getlength(line) > width and len(line) > 1:
                cut = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
                lines.append(line[:cut])
                line = line[cut:]
        lines.append(line)
    return lines


def _with_boxes(picture: PIL.Image.Image, answer: str, settings: ImageSettings, form: BoxFormat) -> PIL.Image.Image:
    longest = max(picture.size)
    factor = max(_LEAST / picture.width if picture.width < _LEAST else 1.0, 1.0)
    factor = min(factor, _MOST / longest)
    scaled = picture.resize(
        (max(1, round(picture.width * factor)), max(1, round(picture.height * factor))), PIL.Image.Resampling.BICUBIC
    )
    if scaled.width < _LEAST:  # a tall one: room for words beside it
        wide = PIL.Image.new("RGB", (_LEAST, scaled.height), "#eeeeee")
        wide.paste(scaled, ((_LEAST - scaled.width) // 2, 0))
        left = (_LEAST - scaled.width) // 2
    else:
        wide, left = scaled, 0
    size = (picture.height, picture.width)
    boxes = [
        to_pixels(box.shares, size=size, settings=settings, frame=form.frame)
        for box in find_boxes(answer, scale=form.scale)
    ]
    across, down = scaled.width / picture.width, scaled.height / picture.height
    placed = [(left + x1 * across, y1 * down, left + x2 * across, y2 * down) for x1, y1, x2, y2 in boxes]
    labels = [str(number) for number in range(1, len(placed) + 1)] if len(placed) > 1 else []
    return draw_boxes(wide, placed, labels)


def _font(text: str, size: int) -> _Font:
    return _latin(size) if all(ord(letter) < 0x250 for letter in text) else _wide(size)


@cache
def _latin(size: int) -> _Font:
    return PIL.ImageFont.load_default(size=size)


@cache
def _wide(size: int) -> _Font:
    for name in _FONTS:
        try:
            return PIL.ImageFont.truetype(name, size=size)
        except OSError:
            continue
    return _latin(size)
