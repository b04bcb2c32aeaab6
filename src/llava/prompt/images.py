"""Pictures: THE one decode function, and the four ways from a picture to tiles.

`decode_image` is used by training, chat, server and evaluation alike: orientation applied, alpha laid on the model's
mean colour, 16 bit scaled (not clipped), CMYK and palettes converted, the first frame of an animation. Its limits are
checked from the header, before a pixel is decoded.

`preprocess` gives the pixels of the original LLaVA (CLIP's processor behind "pad", "crop", "squash" or "anyres"), bit
for bit. Arrays are NumPy; torch is not imported here.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from llava.errors import CheckpointError, ImageError
from llava.prompt.conversation import ImageSource
from llava.prompt.tiling import MergeType, Size, choose_canvas, choose_grid, count_image_tokens, fit_inside

ImageMode: TypeAlias = Literal["pad", "crop", "squash", "anyres"]
Colour: TypeAlias = tuple[int, int, int]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

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


@dataclass(frozen=True)
class ImageSettings:
    """How pictures become tiles of size x size pixels.

    mode: "pad" to a square of the mean colour, then resize; "crop": resize the shortest edge, cut the centre;
    "squash": resize, ratio lost; "anyres": the squashed picture, then tiles of a canvas chosen from `pinpoints`
    ((height, width) pairs). shortest_edge: of the resize before the crop (the tile's side unless given).
    resample: PIL's number (3 is bicubic). The last fields only count tokens.
    """

    mode: ImageMode = "pad"
    size: int = 336
    shortest_edge: int | None = None
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: int = 3
    rescale_factor: float = 1 / 255
    pinpoints: tuple[Size, ...] = ()
    patches_per_side: int = 24
    tokens_per_tile: int = 576
    merge: MergeType = "flat"
    max_tiles: int | None = None
    limits: ImageLimits = field(default_factory=ImageLimits)

    @property
    def background(self) -> Colour:
        """The mean colour in 0..255, under alpha and around padded pictures."""
        red, green, blue = (int(channel * 255) for channel in self.mean)
        return red, green, blue

    def count_tiles(self, size: Size) -> int:
        """Tiles of a picture of this (height, width)."""
        if self.mode != "anyres":
            return 1
        rows, cols = choose_grid(size, self.pinpoints, self.size)
        return 1 + rows * cols

    def count_tokens(self, size: Size) -> int:
        """Feature rows that the model makes of a picture of this (height, width)."""
        grid = choose_grid(size, self.pinpoints, self.size) if self.mode == "anyres" else None
        return count_image_tokens(
            size,
            num_tiles=1 if grid is None else 1 + grid[0] * grid[1],
            grid=grid,
            patches_per_side=self.patches_per_side,
            tokens_per_tile=self.tokens_per_tile,
            merge=self.merge,
            max_tiles=self.max_tiles,
        )

    @classmethod
    def from_preprocessor_config(cls, config: Mapping[str, Any], **changes: Any) -> ImageSettings:
        """Read a preprocessor_config.json: sizes as numbers (old files) or objects. `changes` win."""
        wanted = config.get("crop_size") if config.get("do_center_crop", True) else None
        size = _side(wanted if wanted is not None else config.get("size", 224))
        shortest = config.get("size")
        edge = _side(shortest) if shortest is not None and not _is_box(shortest) else None
        mode: ImageMode = "crop"
        if config.get("image_grid_pinpoints"):
            mode = "anyres"
        elif config.get("do_pad"):
            mode = "pad"
        elif _is_box(shortest) and not config.get("do_center_crop", False):
            mode = "squash"
        settings = cls(
            mode=mode,
            size=size,
            shortest_edge=edge,
            mean=_triple(config.get("image_mean", CLIP_MEAN), "image_mean"),
            std=_triple(config.get("image_std", CLIP_STD), "image_std"),
            resample=int(config.get("resample", 3)),
            rescale_factor=float(config.get("rescale_factor", 1 / 255)),
            pinpoints=tuple((int(h), int(w)) for h, w in config.get("image_grid_pinpoints") or ()),
        )
        return replace(settings, **changes)

    def to_preprocessor_config(self) -> dict[str, Any]:
        """What transformers' image processors read; equal pixels for "crop", "squash", "pad" and "anyres"."""
        box = {"height": self.size, "width": self.size}
        edge = {"shortest_edge": self.shortest_edge or self.size}
        classes = {"pad": "LlavaImageProcessor", "anyres": "LlavaNextImageProcessor"}
        config: dict[str, Any] = {
            "image_processor_type": classes.get(self.mode, "CLIPImageProcessor"),
            "do_convert_rgb": True,
            "do_resize": True,
            "do_center_crop": self.mode != "squash",
            "do_rescale": True,
            "do_normalize": True,
            "size": box if self.mode == "squash" else edge,
            "crop_size": box,
            "resample": self.resample,
            "rescale_factor": self.rescale_factor,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.mode == "pad":
            config["do_pad"] = True
        if self.mode == "anyres":
            config["image_grid_pinpoints"] = [list(point) for point in self.pinpoints]
            config["do_pad"] = True
        return config


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
            raise ImageError(f"{what}: {len(data)} bytes, over the limit of {limits.max_bytes}; make it smaller")
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
        raise ImageError(f"{shown}; the longest side may be {limits.max_side}; make it smaller")
    if height * width > limits.max_pixels:
        raise ImageError(f"{shown}; at most {limits.max_pixels} pixels are read; make it smaller")
    if max(height, width) > limits.max_aspect * min(height, width):
        raise ImageError(f"{shown}; the sides' ratio may be {limits.max_aspect} to 1; cut it")


def preprocess(image: PIL.Image.Image, settings: ImageSettings) -> NDArray[np.float32]:
    """Tiles of an RGB picture: (N, 3, size, size) float32, normalised; N is 1 unless the mode is anyres."""
    side = settings.size
    if settings.mode == "pad":
        tiles = [_crop(_pad_to_square(image, settings.background), settings)]
    elif settings.mode == "crop":
        tiles = [_crop(image, settings)]
    elif settings.mode == "squash":
        tiles = [_resize(image, (side, side), settings.resample)]
    else:
        tiles = [_resize(image, (side, side), 3), *_cut(image, settings)]
    table = _normalisation(settings.mean, settings.std, settings.rescale_factor)
    pixels = np.empty((len(tiles), 3, side, side), dtype=np.float32)
    for tile, planes in zip(tiles, pixels, strict=True):
        values = np.asarray(tile)  # (side, side, 3) uint8
        for channel in range(3):
            np.take(table[channel], values[:, :, channel], out=planes[channel])
    return pixels


def _pad_to_square(image: PIL.Image.Image, background: Colour) -> PIL.Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = PIL.Image.new("RGB", (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _crop(image: PIL.Image.Image, settings: ImageSettings) -> PIL.Image.Image:
    """Resize the shortest edge, then cut the centre (black where the picture is smaller, as CLIP's processor does)."""
    width, height = image.size
    edge = settings.shortest_edge or settings.size
    if width <= height:
        size = (int(edge * height / width), edge)
    else:
        size = (edge, int(edge * width / height))
    resized = _resize(image, size, settings.resample)
    side = settings.size
    if size == (side, side):
        return resized
    top, left = _centre(size[0], side), _centre(size[1], side)
    return resized.crop((left, top, left + side, top + side))


def _centre(length: int, side: int) -> int:
    """Where the cut begins; negative when padding comes first (CLIP's processor rounds that half up)."""
    return (length - side) // 2 if length >= side else -(-(side - length) // 2)


def _cut(image: PIL.Image.Image, settings: ImageSettings) -> list[PIL.Image.Image]:
    """Fit the picture on its canvas, centred on black, and cut that row by row."""
    canvas_height, canvas_width = choose_canvas((image.height, image.width), settings.pinpoints)
    height, width = fit_inside((image.height, image.width), (canvas_height, canvas_width))
    canvas = PIL.Image.new("RGB", (canvas_width, canvas_height), (0, 0, 0))
    canvas.paste(_resize(image, (height, width), 3), ((canvas_width - width) // 2, (canvas_height - height) // 2))
    side = settings.size
    return [
        canvas.crop((left, top, left + side, top + side))
        for top in range(0, canvas_height, side)
        for left in range(0, canvas_width, side)
    ]


def _resize(image: PIL.Image.Image, size: Size, resample: int) -> PIL.Image.Image:
    return image.resize((size[1], size[0]), PIL.Image.Resampling(resample))


@lru_cache(maxsize=16)
def _normalisation(mean: tuple[float, ...], std: tuple[float, ...], rescale_factor: float) -> NDArray[np.float32]:
    """(3, 256): what each byte becomes in each channel. A table, so that a picture costs one look-up a value."""
    scaled = (np.arange(256, dtype=np.uint8) * rescale_factor).astype(np.float32)
    centred = scaled[None, :] - np.array(mean, dtype=np.float32)[:, None]
    return (centred / np.array(std, dtype=np.float32)[:, None]).astype(np.float32)


def _read_file(path: Path, limits: ImageLimits, name: str) -> bytes:
    try:
        size = path.stat().st_size
        if size > limits.max_bytes:
            raise ImageError(f"{name}: {size} bytes, over the limit of {limits.max_bytes}; make it smaller")
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
        raise ImageError(f"{name}: more than {limits.max_pixels} pixels; make it smaller") from None
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


def _is_box(size: object) -> bool:
    return isinstance(size, Mapping) and "height" in size


def _side(size: object) -> int:
    """The side that a number, {"shortest_edge"} or a square {"height", "width"} means."""
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return int(size["shortest_edge"])
        if "height" in size and size["height"] == size.get("width"):
            return int(size["height"])
    elif isinstance(size, int):
        return size
    raise CheckpointError(f"preprocessor_config.json: size {size!r} is not square; only square tiles are supported")


def _triple(values: Any, key: str) -> tuple[float, float, float]:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise CheckpointError(f"preprocessor_config.json: {key} must be three numbers, not {values!r}")
    return float(values[0]), float(values[1]), float(values[2])
