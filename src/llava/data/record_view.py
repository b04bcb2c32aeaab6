"""One record, looked at closely: its pictures, its turns, and the prompt with what is learnt in colour.

As values (`look_at_record`), as a page that opens offline, and as a PNG to paste into a report.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from llava.data.check import lint, look_at
from llava.data.check_report import prompt_as_html, thumbnail_as_html, words_as_html
from llava.data.records import ConversationFile
from llava.data.token_text import Piece, join_pieces, token_pieces
from llava.errors import ImageError, LlavaError
from llava.prompt.conversation import Conversation, Image
from llava.prompt.images import ImageLimits, decode_image
from llava.prompt.processor import Encoded, Processor
from llava.prompt.tiling import Size

_WIDTH, _MARGIN, _LINE, _SIZE = 900, 20, 22, 15
_INK, _SOFT, _LEARNT_INK, _LEARNT, _PICTURE = "#1c2024", "#68727d", "#0d5c33", "#d3f0dd", "#dbe9ff"


@dataclass(frozen=True)
class PictureView:
    """A picture of a record. size: (height, width), None when it does not open, and then `problem` says why;
    tiles, tokens: what a model makes of it (0 without one)."""

    name: str
    size: Size | None
    num_bytes: int
    tiles: int
    tokens: int
    problem: str = ""


@dataclass(frozen=True)
class RecordView:
    """A record. encoded: None without a processor, or when it cannot be encoded; problems: what is wrong or odd."""

    origin: str
    conversation: Conversation
    pictures: tuple[PictureView, ...]
    encoded: Encoded | None
    pieces: tuple[Piece, ...]
    problems: tuple[str, ...]


def look_at_record(file: ConversationFile, index: int, processor: Processor | None) -> RecordView:
    """Read a record, open its pictures and encode it. Raises DataError when it does not parse."""
    conversation = file[index]
    pictures = tuple(_view(image, processor) for image in conversation.images)
    problems = [f"{kind}: {message}" for kind, message in lint(conversation)]
    problems += [f"picture {picture.name}: {picture.problem}" for picture in pictures if picture.problem]
    encoded = None
    if processor is not None and all(picture.size is not None for picture in pictures):
        try:
            encoded = processor.encode(conversation, pixels=False)
        except LlavaError as error:
            problems.append(str(error).removeprefix(f"{conversation.origin}: "))
    pieces = () if encoded is None or processor is None else tuple(token_pieces(encoded, processor))
    return RecordView(file.origin(index), conversation, pictures, encoded, pieces, tuple(problems))


def find_line(file: ConversationFile, line: int) -> int:
    """The record that begins at a line of a JSON file, or stands over it."""
    found = -1
    for index in range(len(file)):
        place = file.origin(index).removeprefix(f"{file.path}:").partition(" ")[0]
        if not place.isdigit() or int(place) > line:
            break
        found = index
    return found


def write_record_page(path: Path, view: RecordView) -> None:
    """The record as one HTML file that opens offline."""
    frame = resources.files("llava").joinpath("data", "check_page.html").read_text(encoding="utf-8")
    body = "\n".join(_body(view))
    path.write_text(
        frame.replace("{{title}}", html.escape(view.origin)).replace("{{body}}", body),
        encoding="utf-8",
        errors="replace",
    )


def draw_record(path: Path, view: RecordView) -> None:
    """The record as a PNG: its pictures in a row, and the prompt below them, what is learnt on green."""
    shown = [_opened(image) for image in view.conversation.images]
    thumbs = [picture for picture in shown if picture is not None]
    for picture in thumbs:
        picture.thumbnail(((_WIDTH - 2 * _MARGIN) // min(len(thumbs), 4) - 8, 320))
    top = _MARGIN + (max(picture.height for picture in thumbs) + _MARGIN if thumbs else 0)
    font = PIL.ImageFont.load_default(_SIZE)
    placed, height = _flow(_runs(view), font)
    canvas = PIL.Image.new("RGB", (_WIDTH, top + height + _MARGIN), "white")
    x = _MARGIN
    for picture in thumbs[:4]:
        canvas.paste(picture, (x, _MARGIN))
        x += picture.width + 8
    draw = PIL.ImageDraw.Draw(canvas)
    for x0, y, text, kind in placed:
        colour = {"learnt": _LEARNT_INK, "picture": _INK}.get(kind, _SOFT)
        if kind != "read":
            fill = _LEARNT if kind == "learnt" else _PICTURE
            draw.rectangle((x0, top + y, x0 + font.getlength(text), top + y + _LINE - 3), fill=fill)
        draw.text((x0, top + y), text, font=font, fill=colour)
    canvas.save(path, format="PNG")


def _view(image: Image, processor: Processor | None) -> PictureView:
    source = image.source
    name = str(source) if isinstance(source, Path) else "(in the record)"
    try:
        size = look_at(image)
        num_bytes = (
            source.stat().st_size if isinstance(source, Path) else len(source) if isinstance(source, bytes) else 0
        )
    except (ImageError, OSError) as error:
        return PictureView(name, None, 0, 0, 0, str(error).removeprefix(f"{name}: "))
    if processor is None:
        return PictureView(name, size, num_bytes, 0, 0)
    settings = processor.image_settings
    return PictureView(name, size, num_bytes, settings.count_tiles(size), settings.count_tokens(size))


def _body(view: RecordView) -> Iterator[str]:
    yield f"<h1>{html.escape(view.origin)}</h1>"
    for problem in view.problems:
        yield f'<p class="verdict bad">{html.escape(problem)}</p>'
    if view.encoded is not None:
        length, learnt = len(view.encoded.input_ids), view.encoded.num_answer_tokens
        yield f"<p class=soft>{length:,} tokens, {learnt:,} of them learnt ({learnt / max(length, 1):.0%})</p>"
    thumbs = [thumbnail_as_html(image) for image in view.conversation.images if _opened(image) is not None]
    yield f"<div class=thumbs>{''.join(thumbs)}</div>"
    words = prompt_as_html(view.pieces) if view.pieces else words_as_html(view.conversation)
    yield f'<div class=prompt style="max-height:none">{words}</div>'


def _opened(image: Image) -> PIL.Image.Image | None:
    try:
        return decode_image(image.source, ImageLimits(), background=(255, 255, 255))
    except ImageError:
        return None


def _runs(view: RecordView) -> Iterator[tuple[str, str]]:
    """(text, kind) in reading order."""
    if view.pieces:
        for piece in join_pieces(view.pieces):
            yield (f" picture, {piece.num_tokens:,} tokens " if piece.kind == "picture" else piece.text), piece.kind
        return
    for message in view.conversation.messages:
        yield f"{message.role}: ", "read"
        for part in message.parts:
            if isinstance(part, Image):
                yield " picture ", "picture"
            else:
                yield part.text, "learnt" if message.role == "assistant" and message.supervised else "read"
        yield "\n", "read"


def _flow(
    runs: Iterator[tuple[str, str]], font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont
) -> tuple[Sequence[tuple[float, int, str, str]], int]:
    """(x, y, text, kind) of runs broken into lines, and the height of all."""
    placed: list[tuple[float, int, str, str]] = []
    x, y = float(_MARGIN), 0
    for text, kind in runs:
        for number, line in enumerate(text.split("\n")):
            if number:
                x, y = float(_MARGIN), y + _LINE
            for word in _words(line) if kind != "picture" else [line]:
                wide = font.getlength(word)
                if x + wide > _WIDTH - _MARGIN and x > _MARGIN:
                    x, y = float(_MARGIN), y + _LINE
                placed.append((x, y, word, kind))
                x += wide
    return placed, y + _LINE


def _words(text: str) -> Iterator[str]:
    """Words with the blanks before them; none longer than a line."""
    start = 0
    for place in range(1, len(text) + 1):
        if place == len(text) or (text[place] == " " and text[place - 1] != " ") or place - start >= 60:
            yield text[start:place]
            start = place
