"""JSON lists and JSONL: one pass finds where each record begins; the text itself stays on disk.

A file of millions of records costs some 30 bytes a record. A broken line of a JSONL file is a broken record, refused
when it is read; a broken list cannot be read on from the break, so it is refused as a whole, with the line.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from llava.data.pictures import PictureFolder, PictureIndexBuilder, named_pictures
from llava.data.records import ConversationFile
from llava.errors import DataError

_CHUNK_BYTES = 1 << 22
_SPACE = " \t\n\r"
_BOM = b"\xef\xbb\xbf"
# So many broken lines and no good one: this is no JSONL, and reading on would take as long as the file is large.
_HOPELESS_LINES = 100


@dataclass
class RecordPlaces:
    """Where the records are: byte of the start, bytes, 1-based line; one entry a record. broken: which are no JSON."""

    starts: array[int] = field(default_factory=lambda: array("q"))
    lengths: array[int] = field(default_factory=lambda: array("q"))
    lines: array[int] = field(default_factory=lambda: array("I"))
    broken: array[int] = field(default_factory=lambda: array("I"))


class JsonFile(ConversationFile):
    """A JSON list or JSONL file."""

    def __init__(self, path: Path, *, pictures: PictureFolder, format: str = "auto") -> None:
        super().__init__(path, pictures=pictures, format=format)
        builder = _Builder(pictures)
        try:
            self._handle = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)
            self._is_lines = _looks_like_lines(os.pread(self._handle, _CHUNK_BYTES, 0))
            self._fingerprint = (_index_lines if self._is_lines else _index_list)(path, builder)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        self.picture_index = builder.pictures.done()
        self._places = builder.places
        if not len(self):
            raise DataError(f"{path}: no records in it")

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def origin(self, index: int) -> str:
        """ "mix.jsonl:17", or "mix.json:120 (record 17)" in a list."""
        place = f"{self.path}:{self._places.lines[index]}"
        return place if self._is_lines else f"{place} (record {index})"

    def load(self, index: int) -> tuple[Any, Mapping[str, bytes]]:
        wanted = self._places.lengths[index]
        try:
            text = os.pread(self._handle, wanted, self._places.starts[index])
        except OSError as error:
            raise DataError(f"{self.origin(index)}: cannot be read ({error.strerror})") from error
        if len(text) != wanted:
            raise DataError(f"{self.origin(index)}: the file has become shorter while it was read")
        try:
            return json.loads(text), {}
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.origin(index)}: not JSON: {_problem(error)}") from error

    def unusable(self) -> Iterator[int]:
        yield from self._places.broken
        yield from super().unusable()


class _Builder:
    def __init__(self, pictures: PictureFolder) -> None:
        self.places = RecordPlaces()
        self.pictures = PictureIndexBuilder(pictures)

    def add(self, record: object, *, start: int, length: int, line: int) -> None:
        self.places.starts.append(start)
        self.places.lengths.append(length)
        self.places.lines.append(line)
        self.pictures.add(named_pictures(record))

    def add_broken(self, *, start: int, length: int, line: int) -> None:
        self.places.broken.append(len(self.places.starts))
        self.add(None, start=start, length=length, line=line)


def _looks_like_lines(head: bytes) -> bool:
    """JSONL begins with an object, a JSON list with a bracket, whatever the file is called."""
    return not head.removeprefix(_BOM).lstrip().startswith(b"[")


def _index_lines(path: Path, builder: _Builder) -> str:
    """Fill the builder; returns the file's sha256."""
    digest = hashlib.sha256()
    offset = 0
    first_problem = ""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            body = line.removeprefix(_BOM) if number == 1 else line
            if body.strip():
                place = {"start": offset + len(line) - len(body), "length": len(body), "line": number}
                try:
                    builder.add(json.loads(body), **place)
                except (ValueError, RecursionError) as error:
                    builder.add_broken(**place)
                    first_problem = first_problem or f"{path}:{number}: not JSON: {_problem(error)}"
                    if len(builder.places.broken) == len(builder.places.starts) == _HOPELESS_LINES:
                        break
            offset += len(line)
    if first_problem and len(builder.places.broken) == len(builder.places.starts):
        raise DataError(first_problem)
    return digest.hexdigest()


