"""Pictures of requests: known by their pixels, encoded together, and kept while they may be asked about again."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llava.errors import LlavaError
from llava.inference.decoder import LlavaLike
from llava.prompt.processor import Encoded

logger = logging.getLogger(__name__)

# Tiles encoded at once: enough to fill a processor, few enough to bound the memory of the tower's activations.
_MAX_TILES_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of a request. tiles: (N, 3, H, W); size: its original (height, width); key: equal for equal both."""

    key: bytes
    tiles: NDArray[np.float32]
    size: tuple[int, int]


def read_pictures(encoded: Encoded) -> tuple[Picture, ...]:
    """An encoded prompt's pictures, in the order of their placeholders."""
    counts = encoded.tiles_per_image or (1,) * len(encoded.pixel_values)
    tiles = np.split(encoded.pixel_values, np.cumsum(counts)[:-1]) if counts else []
    sizes = encoded.image_sizes or tuple((array.shape[2], array.shape[3]) for array in tiles)
    return tuple(Picture(_key(array, size), array, size) for array, size in zip(tiles, sizes, strict=True))


class FeatureStore:
    """Image features of the pictures seen lately, up to a number of bytes."""

    def __init__(self, model: LlavaLike, *, max_bytes: int) -> None:
        self._model = model
        self._max_bytes = max_bytes
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Memory of all features kept."""
        return sum(tensor.nbytes for tensor in self._features.values())

    def clear(self) -> None:
        self._features.clear()

    def read(self, pictures: Sequence[Picture]) -> Tensor | None:
        """Features of a prompt's pictures one after the other, (F, D); None without pictures."""
        if not pictures:
            return None
        self._encode(pictures)
        return torch.cat([self._features[picture.key] for picture in pictures])

    def encode_ahead(self, groups: Iterable[Sequence[Picture]]) -> None:
        """Encode the pictures of several prompts together. What fails is met again by `read`, one prompt at a time."""
        try:
            self._encode([picture for pictures in groups for picture in pictures])
        except (RuntimeError, ValueError, LlavaError):
            logger.debug("encoding pictures together failed; each prompt tries for itself", exc_info=True)

    def _encode(self, pictures: Sequence[Picture]) -> None:
        """Put these pictures' features into the store. They stay, whatever their size: they are about to be read."""
        missing: dict[bytes, Picture] = {}
        for picture in pictures:
            if picture.key in self._features:
                self._features.move_to_end(picture.key)
            else:
                missing[picture.key] = picture
        for chunk in _in_chunks(missing.values()):
            features = self._model.encode_images(
                torch.from_numpy(np.concatenate([picture.tiles for picture in chunk])),
                image_sizes=[picture.size for picture in chunk],
                tiles_per_image=[len(picture.tiles) for picture in chunk],
            )
            self._features.update(zip((picture.key for picture in chunk), features, strict=True))
        needed = {picture.key for picture in pictures}
        stored = self.nbytes
        for key in list(self._features):
            if stored <= self._max_bytes:
                break
            if key not in needed:
                stored -= self._features.pop(key).nbytes


def _key(tiles: NDArray[np.float32], size: tuple[int, int]) -> bytes:
    digest = hashlib.blake2b(repr((tiles.shape, size)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(tiles).data)
    return digest.digest()


def _in_chunks(pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
    """Pictures in runs of at most _MAX_TILES_AT_ONCE tiles, one picture at least."""
    chunk: list[Picture] = []
    tiles = 0
    for picture in pictures:
        if chunk and tiles + len(picture.tiles) > _MAX_TILES_AT_ONCE:
            yield chunk
            chunk, tiles = [], 0
        chunk.append(picture)
        tiles += len(picture.tiles)
    if chunk:
        yield chunk
