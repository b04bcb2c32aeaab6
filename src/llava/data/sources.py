"""Conversation files on disk: JSON lists and JSONL, of any record format that llava.prompt.conversation reads.

    conversations = read_conversations("mix.json", image_root="playground/data")
    conversations[17]          # parsed now; origin "mix.json:120 (record 17)"

One pass over the file finds where each record begins and which pictures it names; the text itself stays on disk, so a
file of millions of records costs a few dozen bytes a record. Picture paths are resolved under `image_root`: absolute
paths and `..` are refused (a data set from the web must not read other files). Not covered: whether the pictures exist
(data/check.py looks), compressed files, Parquet.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn, overload

from llava.errors import DataError
from llava.prompt.conversation import Conversation, from_record

_CHUNK_BYTES = 1 << 22
_SPACE = " \t\n\r"


@dataclass(frozen=True)
class RecordIndex:
    """Where the records of one file are. All arrays have one entry a record.

    starts, lengths: bytes; lines: 1-based line of the record's first character; pictures: number of the record's
    picture set in `picture_sets` (0 is the empty set); sha256: of the whole file.
    """

    starts: array[int]
    lengths: array[int]
    lines: array[int]
    pictures: array[int]
    picture_sets: tuple[tuple[str, ...], ...]
    sha256: str


class ConversationFile(Sequence[Conversation]):
    """A conversation file as a lazy sequence. Threads may read it at the same time."""

    def __init__(self, path: Path, *, image_root: Path) -> None:
        self.path = path
        self.image_root = image_root
        try:
            self._handle = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)
            self._is_lines = _looks_like_lines(os.pread(self._handle, _CHUNK_BYTES, 0))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        self.records = (_index_lines if self._is_lines else _index_list)(path)
        if not self.records.starts:
            raise DataError(f"{path}: no records in it")

    def __len__(self) -> int:
        return len(self.records.starts)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        origin = self.origin(index)
        return from_record(self.record(index), resolve_image=lambda name: self._resolve(name, origin), origin=origin)

    def record(self, index: int) -> Any:
        """The record as JSON gives it."""
        text = os.pread(self._handle, self.records.lengths[index], self.records.starts[index])
        if len(text) != self.records.lengths[index]:
            raise DataError(f"{self.path}: the file has become shorter while it was read")
        try:
            return json.loads(text)
        except ValueError as error:
            raise DataError(f"{self.origin(index)}: the file has changed while it was read ({error})") from error

    def origin(self, index: int) -> str:
        """What error texts call a record: "mix.jsonl:17", or "mix.json:120 (record 17)" in a list."""
        place = f"{self.path}:{self.records.lines[index]}"
        return place if self._is_lines else f"{place} (record {index})"

    def picture_names(self, index: int) -> tuple[str, ...]:
        """The pictures that a record names, known without reading it."""
        return self.records.picture_sets[self.records.pictures[index]]

    def first_mentions(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Each set of pictures once, with the first record that names it."""
        seen: set[int] = set()
        for record, number in enumerate(self.records.pictures):
            if number not in seen:
                seen.add(number)
                yield record, self.records.picture_sets[number]

    def _resolve(self, name: str, origin: str) -> Path:
        return resolve_image(name, self.image_root, origin=origin)


class ConversationSet(Sequence[Conversation]):
    """Several files one after the other."""

    def __init__(self, files: Sequence[ConversationFile]) -> None:
        self.files = tuple(files)
        self._ends: list[int] = []
        total = 0
        for file in files:
            total += len(file)
            self._ends.append(total)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file, inner = self.locate(index)
        return file[inner]

    def locate(self, index: int) -> tuple[ConversationFile, int]:
        """The file that holds a conversation, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self.files[number], index - (self._ends[number - 1] if number else 0)

    def group_by_picture(self, *, limit: int) -> list[tuple[int, ...]]:
        """Conversation numbers in groups of at most `limit` that name the same pictures, in order of first mention.

        A conversation without pictures is a group of its own.
        """
        groups: list[list[int]] = []
        open_group: dict[tuple[Path, tuple[str, ...]], list[int]] = {}
        start = 0
        for file in self.files:
            for inner in range(len(file)):
                names = file.picture_names(inner)
                group = open_group.get((file.image_root, names)) if names else None
                if group is None or len(group) >= limit:
                    group = []
                    groups.append(group)
                    open_group[(file.image_root, names)] = group
                group.append(start + inner)
            start += len(file)
        return [tuple(group) for group in groups]

    @property
    def fingerprint(self) -> str:
        """A digest of the files' bytes, in order."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.records.sha256.encode())
        return digest.hexdigest()