def _index_list(path: Path, builder: _Builder) -> str:
    """Walk a JSON list record by record with a window of the text, never the whole of it; returns the file's sha256."""
    with path.open("rb") as file:
        return _walk_list(_Window(path, file), builder)


def _walk_list(window: _Window, builder: _Builder) -> str:
    decoder = json.JSONDecoder()
    window.skip_space()
    window.take("[")
    window.skip_space()
    if window.peek() == "]":
        return window.finish()
    while True:
        start, line = window.byte, window.line
        record = window.decode(decoder)
        builder.add(record, start=start, length=window.byte - start, line=line)
        window.skip_space()
        if window.peek() == "]":
            window.take("]")
            break
        window.take(",")
        window.skip_space()
    window.skip_space()
    if window.peek():
        window.fail("the list has ended, but text goes on")
    return window.finish()


class _Window:
    """A moving window over a UTF-8 file that knows the byte and line of its cursor."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._digest = hashlib.sha256()
        self._text = ""
        self._cursor = 0
        self._tail = b""  # bytes of a character that the last chunk cut
        self._ended = False
        self.byte = 0
        self.line = 1
        self._more()
        if self._text.startswith("\ufeff"):
            self._move(1)

    def peek(self) -> str:
        while self._cursor >= len(self._text) and not self._ended:
            self._more()
        return self._text[self._cursor : self._cursor + 1]

    def take(self, wanted: str) -> None:
        found = self.peek()
        if found != wanted:
            self.fail(f"expected {wanted!r}, found {found or 'the end of the file'!r}")
        self._move(1)

    def skip_space(self) -> None:
        while (char := self.peek()) and char in _SPACE:
            end = self._cursor
            while end < len(self._text) and self._text[end] in _SPACE:
                end += 1
            self._move(end - self._cursor)

    def decode(self, decoder: json.JSONDecoder) -> object:
        """Decode one value at the cursor; reads on while the value is cut by the window's end."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._cursor)
            except RecursionError as error:
                self.fail(_problem(error))
            except ValueError as error:
                if not self._ended:
                    self._more()
                    continue
                position = getattr(error, "pos", self._cursor)
                self._move(max(0, position - self._cursor))
                self.fail(_problem(error))
            # A number at the window's very end may go on in the next chunk.
            if end == len(self._text) and not self._ended:
                self._more()
                continue
            self._move(end - self._cursor)
            return value

    def finish(self) -> str:
        while not self._ended:
            self._more()
        return self._digest.hexdigest()

    def fail(self, problem: str) -> NoReturn:
        raise DataError(f"{self.path}:{self.line}: not a JSON list of records: {problem}")

    def _move(self, count: int) -> None:
        passed = self._text[self._cursor : self._cursor + count]
        self._cursor += count
        self.byte += count if passed.isascii() else len(passed.encode())
        self.line += passed.count("\n")

    def _more(self) -> None:
        # A record longer than the window doubles it, so that long records do not cost the square of their length.
        chunk = self._file.read(max(_CHUNK_BYTES, len(self._text) - self._cursor))
        self._ended = not chunk
        self._digest.update(chunk)
        data = self._tail + chunk
        self._tail = b""
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            if self._ended or error.end < len(data) - 3 or error.reason != "unexpected end of data":
                self.line += data[: error.start].count(b"\n") + self._text[self._cursor :].count("\n")
                self.fail(f"byte {data[error.start]:#04x} is not UTF-8")
            text, self._tail = data[: error.start].decode(), data[error.start :]
        self._text = self._text[self._cursor :] + text
        self._cursor = 0


def _problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)
