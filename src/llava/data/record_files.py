"""Writing records to files: JSON lists, JSONL, parquet, tar shards. Whole or not at all.

A file is written under another name beside its place, brought to the disk, and moved; an error leaves nothing behind
and what was there before as it was. Records go through one by one, so a data set of any size needs little memory.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from llava.data.record_writing import Item, picture_kind, to_messages_beside_pictures
from llava.errors import DataError, MissingExtraError, UsageError
from llava.prompt.conversation import Image

_SAMPLES_A_SHARD = 2000
_ROWS_A_GROUP = 100  # readers decode whole row groups, pictures included


class Writer(ABC):
    """A context that takes items; leaving it well puts the file in place, leaving it by an error removes it."""

    def __init__(self, path: Path, *, force: bool = False) -> None:
        if path.exists() and not force:
            raise UsageError(f"{path} exists already; give --force to replace it, or choose another name")
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial-{os.getpid()}")

    def __enter__(self) -> Writer:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
            if kind is None:
                if self.path.is_dir():
                    shutil.rmtree(self.path)
                self.partial.replace(self.path)
        finally:
            if self.partial.is_dir():
                shutil.rmtree(self.partial)
            else:
                self.partial.unlink(missing_ok=True)

    @abstractmethod
    def open(self) -> None:
        """Begin the partial file."""

    @abstractmethod
    def write(self, item: Item) -> None:
        """Add a conversation. Raises DataError for what the format cannot hold."""

    @abstractmethod
    def close(self) -> None:
        """End the partial file and bring it to the disk; also called after an error."""


class JsonWriter(Writer):
    """A JSON list with a record a line, or JSONL when the name ends in .jsonl."""

    def __init__(self, path: Path, *, to_record: Callable[[Item], dict[str, Any]], force: bool = False) -> None:
        super().__init__(path, force=force)
        self._to_record = to_record
        self._is_lines = path.suffix.lower() in (".jsonl", ".ndjson")
        self._written = 0

    def open(self) -> None:
        self._file = self.partial.open("w", encoding="utf-8")

    def write(self, item: Item) -> None:
        text = _json(self._to_record(item))
        before = "" if self._is_lines else (",\n" if self._written else "[\n")
        self._file.write(before + text + ("\n" if self._is_lines else ""))
        self._written += 1

    def close(self) -> None:
        if not self._is_lines:
            self._file.write("\n]\n" if self._written else "[]\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class ShardWriter(Writer):
    """Tar shards with the pictures inside: one .tar file, or a folder of them with 2,000 samples each."""

    def __init__(self, path: Path, *, read_picture: Callable[[Item, Image], bytes], force: bool = False) -> None:
        super().__init__(path, force=force)
        self._read_picture = read_picture
        self._single = path.suffix.lower() == ".tar"
        self._tar: tarfile.TarFile | None = None
        self._written = 0

    def open(self) -> None:
        if not self._single:
            self.partial.mkdir()

    def write(self, item: Item) -> None:
        if self._tar is None or (not self._single and self._written % _SAMPLES_A_SHARD == 0):
            self._end_shard()
            shard = self._written // _SAMPLES_A_SHARD
            self._tar = tarfile.open(self.partial if self._single else self.partial / f"{shard:06}.tar", "w")  # noqa: SIM115
        key = f"{self._written:09}"
        pictures = [self._read_picture(item, image) for image in item.conversation.images]
        self._add(f"{key}.json", _json(to_messages_beside_pictures(item)).encode())
        for number, data in enumerate(pictures):
            self._add(f"{key}.{number}.{_ending(data, item)}", data)
        self._written += 1

    def close(self) -> None:
        if self._tar is None and self._single:
            self._tar = tarfile.open(self.partial, "w")  # noqa: SIM115
        self._end_shard()

    def _add(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))

    def _end_shard(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None


class ParquetWriter(Writer):
    """One parquet file: `id`, `messages` (JSON text), `images` (list of {bytes, path}), in row groups of 100."""

    def __init__(self, path: Path, *, read_picture: Callable[[Item, Image], bytes], force: bool = False) -> None:
        super().__init__(path, force=force)
        self._read_picture = read_picture
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise MissingExtraError("writing parquet files", "parquet") from None
        self._arrow: Any = pyarrow
        picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        columns = [("id", pyarrow.string()), ("messages", pyarrow.string()), ("images", pyarrow.list_(picture))]
        self._schema = pyarrow.schema(columns)
        self._rows: list[dict[str, Any]] = []

    def open(self) -> None:
        self._file = self._arrow.parquet.ParquetWriter(self.partial, self._schema)

    def write(self, item: Item) -> None:
        if item.extras:
            keys = ", ".join(map(repr, item.extras))
            raise DataError(f"{item.origin}: parquet has no column for {keys}; drop them, or convert with --to openai")
        messages = json.dumps(to_messages_beside_pictures(item)["messages"], ensure_ascii=False)
        images = [
            {
                "bytes": self._read_picture(item, image),
                "path": None if isinstance(image.source, bytes) else item.name(image),
            }
            for image in item.conversation.images
        ]
        identity = None if item.id is None else str(item.id)
        self._rows.append({"id": identity, "messages": messages, "images": images or None})
        if len(self._rows) >= _ROWS_A_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(self._arrow.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


def _json(record: dict[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair in a key that is only passed on
        return json.dumps(record)
    return text


def _ending(data: bytes, item: Item) -> str:
    kind = picture_kind(data)
    if kind == "octet-stream":
        raise DataError(f"{item.origin}: a picture is no JPEG, PNG, WebP, GIF or BMP; see `llava data check`")
    return "jpg" if kind == "jpeg" else kind
