"""A frozen tower's features on disk, so that later epochs do not encode the same picture again.

    FOLDER/IDENTITY/ab/abcdef....features   one picture: magic, CRC-32, safetensors

A picture is known by the sha256 of its pixels as the tower gets them, so copies of a file are one entry, and other
image settings are other entries. IDENTITY is a digest of all else that decides the bits: the tower's weights, the
layer, the number format, the kind of device, torch's version. Files are written beside and renamed, so a kill leaves
none half written; one that is damaged fails its checksum, is computed again and replaced. The folder stays below its
limit by taking in nothing more (epochs read in circles: to throw out the oldest would throw out what is needed next).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from llava.model.llava import Llava

_log = logging.getLogger(__name__)

_MAGIC = b"LLVFEAT1"
_HEADER = struct.Struct("<8sI")
_SPARE_BYTES = 2 << 30  # of the disk, for checkpoints and others


class FeatureCache:
    """Features by picture key. limit_bytes: the most that the folder may hold, whoever wrote it."""

    def __init__(self, folder: Path, *, identity: str, limit_bytes: int) -> None:
        self.folder = folder / identity[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = 0
        self.misses = 0
        self.damaged = 0
        self._limit = limit_bytes
        self._held = sum(entry.stat().st_size for entry in folder.rglob("*.features"))
        self._full = False

    def get(self, key: str) -> Tensor | None:
        """The features of a picture on the CPU, None when they are not there or not whole."""
        try:
            data = self._path(key).read_bytes()
        except OSError:  # not there; or not to be read, which is no reason to stop a run that can compute it
            self.misses += 1
            return None
        features = _unpack(data)
        if features is None:
            self.damaged += 1
            self._held -= len(data)
            with suppress(OSError):
                self._path(key).unlink(missing_ok=True)
            return None
        self.hits += 1
        return features

    def put(self, key: str, features: Tensor) -> None:
        """Keep the features of a picture, (n, P, Dv), unless the folder is full. Never raises for want of space."""
        if self._full:
            return
        data = _pack(features)
        free = shutil.disk_usage(self.folder).free
        if self._held + len(data) > self._limit or free - len(data) < _SPARE_BYTES:
            self._stop(f"at {self._held / 1e9:.1f} GB, with {free / 1e9:.1f} GB free")
            return
        path = self._path(key)
        beside = path.with_suffix(f".{os.getpid()}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            beside.write_bytes(data)
            beside.replace(path)
        except OSError as error:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            self._stop(str(error))
            return
        self._held += len(data)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.features"

    def _stop(self, why: str) -> None:
        self._full = True
        _log.info("%s takes in no more features (%s); other pictures are encoded each time", self.folder, why)


def identify_tower(model: Llava, *, dtype: torch.dtype) -> str:
    """A digest of what decides the bits of a tower's features. dtype: what is computed in, under autocast."""
    digest = hashlib.sha256()
    facts = (model.config.vision_feature_layer, model.config.skipped_tokens, dtype, model.device.type)
    digest.update(repr((*facts, torch.__version__)).encode())
    for name, tensor in sorted(model.vision_tower.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pack(features: Tensor) -> bytes:
    from safetensors.torch import save

    data: bytes = save({"features": features.detach().cpu().contiguous()})
    return _HEADER.pack(_MAGIC, zlib.crc32(data)) + data


def _unpack(data: bytes) -> Tensor | None:
    from safetensors.torch import load

    if len(data) < _HEADER.size:
        return None
    magic, checksum = _HEADER.unpack_from(data)
    body = data[_HEADER.size :]
    if magic != _MAGIC or zlib.crc32(body) != checksum:
        return None
    features: Tensor = load(body)["features"]
    return features
