"""Pictures that a chat is shown, by path, web address or clipboard; and the boxes of its answers, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image

from llava.errors import UsageError
from llava.prompt.boxes import BoxFormat, draw_answer
from llava.prompt.conversation import Image, ImageSource, Message
from llava.prompt.fetch import Fetcher
from llava.prompt.images import decode_image

if TYPE_CHECKING:
    from llava.inference.talk import Model

_FETCHER = Fetcher()


def find_picture(
    name: str, *, allow_urls: bool, folder: Path | None = None, way_out: str = "--allow-urls"
) -> ImageSource:
    """What a path (from `folder`) or web address names. Raises UsageError for an address that was not allowed,
    saying `way_out`, and DataError for one that cannot be fetched.
    """
    if name.lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise UsageError(f"picture {name!r} is a web address; allow it with {way_out}, or download it first")
        return _FETCHER.fetch(name)
    path = Path(name.removeprefix("file://")).expanduser()
    return path if folder is None else folder / path


def grab_clipboard() -> list[Image]:
    """What was copied: one picture, or picture files. Raises UsageError when that is nothing, or cannot be asked."""
    from PIL import ImageGrab

    try:
        copied = ImageGrab.grabclipboard()
    except NotImplementedError:
        raise UsageError(
            "the clipboard needs wl-paste (package wl-clipboard) or xclip; install one of them, or name a file"
        ) from None
    except OSError as error:
        raise UsageError(f"the clipboard cannot be read ({' '.join(str(error).split())}); name a file") from None
    if copied is None or copied == []:
        raise UsageError("no picture on the clipboard; copy one first, or name a file")
    if isinstance(copied, list):
        return [Image(Path(name)) for name in copied]
    return [Image(copied)]


def save_boxes(model: Model, messages: Sequence[Message], path: Path) -> str:
    """Draw the boxes of the last answer on the last picture shown before it; says what was drawn.

    Raises UsageError when there is no picture, no box, or no way to write the file.
    """
    images = [image for message in messages for image in message.images]
    answers = [message for message in messages if message.role == "assistant"]
    if not images or not answers:
        raise UsageError("boxes are drawn on a picture that was asked about; show one and ask where something is")
    settings = model.processor.image_settings
    picture = decode_image(images[-1].source, settings.limits, background=settings.background)
    form = BoxFormat.of(model.model.config.extra)
    drawn, count = draw_answer(picture, answers[-1].text, settings=settings, form=form)
    write_picture(drawn, path)
    return f"{count} box{'es' if count > 1 else ''} drawn: {path}"


def write_picture(picture: PIL.Image.Image, path: Path) -> None:
    """Save a picture in the format that its name ends with. Raises UsageError when that is none, or cannot be."""
    try:
        picture.save(path)
    except ValueError:
        raise UsageError(f"{path}: not a picture's name; end it with .png or .jpg") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; name another file") from None
