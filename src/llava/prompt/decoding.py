"""THE one decode function: any picture to upright RGB, the same in training, chat, server and evaluation.

Orientation applied, alpha laid on the model's mean colour, 16 bit scaled (not clipped), CMYK and palettes converted,
the first frame of an animation. Limits are checked from the header, before a pixel is decoded.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from llava.errors import ImageError, ImageTooLargeError
from llava.prompt.conversation import ImageSource
from llava.prompt.tiling import Size

Colour: TypeAlias = tuple[int, int, int]

_ORIENTATION = 0x0112  # the EXIF tag; values 5 to 8 swap width and height
# What each allowed format begins with. Nothing else is opened: PIL's rarer readers run programs or unpack bombs.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
)
# What PIL's readers raise on damaged files; its texts are not passed on (they hold addresses of objects).
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
    PIL.Image.DecompressionBombWarning,
)


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may be at most; checked before it is decoded."""

    max_bytes: int = 20 * 1024 * 1024
    max_side: int = 8192
    max_pixels: int = 40_000_000
    max_aspect: int = 200


def decode_image(
    source: ImageSource,
    limits: ImageLimits | None = None,
    *,
    background: Colour = (122, 116, 104),
    name: str | None = None,
) -> PIL.Image.Image:
    """An upright RGB picture from a path, encoded bytes, a PIL picture or an array.

    Arrays are (height, width), (height, width, 1), (height, width, 3) or (height, width, 4): uint8, uint16, or floats
    in 0..1. Raises ImageError, led by `name` (the path unless given), for anything unreadable or beyond the limits.
    """
    limits = limits or ImageLimits()
    if isinstance(source, np.ndarray):
        return _from_array(source, limits, background, name or "array")
    if isinstance(source, PIL.Image.Image):
        what = name or "picture"
        check_size((source.height, source.width), limits, what)
        return _to_rgb(source, background, what)
    if isinstance(source, (bytes, bytearray, memoryview)):
        what, data = name or "picture", bytes(source)
        if len(data) > limits.max_bytes:
            raise ImageTooLargeError(
                f"{what}: {len(data)} bytes, over the limit of {limits.max_bytes}; make it smaller"
            )
    elif isinstance(source, (str, Path)):
        what = name or str(source)
        data = _read_file(Path(source), limits, what)
    else:
        raise ImageError(f"{name or 'picture'}: cannot read a {type(source).__name__}; give a path, bytes or a picture")
    return _from_bytes(data, limits, background, what)


def read_size(source: ImageSource, limits: ImageLimits | None = None, *, name: str | None = None) -> Size:
    """(height, width) of a picture as `decode_image` would give it, read from the header. Raises ImageError."""
    limits = limits or ImageLimits()
    if isinstance(source, (str, Path)):
        name = name or str(source)
        source = _read_file(Path(source), limits, name)
    what = name or "picture"
    if isinstance(source, (bytes, bytearray, memoryview)):
        image = _open(bytes(source), limits, what)
    elif isinstance(source, PIL.Image.Image):
        image = source
    else:
        decoded = decode_image(source, limits, name=name)
        return decoded.height, decoded.width
    check_size((image.height, image.width), limits, what)
    try:
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except _DAMAGED:
        raise ImageError(f"{what}: damaged picture; save it again or leave it out") from None
    return (image.width, image.height) if turned else (image.height, image.width)


def check_size(size: Size, limits: ImageLimits, name: str) -> None:
    """Raise ImageError when a (height, width) breaks the limits."""
    height, width = size
    shown = f"{name}: {width} x {height} pixels"
    if height < 1 or width < 1:
        raise ImageError(f"{shown}; an empty picture cannot be used")
    if max(height, width) > limits.max_side:
        raise ImageTooLargeError(f"{shown}; the longest side may be {limits.max_side}; make it smaller")
    if height * width > limits.max_pixels:
        raise ImageTooLargeError(f"{shown}; at most {limits.max_pixels} pixels are read; make it smaller")
    if max(height, width) > limits.max_aspect * min(height, width):
        raise ImageTooLargeError(f"{shown}; the sides' ratio may be {limits.max_aspect} to 1; cut it")


def _read_file(path: Path, limits: ImageLimits, name: str) -> bytes:
    try:
        size = path.stat().st_size
        if size > limits.max_bytes:
            raise ImageTooLargeError(f"{name}: {size} bytes, over the limit of {limits.max_bytes}; make it smaller")
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or "not a path"
        raise ImageError(f"{name}: cannot be read ({reason.lower()})") from None


def _from_bytes(data: bytes, limits: ImageLimits, background: Colour, name: str) -> PIL.Image.Image:
    image = _open(data, limits, name)
    check_size((image.height, image.width), limits, name)
    return _to_rgb(image, background, name)


def _open(data: bytes, limits: ImageLimits, name: str) -> PIL.Image.Image:
    """Read the header only."""
    kind = _sniff(data)
    if kind is None:
        what = "empty" if not data else "not a JPEG, PNG, WEBP, GIF or BMP picture"
        raise ImageError(f"{name}: {what}; convert it to PNG or JPEG")
    try:
        return PIL.Image.open(io.BytesIO(data), formats=[kind])
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise ImageTooLargeError(f"{name}: more than {limits.max_pixels} pixels; make it smaller") from None
    except _DAMAGED:
        raise ImageError(f"{name}: damaged {kind} picture; save it again or leave it out") from None


def _sniff(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((kind for magic, kind in _MAGIC if data.startswith(magic)), None)


def _to_rgb(image: PIL.Image.Image, background: Colour, name: str) -> PIL.Image.Image:
    try:
        image.load()
        if image.mode == "RGB" and "transparency" not in image.info and not image.getexif():
            return image
        image = PIL.ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            return _from_deep(image)
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            flat = PIL.Image.new("RGB", image.size, background)
            flat.paste(rgba, mask=rgba.getchannel("A"))
            return flat
        return image.convert("RGB")
    except _DAMAGED:
        raise ImageError(f"{name}: damaged picture; save it again or leave it out") from None


def _from_deep(image: PIL.Image.Image) -> PIL.Image.Image:
    """16-bit grey scaled to 8 bits (PIL's own conversion clips it to white)."""
    values = np.asarray(image).astype(np.float64)
    return _grey(np.round(np.clip(values, 0, 65535) / 257) if image.mode != "F" else np.clip(values, 0, 255))


def _grey(values: NDArray[Any]) -> PIL.Image.Image:
    return PIL.Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _from_array(array: NDArray[Any], limits: ImageLimits, background: Colour, name: str) -> PIL.Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(f"{name}: shape {array.shape}; an image is (height, width[, 1, 3 or 4])")
    check_size((array.shape[0], array.shape[1]), limits, name)
    if array.dtype == np.uint16:
        array = np.round(array / 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ImageError(f"{name}: a float array must hold values in 0..1")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ImageError(f"{name}: dtype {array.dtype}; use uint8, uint16 or floats in 0..1")
    squeezed = array[:, :, 0] if array.ndim == 3 and channels == 1 else array
    return _to_rgb(PIL.Image.fromarray(np.ascontiguousarray(squeezed)), background, name)
