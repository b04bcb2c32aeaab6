"""Opening data sets: files of conversations in any format, and several of them as one sequence.

    conversations = read_conversations("mix.json", image_root="playground/data")
    conversations[17]          # parsed now; origin "mix.json:120 (record 17)"

What a file is, is decided by its first bytes, never by its name: a JSON list, JSONL, parquet, or tar shards.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from llava.data.grouping import Groups, group_by_picture
from llava.data.json_files import JsonFile
from llava.data.parquet import ParquetFile
from llava.data.patterns import expand_pattern, is_pattern
from llava.data.pictures import PictureFolder
from llava.data.pictures import resolve_image as resolve_image
from llava.data.records import PARSERS, ConversationFile
from llava.data.shards import ShardFile
from llava.errors import DataError, name_nearest
from llava.prompt.conversation import Conversation
from llava.prompt.fetch import Fetcher

#: What a source's `format` may be: a record format of JSON files, or the kind of file.
FORMATS = (*PARSERS, "parquet", "webdataset")


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

    def origin(self, index: int) -> str:
        """What error texts call a conversation."""
        file, inner = self.locate(index)
        return file.origin(inner)

    def picture_numbers(self) -> NDArray[np.uint32]:
        """(conversations,) equal for those that show the same pictures, in whichever file; 0 for those without."""
        numbers: dict[bytes, int] = {}
        found = []
        for file in self.files:
            index = file.picture_index
            known = [0] + [
                numbers.setdefault(index.key(number), len(numbers) + 1) for number in range(1, len(index.first) + 1)
            ]
            found.append(np.array(known, dtype=np.uint32)[np.frombuffer(index.sets, dtype=np.uint32)])
        return np.concatenate(found) if found else np.zeros(0, dtype=np.uint32)

    def group_by_picture(self, *, limit: int) -> Groups:
        """Conversation numbers in groups of at most `limit` that name the same pictures, in order of first mention.

        A conversation without pictures is a group of its own.
        """
        return group_by_picture(np.arange(len(self)), self.picture_numbers(), limit=limit)

    def unusable(self) -> Iterator[int]:
        """Conversations known to be of no use before any is read."""
        start = 0
        for file in self.files:
            yield from (start + inner for inner in file.unusable())
            start += len(file)

    @property
    def fingerprint(self) -> str:
        """A digest of the files' content, in order."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.fingerprint.encode())
        return digest.hexdigest()


def read_conversations(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    format: str = "auto",
    fetcher: Fetcher | None = None,
) -> ConversationFile:
    """Open a file of conversations; pictures are under `image_root`, or beside the file.

    path: a file, or for parquet and tar shards a pattern (`shards/{000..127}.tar`, `part-*.parquet`). format: one of
    FORMATS; "auto" looks at the first bytes. fetcher: gets pictures from web addresses (None: they are refused).
    Raises DataError naming the file (and line) that is not there, or not what it should be.
    """
    if format not in FORMATS:
        raise DataError(f"{path}: unknown format {format!r}; {name_nearest(format, FORMATS)}")
    path = Path(path)
    pictures = PictureFolder(Path(image_root) if image_root is not None else _folder_of(path), fetcher=fetcher)
    paths = expand_pattern(str(path))
    kind = _kind_of(paths[0]) if format in PARSERS else format
    if kind == "parquet":
        return ParquetFile(path, paths, pictures=pictures)
    if kind == "webdataset":
        return ShardFile(path, paths, pictures=pictures, format=format if format in PARSERS else "auto")
    if len(paths) > 1 or paths[0] != path:
        raise DataError(f"{path}: a pattern of JSON files; name each in data.files")
    return JsonFile(path, pictures=pictures, format=format)


def iterate_origins(conversations: ConversationSet, indices: Sequence[int]) -> Iterator[str]:
    """The origins of some conversations, for messages about a step."""
    for index in indices:
        yield conversations.origin(index)


def _kind_of(path: Path) -> str:
    """parquet, webdataset or json, by the first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar":
        return "webdataset"
    packed = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"PK\x03\x04": "zip"}
    for magic, name in packed.items():
        if head.startswith(magic):
            raise DataError(f"{path}: packed with {name}; unpack it first, records are read in any order")
    return "json"


def _folder_of(path: Path) -> Path:
    """The folder of a file; of a pattern, its last folder without a wildcard."""
    folder = path.parent
    while is_pattern(str(folder)):
        folder = folder.parent
    return folder
