"""Tokenised conversations on disk, for the next run on the same data: an optional file beside nothing else.

A conversation's entry holds its token ids with one placeholder a picture, which of them are supervised, and the sizes
that its pictures had; an entry whose pictures have another size by now is made anew. One file a key; the key is a
digest of all that decides the tokens (tokenizer, template, picture settings, limits, data). Entries are appended as
whole writes with a checksum, so what a kill or a flipped bit damages is dropped at the next opening and made anew. The
file stops growing at its limit, and the folder's oldest files go when all together exceed it.

Measured on text-only conversations of 430 tokens: 22 us from the cache, 125 us without, 153 us while it is filled. A
picture costs several ms to decode either way, so this pays for text-only data and where pictures are tiny.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import tempfile
import threading
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llava.errors import DataError
from llava.prompt.processor import IGNORE_LABEL, Encoded, PreparedImage, Processor

_FORMAT = 1
_MAX_BYTES = 4 << 30
_HEAD = struct.Struct("<IIQ")  # bytes of the body, its checksum, conversation number
_COUNTS = struct.Struct("<IIII")  # tokens, tokens cut off, pictures in all, pictures kept (_LEFT_OUT: none of it fits)
_LEFT_OUT = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class Known:
    """What the cache has of a conversation: encoded, or None when it was left out as too long."""

    encoded: Encoded | None


class TokenCache:
    """One key's file. Threads and processes may share it; two that add the same conversation cost only space."""

    def __init__(self, folder: Path, key: str, *, image_token_id: int, max_bytes: int = _MAX_BYTES) -> None:
        self.path = folder / f"{key}.tokens"
        self._image_token_id = image_token_id
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            weakref.finalize(self, os.close, self._handle)
            self._places, self._bytes = self._scan()
            os.utime(self.path)
        except OSError as error:
            raise DataError(f"data.token_cache: {self.path}: {error.strerror}; choose another folder") from error
        _prune(folder, keep=self.path, max_bytes=max_bytes)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, number: int, images: Sequence[PreparedImage]) -> Known | None:
        """The entry of a conversation with these pictures; None when there is none, or its pictures have changed."""
        place = self._places.get(number)
        if place is None:
            return None
        body = os.pread(self._handle, place[1], place[0])
        return self._decode(body, images) if len(body) == place[1] else None

    def put(self, number: int, images: Sequence[PreparedImage], encoded: Encoded | None) -> None:
        """Add an entry. A full cache or disk is no reason to stop a run: the entry is left out then."""
        body = self._encode(images, encoded)
        entry = _HEAD.pack(len(body), zlib.crc32(body, number & 0xFFFFFFFF), number) + body
        with self._lock:
            if self._bytes + len(entry) > self._max_bytes:
                return
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX)
                try:
                    begin = os.lseek(self._handle, 0, os.SEEK_END)
                    written = os.write(self._handle, entry)
                    if written != len(entry):
                        os.ftruncate(self._handle, begin)
                        return
                finally:
                    fcntl.flock(self._handle, fcntl.LOCK_UN)
            except OSError:
                return
            self._bytes = begin + len(entry)
            self._places[number] = (begin + _HEAD.size, len(body))

    def _scan(self) -> tuple[dict[int, tuple[int, int]], int]:
        """The places of all whole entries; the file is cut behind the last one."""
        places: dict[int, tuple[int, int]] = {}
        offset = 0
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        try:
            size = os.fstat(self._handle).st_size
            with open(os.dup(self._handle), "rb") as file:  # noqa: PTH123 - a descriptor
                file.seek(0)
                while len(head := file.read(_HEAD.size)) == _HEAD.size:
                    length, checksum, number = _HEAD.unpack(head)
                    if length < _COUNTS.size or offset + _HEAD.size + length > size:
                        break
                    body = file.read(length)
                    if zlib.crc32(body, number & 0xFFFFFFFF) != checksum:
                        break
                    places[number] = (offset + _HEAD.size, length)
                    offset += _HEAD.size + length
            os.ftruncate(self._handle, offset)
        finally:
            fcntl.flock(self._handle, fcntl.LOCK_UN)
        return places, offset

    def _encode(self, images: Sequence[PreparedImage], encoded: Encoded | None) -> bytes:
        sizes = np.array([image.size for image in images], dtype="<u4").tobytes()
        if encoded is None:
            return _COUNTS.pack(0, 0, len(images), _LEFT_OUT) + sizes
        first = self._first_of_each_picture(encoded.input_ids, encoded.tokens_per_image)
        ids, labels = encoded.input_ids[first], encoded.labels[first]
        counts = _COUNTS.pack(len(ids), encoded.num_truncated, len(images), len(encoded.image_sizes))
        pictures = np.array([encoded.tiles_per_image, encoded.tokens_per_image], dtype="<u4").tobytes()
        supervised = np.packbits(labels != IGNORE_LABEL).tobytes()
        return counts + sizes + pictures + ids.astype("<i4").tobytes() + supervised

    def _decode(self, body: bytes, images: Sequence[PreparedImage]) -> Known | None:
        tokens, truncated, pictures, kept = _COUNTS.unpack_from(body)
        offset = _COUNTS.size

        def take(count: int) -> NDArray[np.uint32]:
            nonlocal offset
            offset += 4 * count
            return np.frombuffer(body, dtype="<u4", count=count, offset=offset - 4 * count)

        if pictures != len(images) or take(2 * pictures).tolist() != [n for image in images for n in image.size]:
            return None
        if kept == _LEFT_OUT:
            return Known(None)
        tiles, per_image = take(kept).tolist(), take(kept).tolist()
        ids = take(tokens).astype(np.int64)
        bits = np.frombuffer(body, dtype=np.uint8, offset=offset)
        labels = np.where(np.unpackbits(bits, count=tokens).astype(bool), ids, IGNORE_LABEL)
        if not kept:
            return Known(Encoded(ids, labels, num_truncated=truncated))
        repeats = np.ones(tokens, dtype=np.int64)
        repeats[ids == self._image_token_id] = per_image
        pixels = [image.pixel_values for image in images[:kept]]
        return Known(
            Encoded(
                input_ids=np.repeat(ids, repeats),
                labels=np.repeat(labels, repeats),
                pixel_values=pixels[0] if kept == 1 else np.concatenate(pixels),
                image_sizes=tuple(image.size for image in images[:kept]),
                tiles_per_image=tuple(tiles),
                tokens_per_image=tuple(per_image),
                num_truncated=truncated,
            )
        )

    def _first_of_each_picture(self, ids: NDArray[np.int64], per_image: Sequence[int]) -> NDArray[np.bool_]:
        """(tokens,) False for all but the first placeholder of each picture."""
        kept = np.ones(len(ids), dtype=bool)
        places = np.flatnonzero(ids == self._image_token_id)
        kept[places] = False
        kept[places[np.cumsum([0, *per_image], dtype=np.int64)[:-1]]] = True
        return kept


def open_token_cache(
    folder: str | Path, processor: Processor, *, max_tokens: int, too_long: str, fingerprint: str
) -> TokenCache:
    """The cache for these tokens. fingerprint: of the data (`ConversationSet.fingerprint`, and the record formats)."""
    about = {
        "format": _FORMAT,
        "tokenizer": _digest_tokenizer(processor),
        "template": repr(processor.template),
        "processor": repr(processor.block()),
        "max_tokens": max_tokens,
        "too_long": too_long,
        "data": fingerprint,
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    return TokenCache(Path(folder), key, image_token_id=processor.image_token_id)


def _digest_tokenizer(processor: Processor) -> str:
    """A digest of the files that the tokenizer would be saved as."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        processor.tokenizer.save(folder, portable=False)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _prune(folder: Path, *, keep: Path, max_bytes: int) -> None:
    """Remove the oldest caches of other keys while all together are over the limit."""
    found = []
    for path in folder.glob("*.tokens"):
        try:
            status = path.stat()
        except OSError:
            continue  # another process was quicker
        found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= max_bytes or path == keep:
            continue
        path.unlink(missing_ok=True)
        total -= size
