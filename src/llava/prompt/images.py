"""Pictures to tiles: pad, crop, squash or anyres, with the pixels of the original LLaVA, bit for bit.

Decoding is in `decoding`. Arrays are NumPy; torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from llava.errors import CheckpointError
from llava.prompt.decoding import Colour as Colour
from llava.prompt.decoding import ImageLimits as ImageLimits
from llava.prompt.decoding import check_size as check_size
from llava.prompt.decoding import decode_image as decode_image
from llava.prompt.decoding import read_size as read_size
from llava.prompt.tiling import MergeType, Size, choose_canvas, choose_grid, count_image_tokens, fit_inside

ImageMode: TypeAlias = Literal["pad", "crop", "squash", "anyres"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
            shortest_edge=None if edge == size else edge,
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
    # Negative where the picture is smaller: floor division pads as CLIP's processor does.
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return resized.crop((left, top, left + side, top + side))


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
