"""Beginnings read before: keys and values of template, picture and earlier turns, for whoever asks on from there.

An entry is what a decoder computed for a sequence of tokens and pictures. A new prompt uses the entry that agrees with
it longest, as far as it agrees; so the second turn of a chat, a question taken back, another user's question on the
same picture all read only what is new. Agreement is decided token by token, and for a picture by its pixels, so a reply
that tokenises differently the second time shortens the reuse and never changes an answer.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Fewer tokens than this are read faster than looked up.
MIN_TOKENS = 16
# Entries are compared one by one; beyond this many the search would be felt.
_MAX_ENTRIES = 512


@dataclass(frozen=True, eq=False)
class Stored:
    """Keys and values of the first `length` tokens of some sequence, as a decoder gave them out (`Decoder.keep`).

    state is the decoder's own; another decoder cannot read it. nbytes: the memory that it holds.
    """

    state: Any
    length: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class _Entry:
    content: NDArray[np.int64]
    stored: Stored


class PrefixCache:
    """Stored beginnings up to a number of bytes; the one not used for the longest time goes first."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._numbers = count()
        self.nbytes = 0
        self.hit_tokens = 0
        """Prompt tokens that did not have to be read again, since the cache was made."""

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, content: NDArray[np.int64], *, limit: int) -> tuple[Stored, int] | None:
        """The entry that agrees longest with a prompt's content, and for how many tokens (at most `limit`)."""
        best, best_length = None, MIN_TOKENS - 1
        for number, entry in self._entries.items():
            length = agreement(entry.content, content[:limit])
            if length > best_length:
                best, best_length = number, length
        if best is None:
            return None
        self._entries.move_to_end(best)
        return self._entries[best].stored, best_length

    def wants(self, content: NDArray[np.int64]) -> bool:
        """Whether storing a sequence with this content would add something."""
        if len(content) < MIN_TOKENS or self._max_bytes <= 0:
            return False
        return all(agreement(entry.content, content) < len(content) for entry in self._entries.values())

    def store(self, content: NDArray[np.int64], stored: Stored) -> None:
        """Keep a sequence. Entries that are a beginning of it go: they would never be the longest again."""
        assert stored.length == len(content), "an entry holds one column a token"
        if stored.nbytes > self._max_bytes:
            return
        for number, entry in list(self._entries.items()):
            if agreement(entry.content, content) == len(entry.content):
                self._drop(number)
        self._entries[next(self._numbers)] = _Entry(content, stored)
        self.nbytes += stored.nbytes
        while self.nbytes > self._max_bytes or len(self._entries) > _MAX_ENTRIES:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        self._entries.clear()
        self.nbytes = 0

    def _drop(self, number: int) -> None:
        self.nbytes -= self._entries.pop(number).stored.nbytes


def content_of(
    input_ids: NDArray[np.int64], picture_keys: Sequence[bytes], rows_per_picture: Sequence[int], *, image_token_id: int
) -> NDArray[np.int64]:
    """Token ids in which each placeholder is replaced by a negative number that stands for its picture's feature row.

    Two prompts with equal content have equal tokens and equal pictures. picture_keys: one a picture, in the order of
    the placeholders; rows_per_picture: how many placeholders each has.
    """
    content = np.array(input_ids, dtype=np.int64)
    places = np.flatnonzero(content == image_token_id)
    assert len(places) == sum(rows_per_picture), "placeholders and feature rows differ"
    start = 0
    for key, rows in zip(picture_keys, rows_per_picture, strict=True):
        digest = hashlib.blake2b(key, digest_size=8).digest()
        # Rows of one picture follow each other, so that a picture agrees with itself from its first row only.
        first = int.from_bytes(digest, "little") >> 2
        content[places[start : start + rows]] = -1 - ((first + np.arange(rows)) & ((1 << 62) - 1))
        start += rows
    return content


def agreement(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """How many first numbers two sequences have in common."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
