"""Tensors in files: read one at a time, written one at a time.

`Source` is a tensor that can be read when it is needed: from a shard, or made from others (merged, transposed,
grown). Readers of every format hand out a dict of them, so a 70B checkpoint costs one tensor of memory at a time.
safetensors headers are checked here byte by byte (a cut or swapped shard is an error before anything is read);
.bin, .pt and .pth go through torch.load(weights_only=True), which runs nothing from the file.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava.errors import CheckpointError, UnknownFormatError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
# A folder's weights are the first of these that is there; an index names its shards.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class Source:
    """One tensor that `read` gives when asked. file and key say where it comes from, for errors and reports.

    peek: gives every n-th of its values, flattened, without reading the rest; None where only `read` is to be had.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    key: str
    read: Callable[[], Tensor]
    peek: Callable[[int], Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return prod(self.shape) * self.dtype.itemsize

    def changed(self, read: Callable[[], Tensor], *, shape: tuple[int, ...] | None = None) -> Source:
        """The same place in the files with another way to read it."""
        return Source(self.shape if shape is None else shape, self.dtype, self.file, self.key, read)


def read_folder(folder: Path, *, names: Iterable[str] = WEIGHT_FILES) -> dict[str, Source]:
    """Every tensor of a model folder by its key: from the first of `names` that exists there.

    Raises UnknownFormatError when none is there, CheckpointError for a missing, cut or swapped shard.
    """
    names = tuple(names)
    for name in names:
        path = folder / name
        if path.is_file():
            return _read_index(path) if name.endswith(".index.json") else read_file(path)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) if folder.is_dir() else "no such folder"
    raise UnknownFormatError(
        f"{folder}: no weights; looked for {', '.join(names)}; found: {found or 'an empty folder'}"
    )


