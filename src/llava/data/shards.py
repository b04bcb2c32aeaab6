"""WebDataset shards: tar files whose members with one name up to the first dot are a sample (`0017.json`, `0017.jpg`).

A sample's `.json` is a record of any known format (its pictures are those beside it), its `.txt` a caption. The tars
stay packed: one pass at the start finds where each sample lies, so that any sample can be read at any time by any
process and a run resumes anywhere; which process reads which sample is the loader's plan, not the shards' division.
That pass reads everything once: equal pictures are found by a digest of their bytes. Not covered: compressed tars.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from llava.data.pictures import PictureFolder, PictureIndexBuilder, key_of_bytes, named_pictures
from llava.data.record_shapes import CONVERSATION_KEYS, shape_record
from llava.data.records import ConversationFile
from llava.errors import DataError

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
_BLOCK = 512

# One member: (its name behind the sample's key, its bytes).
_Member = tuple[str, bytes]


class ShardFile(ConversationFile):
    """Tar shards, one after the other; a record is a sample. Some 32 bytes of memory a sample."""

    def __init__(self, path: Path, paths: Sequence[Path], *, pictures: PictureFolder, format: str = "auto") -> None:
        super().__init__(path, pictures=pictures, format=format)
        self._paths = tuple(paths)
        self._shards = array("I")
        self._starts = array("q")
        self._lengths = array("q")
        self._digest = hashlib.sha256()
        builder = PictureIndexBuilder(pictures)
        for number, shard in enumerate(self._paths):
            for start, end, key, members in _walk_samples(shard):
                self._shards.append(number)
                self._starts.append(start)
                self._lengths.append(end - start)
                self._note(builder, members, f"{shard}:{key}")
        self.picture_index = builder.done()
        if not len(self):
            raise DataError(f"{path}: no samples in it")

    @property
    def fingerprint(self) -> str:
        return self._digest.hexdigest()

    def origin(self, index: int) -> str:
        """ "shards/000.tar:0017", by the sample's key."""
        try:
            with tarfile.open(fileobj=io.BytesIO(self._bytes(index, _BLOCK * 8)), mode="r:") as tar:
                member = tar.next()
        except (tarfile.TarError, DataError):
            member = None
        key = _split_name(member.name)[0] if member is not None else f"byte {self._starts[index]}"
        return f"{self._paths[self._shards[index]]}:{key}"

    def load(self, index: int) -> tuple[Any, Mapping[str, bytes]]:
        origin = self.origin(index)
        data = self._bytes(index, self._lengths[index])
        if len(data) != self._lengths[index]:
            raise DataError(f"{origin}: the shard has become shorter while it was read")
        try:
            # The members of a sample stand in a row, so that this piece of the tar is a tar.
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                members = [(_split_name(member.name)[1], _read(tar, member)) for member in tar if _is_file(member)]
        except tarfile.TarError as error:
            raise DataError(f"{origin}: the shard has changed while it was read ({error})") from error
        return _to_record(members, origin)

    def _bytes(self, index: int, length: int) -> bytes:
        path = self._paths[self._shards[index]]
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        try:
            return os.pread(handle, min(length, self._lengths[index]), self._starts[index])
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        finally:
            os.close(handle)

    def _note(self, builder: PictureIndexBuilder, members: Sequence[_Member], origin: str) -> None:
        for name, data in members:
            self._digest.update(f"{name}\0{len(data)}\0".encode(errors="surrogatepass"))
            self._digest.update(key_of_bytes(data))
        try:
            record, embedded = _to_record(members, origin)
        except DataError:
            builder.add([])  # said again, with its origin, when the sample is read
            return
        builder.add(named_pictures(record), {name: key_of_bytes(data) for name, data in embedded.items()})


def _walk_samples(path: Path) -> Iterator[tuple[int, int, str, list[_Member]]]:
    """(first byte, byte behind the last, key, members) of each sample of a shard."""
    try:
        with tarfile.open(path, "r:") as tar:
            key, start, end = "", 0, 0
            members: list[_Member] = []
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has read
                if not _is_file(member):
                    continue
                own_key, name = _split_name(member.name)
                if (
                    not name
                    or PurePosixPath(own_key).name.startswith("__")
                    or PurePosixPath(member.name).name[0] == "."
                ):
                    continue  # no part of a sample, as WebDataset has it; archivers leave such files
                if members and own_key != key:
                    yield start, end, key, members
                    members = []
                if not members:
                    key, start = own_key, member.offset
                members.append((name, _read(tar, member)))
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            if members:
                yield start, end, key, members
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a whole, unpacked tar file ({error}); fetch it again or unpack it") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _is_file(member: tarfile.TarInfo) -> bool:
    """Regular members only: a link or device in a shard names something outside it."""
    return member.isreg() and not member.issparse()


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # regular
    data = file.read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name} ends after {len(data)} of {member.size} bytes")
    return data


def _split_name(name: str) -> tuple[str, str]:
    """A member's name as WebDataset reads it: up to the first dot of the last part, and behind that dot."""
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return str(path.parent / stem), ending


def _to_record(members: Sequence[_Member], origin: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A sample as a record, and its pictures by the names that the record gives them."""
    pictures = {name: data for name, data in members if name.rpartition(".")[2].lower() in _PICTURES}
    texts = {name.lower(): data for name, data in members if name.lower() in ("json", "txt")}
    if not texts:
        raise DataError(f"{origin}: neither a .json nor a .txt in the sample")
    fields: dict[str, Any] = {}
    if "json" in texts:
        try:
            value = json.loads(texts["json"])
        except (ValueError, RecursionError):
            raise DataError(f"{origin}: its .json is not JSON") from None
        fields = {"conversations": value} if isinstance(value, list) else value
        if not isinstance(fields, dict):
            raise DataError(f"{origin}: its .json must hold an object, not {type(value).__name__}")
    if "txt" in texts and not any(fields.get(key) is not None for key in CONVERSATION_KEYS):
        try:
            fields = {**fields, "caption": texts["txt"].decode()}
        except UnicodeDecodeError:
            raise DataError(f"{origin}: its .txt is not UTF-8") from None
    named = named_pictures(fields)
    in_parts = fields.get("messages") is not None and not (fields.get("image") or fields.get("images"))
    if not pictures:
        return shape_record(fields, () if in_parts else named, origin=origin), {}
    chosen = _match(named, pictures)
    if chosen is None:
        raise DataError(
            f"{origin}: its .json names {len(named)} pictures, {len(pictures)} lie beside it ({', '.join(pictures)})"
        )
    if in_parts and named:
        return fields, dict(zip(named, chosen.values(), strict=True))  # they stay where the parts have them
    return shape_record(fields, list(chosen), origin=origin), chosen


def _match(named: Sequence[str], pictures: Mapping[str, bytes]) -> dict[str, bytes] | None:
    """The pictures in the order in which the record names them: by name, else by number; None when neither fits.

    Keys begin with a character that no path holds, so that they are never looked for in the image folder.
    """
    if not named:
        return {f"\0{name}": data for name, data in pictures.items()}
    by_name: list[str] = []
    for name in named:
        last = name.replace("\\", "/").rpartition("/")[2]
        ending = last.partition(".")[2]
        by_name += [own for own in pictures if own in (last, ending)][:1]
    if len(by_name) != len(named) or not len(set(named)) == len(set(by_name)) == len(pictures):
        if len(named) != len(pictures):
            return None
        by_name = list(pictures)
    return {f"\0{place}": pictures[own] for place, own in enumerate(by_name)}
