"""What every file of conversations has in common, whatever its format: a lazy sequence with names for error texts.

A record is what a format holds of one conversation, as JSON would give it; pictures that lie in the file itself
(parquet, tar shards) stand in it under a name, with their bytes beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

from llava.data.pictures import PictureFolder, PictureIndex, named_pictures
from llava.errors import DataError
from llava.prompt.conversation import (
    Conversation,
    ImageSource,
    from_llava,
    from_openai,
    from_pairs,
    from_record,
    from_sharegpt,
)

Parse = Callable[..., Conversation]

#: How a record is read; "auto" tells the others apart by the record's keys.
PARSERS: dict[str, Parse] = {
    "auto": from_record,
    "llava": from_llava,
    "pairs": from_pairs,
    "sharegpt": from_sharegpt,
    "openai": partial(from_openai, error=DataError),
}


class ConversationFile(Sequence[Conversation], ABC):
    """The conversations of one file (or of the files of one pattern), parsed when asked for. Threads may share it.

    path: as it was given; pictures: the folder that the records' picture paths begin in; picture_index: which
    records show the same pictures.
    """

    path: Path
    pictures: PictureFolder
    picture_index: PictureIndex

    def __init__(self, path: Path, *, pictures: PictureFolder, format: str = "auto") -> None:
        self.path = path
        self.pictures = pictures
        self._parse = PARSERS[format]

    @property
    def image_root(self) -> Path:
        return self.pictures.root

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of the file's content."""

    @abstractmethod
    def origin(self, index: int) -> str:
        """What error texts call a record: "mix.jsonl:17"."""

    @abstractmethod
    def load(self, index: int) -> tuple[Any, Mapping[str, bytes]]:
        """A record, and the bytes of the pictures that lie in the file under the names that the record gives them.

        Raises DataError when it cannot be read.
        """

    def __len__(self) -> int:
        return len(self.picture_index.sets)

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
        record, embedded = self.load(index)

        def find(name: str) -> ImageSource:
            return embedded[name] if name in embedded else self.pictures.open(name, origin)

        return self._parse(record, resolve_image=find, origin=origin)

    def record(self, index: int) -> Any:
        """The record as JSON gives it."""
        return self.load(index)[0]

    def picture_names(self, index: int) -> tuple[str, ...]:
        """The pictures that a record names, in order; reads the record."""
        return tuple(named_pictures(self.record(index))) if self.picture_index.sets[index] else ()

    def first_mentions(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Each set of pictures once, with the first record that names it; reads those records."""
        for record in self.picture_index.first:
            yield record, self.picture_names(record)

    def unusable(self) -> Iterator[int]:
        """Records known to be of no use before they are read: what they name is not there, or they are no JSON."""
        index = self.picture_index
        if any(index.missing):
            yield from (record for record, number in enumerate(index.sets) if index.is_missing(number))