def read_conversations(path: str | Path, *, image_root: str | Path | None = None) -> ConversationFile:
    """Open a JSON list or JSONL file of conversations; pictures are under `image_root`, or beside the file.

    Raises DataError naming the file and line of what is not JSON.
    """
    path = Path(path)
    return ConversationFile(path, image_root=Path(image_root) if image_root is not None else path.parent)


def resolve_image(name: str, image_root: Path, *, origin: str) -> Path:
    """The file that a record's picture path means. Raises DataError when it would leave `image_root`."""
    pure = PurePosixPath(name.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or (pure.parts and pure.parts[0].endswith(":")) or "\0" in name:
        raise DataError(
            f"{origin}: picture {name!r} leaves the image folder {image_root}; write it relative to that folder"
        )
    return image_root / pure


def _looks_like_lines(head: bytes) -> bool:
    """JSONL begins with an object, a JSON list with a bracket, whatever the file is called."""
    return not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


class _IndexBuilder:
    def __init__(self) -> None:
        self.starts = array("q")
        self.lengths = array("q")
        self.lines = array("q")
        self.pictures = array("q")
        self.sets: dict[tuple[str, ...], int] = {(): 0}

    def add(self, record: object, *, start: int, length: int, line: int) -> None:
        self.starts.append(start)
        self.lengths.append(length)
        self.lines.append(line)
        names = _named_pictures(record)
        self.pictures.append(self.sets.setdefault(names, len(self.sets)))

    def done(self, sha256: str) -> RecordIndex:
        return RecordIndex(self.starts, self.lengths, self.lines, self.pictures, tuple(self.sets), sha256)


def _named_pictures(record: object) -> tuple[str, ...]:
    """The picture paths in a record's `image` or `images`; wrong shapes are left for the parser to refuse.

    A picture that is written out in the record (a data: URL) is named by its digest.
    """
    if not isinstance(record, Mapping):
        return ()
    value = record.get("image") or record.get("images")
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(f"data:{_digest(name)}" if name[:5].lower() == "data:" else name for name in names)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _index_lines(path: Path) -> RecordIndex:
    builder = _IndexBuilder()
    digest = hashlib.sha256()
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            body = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if body.strip():
                skipped = len(line) - len(body)
                try:
                    record = json.loads(body)
                except ValueError as error:
                    raise DataError(f"{path}:{number}: not JSON: {_json_problem(error)}") from error
                builder.add(record, start=offset + skipped, length=len(body), line=number)
            offset += len(line)
    return builder.done(digest.hexdigest())


def _index_list(path: Path) -> RecordIndex:
    """Walk a JSON list record by record with a window of the text, never the whole of it."""
    with path.open("rb") as file:
        return _walk_list(_Window(path, file))


def _walk_list(window: _Window) -> RecordIndex:
    builder = _IndexBuilder()
    decoder = json.JSONDecoder()
    window.skip_space()
    window.take("[")
    window.skip_space()
    if window.peek() == "]":
        return builder.done(window.finish())
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
    return builder.done(window.finish())


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
            except ValueError as error:
                if not self._ended:
                    self._more()
                    continue
                position = getattr(error, "pos", self._cursor)
                self._move(max(0, position - self._cursor))
                self.fail(_json_problem(error))
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


def _json_problem(error: ValueError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def iterate_origins(conversations: ConversationSet, indices: Sequence[int]) -> Iterator[str]:
    """The origins of some conversations, for messages about a step."""
    for index in indices:
        file, inner = conversations.locate(index)
        yield file.origin(inner)