def read_file(path: Path) -> dict[str, Source]:
    """Every tensor of one weight file by its key; the kind is taken from the file's first bytes, not its name."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; the download or copy is incomplete")
    return _read_safetensors(path) if is_safetensors(path) else _read_torch(path)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like a safetensors header: an 8-byte length, then a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{" and head[:2] != b"PK")


def _read_index(path: Path) -> dict[str, Source]:
    try:
        listed: dict[str, str] = json.loads(path.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a weight index (no readable weight_map); download it again") from error
    shards: dict[str, dict[str, Source]] = {}
    for shard in sorted(set(listed.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{path}: shard {shard!r} is not a plain file name; refused")
        shards[shard] = read_file(path.parent / shard)
    for key, shard in listed.items():
        if key not in shards[shard]:
            elsewhere = [name for name, tensors in shards.items() if key in tensors]
            if elsewhere:
                raise CheckpointError(
                    f"{path.parent / shard}: no key {key!r}, which {path.name} says is there; it is in {elsewhere[0]}: "
                    "the shards were swapped or renamed"
                )
            # in no shard: the account of all tensors names it, with the shape that it should have
    out: dict[str, Source] = {}
    for shard, tensors in shards.items():
        for key, source in tensors.items():
            if key in out:
                raise CheckpointError(f"{path.parent / shard}: {key!r} is in {out[key].file.name} too; remove one")
            out[key] = source
    return out


def _read_safetensors(path: Path) -> dict[str, Source]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path}: not a safetensors file or cut short ({size} bytes); download it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: its safetensors header is not JSON; download it again") from error
    start, end, out = 8 + length, 0, {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            first, last = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: key {key!r} has an unreadable header entry {entry!r}") from error
        if first < 0 or last - first != prod(shape) * dtype.itemsize or start + last > size:
            raise CheckpointError(
                f"{path}: key {key!r} with shape {list(shape)} should take bytes {first} to {last}, but the file has "
                f"{size - start} bytes of data; it was cut short, download it again"
            )
        end = max(end, last)
        place = (path, start + first, shape, dtype)
        out[key] = Source(shape, dtype, path, key, _byte_reader(*place), _byte_peeker(*place))
    if start + end != size:
        raise CheckpointError(f"{path}: {size - start - end} bytes after its last tensor; the file is damaged")
    return out


def _byte_reader(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        buffer = bytearray(prod(shape) * dtype.itemsize)
        with path.open("rb") as file:
            file.seek(offset)
            if file.readinto(buffer) != len(buffer):
                raise CheckpointError(f"{path}: cut short while it was read")
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)

    return read


def _byte_peeker(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[int], Tensor]:
    def peek(step: int) -> Tensor:
        if prod(shape) == 0:
            return torch.empty(0, dtype=dtype)
        size = dtype.itemsize
        mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(prod(shape), size))
        return torch.frombuffer(bytearray(mapped[::step].tobytes()), dtype=dtype)

    return peek


class _OpenTorchFile:
    """The one .bin file held open; pickled shards cannot be read by the tensor, so the last one is kept."""

    path: Path | None = None
    tensors: Mapping[str, Any] = {}

    def open(self, path: Path) -> Mapping[str, Any]:
        if self.path != path:
            self.path, self.tensors = None, {}  # free the last one first
            self.tensors, self.path = load_torch(path), path
        return self.tensors


def load_torch(path: Path) -> Mapping[str, Any]:
    """The object in a .bin, .pt or .pth file, by weights_only: a pickle that would run something is refused."""
    try:
        # only torch >= 1.6 writes zip files, and only those can be mapped
        with warnings.catch_warnings():
            # a remark on the pickle's protocol: what cannot be read raises all the same
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors (or is cut short), so it is not loaded: a pickle can run any code; "
            "ask its author for a safetensors file"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not readable as a torch file ({first}); download it again") from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a dict of tensors")
    return loaded


# One for all readers: the pages of a shard stay in memory while it is mapped.
_OPEN = _OpenTorchFile()


def _read_torch(path: Path) -> dict[str, Source]:
    return sources_of(_OPEN.open(path), path, lambda key: _OPEN.open(path)[key])


def close_files() -> None:
    """Let go of the torch file that was read last."""
    _OPEN.path, _OPEN.tensors = None, {}


def sources_of(tensors: Mapping[str, Any], path: Path, read: Callable[[str], Tensor]) -> dict[str, Source]:
    """Sources for a dict of tensors; `read` gives one by its key. Raises CheckpointError for other values."""
    out = {}
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor")
        out[key] = Source(tuple(value.shape), value.dtype, path, key, lambda key=key: read(key))  # type: ignore[misc]
    return out


def held(name: str, value: Tensor, *, file: Path) -> Source:
    """A source for a tensor in memory."""
    return Source(tuple(value.shape), value.dtype, file, name, lambda: value)


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, Source],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    advance: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write tensors as model.safetensors, or as numbered shards and their index; one tensor in memory at a time.

    dtype: for floating tensors; None keeps each as it is. advance: called with the bytes of each tensor written.
    Returns the files, each on the disk (fsync) when this returns.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, source in tensors.items():
        size = prod(source.shape) * _written_dtype(source, dtype).itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = []
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_one(folder / file, {name: tensors[name] for name in names}, dtype, advance)
        files.append(folder / file)
    if len(shards) > 1:
        total = sum(prod(s.shape) * _written_dtype(s, dtype).itemsize for s in tensors.values())
        placed = {name: files[number].name for number, names in enumerate(shards) for name in names}
        index = folder / "model.safetensors.index.json"
        write_text(index, json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2) + "\n")
        files.append(index)
    return files


def _written_dtype(source: Source, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and source.dtype.is_floating_point else source.dtype


def _write_one(
    path: Path, tensors: Mapping[str, Source], dtype: torch.dtype | None, advance: Callable[[int], None] | None
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, source in tensors.items():
        written = _written_dtype(source, dtype)
        size = prod(source.shape) * written.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[written],
            "shape": list(source.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for name, source in tensors.items():
            value = source.read()
            if tuple(value.shape) != source.shape:
                raise CheckpointError(
                    f"{source.file}: {source.key!r} gave shape {list(value.shape)}, expected {list(source.shape)}"
                )
            value = value.detach().to("cpu", _written_dtype(source, dtype)).contiguous()
            file.write(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
            if advance is not None:
                advance(value.numel() * value.element_size())
            del value, name
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file and put it on the disk (fsync)."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
