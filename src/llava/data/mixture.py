"""Sources mixed with weights: how often an epoch reads each conversation, as a function of the seed and the epoch.

Each source is read as an endless sequence of shuffled passes over it; an epoch takes the next `weight * conversations`
of that sequence. So weight 2 reads each conversation twice an epoch, .25 another quarter in each of four epochs, and 1
each once; over the epochs no conversation is read more than once more often than another of its source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from llava.data.grouping import Groups, group_by_picture
from llava.data.sources import ConversationSet, read_conversations
from llava.errors import DataError
from llava.prompt.fetch import Fetcher


@dataclass(frozen=True)
class SourceSpec:
    """A source of a mixture: file or pattern, its format, the folder of its pictures (None: its own), its weight."""

    file: str
    format: str = "auto"
    images: str | None = None
    weight: float = 1.0


class Mixture:
    """The groups of each epoch. limit: conversations on the same pictures that go together, over all sources."""

    def __init__(
        self, conversations: ConversationSet, *, limit: int, seed: int, weights: Sequence[float] | None = None
    ) -> None:
        weights = [1.0] * len(conversations.files) if weights is None else weights
        assert len(weights) == len(conversations.files), "one weight a source"
        self.limit = limit
        self._seed = seed
        self._weights = [Fraction(str(weight)) for weight in weights]
        self._sizes = [len(file) for file in conversations.files]
        self._pictures = conversations.picture_numbers()
        self._same_each_epoch = all(weight == 1 for weight in self._weights)
        self._last: tuple[int, Groups] | None = None
        if not self._same_each_epoch and not any(self._count(source, 0) for source in range(len(self._sizes))):
            raise DataError("an epoch of this mixture holds no conversation; raise the weights in data.sources")

    def in_epoch(self, epoch: int) -> Groups:
        """The groups of an epoch, not shuffled. Copies of a conversation in an epoch are in different groups."""
        if self._same_each_epoch:
            epoch = 0
        last = self._last
        if last is not None and last[0] == epoch:
            return last[1]
        times = self.times(epoch)
        parts = []
        for copy in range(int(times.max(initial=0))):
            numbers = np.flatnonzero(times > copy)
            parts.append(group_by_picture(numbers, self._pictures[numbers], limit=self.limit))
        groups = Groups.joined(parts)
        self._last = (epoch, groups)
        return groups

    def times(self, epoch: int) -> NDArray[np.int64]:
        """(conversations,) how often an epoch reads each."""
        return np.concatenate([self._times_of(source, epoch) for source in range(len(self._sizes))])

    def _count(self, source: int, epoch: int) -> int:
        share = self._weights[source] * self._sizes[source]
        return math.floor((epoch + 1) * share) - math.floor(epoch * share)

    def _times_of(self, source: int, epoch: int) -> NDArray[np.int64]:
        size, share = self._sizes[source], self._weights[source] * self._sizes[source]
        times = np.zeros(size, dtype=np.int64)
        begin, end = math.floor(epoch * share), math.floor((epoch + 1) * share)
        while begin < end:
            shuffle, place = divmod(begin, size)
            stop = min(size, place + end - begin)
            if stop - place == size:
                times += 1
            else:
                times[self._pass(source, shuffle)[place:stop]] += 1
            begin += stop - place
        return times

    def _pass(self, source: int, number: int) -> NDArray[np.int64]:
        """One shuffled pass over a source. The key's second word keeps it apart from the epochs' own order."""
        key = np.array([self._seed, source + 1], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=number)).permutation(self._sizes[source])


def open_sources(sources: Sequence[SourceSpec], *, allow_urls: bool = False) -> ConversationSet:
    """Open every source of a mixture. Raises DataError when one is not there or not what it should be."""
    fetcher = Fetcher() if allow_urls else None
    return ConversationSet(
        [
            read_conversations(source.file, image_root=source.images, format=source.format, fetcher=fetcher)
            for source in sources
        ]
    )
