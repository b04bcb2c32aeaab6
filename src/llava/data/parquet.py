"""Parquet files of conversations, pictures inside or beside them, as `datasets` and the hub write them.

Columns: `conversations`, `messages` or `texts` (lists of structs, or JSON text), or `caption`/`text`; `image` or
`images`: paths, bytes, or structs {bytes, path}. The last few decoded row groups stay in memory, so files with large
row groups full of pictures are slow to read in random order: write such files with a row group of 100 rows or so, or
use tar shards. All of a file is read once at the start: equal pictures are found by a digest of their bytes.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.data.pictures import PictureFolder, PictureIndexBuilder, key_of_bytes, named_pictures
from llava.data.record_shapes import CAPTION_KEYS, CONVERSATION_KEYS, shape_record
from llava.data.records import ConversationFile
from llava.errors import DataError, MissingExtraError

_READ_COLUMNS = (
    "id", *CONVERSATION_KEYS, *CAPTION_KEYS, "image", "images", "system",
    "video", "videos", "audios", "tools", "objects",
)  # fmt: skip
_ROWS_AT_ONCE = 64
_KEPT_BYTES = 256 << 20


class ParquetFile(ConversationFile):
    """Parquet files, one after the other; a record is a row."""

    def __init__(self, path: Path, paths: Sequence[Path], *, pictures: PictureFolder) -> None:
        super().__init__(path, pictures=pictures)
        self._groups = _RowGroups(paths)
        builder = PictureIndexBuilder(pictures)
        digest = hashlib.sha256()
        for file in paths:
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        self._fingerprint = digest.hexdigest()
        for place, row in self._groups.walk():
            try:
                record, embedded = _to_record(row, self._origin(*place))
                builder.add(named_pictures(record), {name: key_of_bytes(data) for name, data in embedded.items()})
            except DataError:
                builder.add([])  # said again, with its row, when the record is read
        self.picture_index = builder.done()
        if not len(self):
            raise DataError(f"{path}: no records in it")

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def origin(self, index: int) -> str:
        """ "train.parquet:17", rows counted from 0 as `datasets` counts them."""
        return self._origin(*self._groups.locate(index))

    def load(self, index: int) -> tuple[Any, Mapping[str, bytes]]:
        file, row = self._groups.locate(index)
        return _to_record(self._groups.row(file, row), self._origin(file, row))

    def _origin(self, file: int, row: int) -> str:
        return f"{self._groups.paths[file]}:{row}"


class _RowGroups:
    """Row groups of several files, decoded when asked for; the last ones are kept."""

    def __init__(self, paths: Sequence[Path]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise MissingExtraError("reading parquet files", "parquet") from None
        self.paths = tuple(paths)
        self._parquet: Any = pyarrow.parquet
        self._broken = (pyarrow.ArrowException, OSError)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._file_ends: list[int] = []
        self._group_ends: list[list[int]] = []
        self._columns: list[list[str]] = []
        rows = 0
        for path in paths:
            metadata, columns = self._describe(path)
            ends = [0]
            for number in range(metadata.num_row_groups):
                ends.append(ends[-1] + metadata.row_group(number).num_rows)
            rows += ends[-1]
            self._file_ends.append(rows)
            self._group_ends.append(ends[1:])
            self._columns.append(columns)

    def locate(self, index: int) -> tuple[int, int]:
        """(file, row in it)."""
        file = bisect_right(self._file_ends, index)
        return file, index - (self._file_ends[file - 1] if file else 0)

    def row(self, file: int, row: int) -> dict[str, Any]:
        group = bisect_right(self._group_ends[file], row)
        begin = self._group_ends[file][group - 1] if group else 0
        found: list[dict[str, Any]] = _rows_of(self._table(file, group).slice(row - begin, 1))
        if not found:
            raise DataError(f"{self.paths[file]}:{row}: a text in it is not UTF-8")
        return found[0]

    def walk(self) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        """((file, row), columns) of every row in order."""
        for file, ends in enumerate(self._group_ends):
            row = 0
            for group, end in enumerate(ends):
                table = self._table(file, group)
                begin = row
                while row < end:
                    together = table.slice(row - begin, _ROWS_AT_ONCE)
                    rows = _rows_of(together)
                    if not rows:  # one of them cannot be read: an empty row is said again when it is asked for
                        rows = [(_rows_of(together.slice(place, 1)) or [{}])[0] for place in range(len(together))]
                    for found in rows:
                        yield (file, row), found
                        row += 1

    def _describe(self, path: Path) -> tuple[Any, list[str]]:
        try:
            with self._parquet.ParquetFile(path) as opened:
                names = opened.schema_arrow.names
                metadata = opened.metadata
        except (*self._broken, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as parquet ({_first_line(error)})") from error
        columns = [name for name in _READ_COLUMNS if name in names]
        if not set(columns) & {*CONVERSATION_KEYS, *CAPTION_KEYS}:
            wanted = ", ".join((*CONVERSATION_KEYS, *CAPTION_KEYS))
            raise DataError(f"{path}: no column with conversations ({wanted}); found {', '.join(names)}")
        return metadata, columns

    def _table(self, file: int, group: int) -> Any:
        # One thread decodes at a time: two that want the same group must not both pay for it.
        with self._lock:
            key = (file, group)
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            try:
                with self._parquet.ParquetFile(self.paths[file]) as opened:
                    table = opened.read_row_group(group, columns=self._columns[file], use_threads=False)
            except self._broken as error:
                raise DataError(f"{self.paths[file]}: row group {group} is damaged ({_first_line(error)})") from error
            ends = self._group_ends[file]
            if len(table) != ends[group] - (ends[group - 1] if group else 0):
                raise DataError(f"{self.paths[file]}: row group {group} is damaged (rows are missing)")
            self._kept[key] = table
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
            return table


def _to_record(row: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A row as a record, and the pictures that lie in it by the names that the record gives them."""
    names: list[str] = []
    embedded: dict[str, bytes] = {}
    if row.get("video"):
        raise DataError(f"{origin}: 'video' is not supported; drop the row")
    value = row.get("image")
    if value is None:
        value = row.get("images")
    entries = [] if value is None else value if isinstance(value, list) else [value]
    for number, entry in enumerate(entries):
        if isinstance(entry, Mapping):
            entry = entry.get("bytes") or entry.get("path")
        if isinstance(entry, bytes):
            name = f"\0{number}"  # no path can hold this character
            embedded[name] = entry
            names.append(name)
        elif isinstance(entry, str) and entry:
            names.append(entry)
        elif entry is not None:
            raise DataError(f"{origin}: a picture must be a path, bytes or {{bytes, path}}, not {type(entry).__name__}")
    return shape_record(row, names, origin=origin), embedded


def _rows_of(table: Any) -> list[dict[str, Any]]:
    """The rows of a piece of a table; none when one of them holds a text that is not UTF-8."""
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
    except UnicodeDecodeError:
        return []
    return rows


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
