"""Conversations on the same pictures in groups, as arrays: some 12 bytes a conversation, a second for millions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

Group = tuple[int, ...]


class Groups(Sequence[Group]):
    """Groups of conversation numbers: `members` one after the other, group g from bounds[g] to bounds[g + 1]."""

    def __init__(self, members: NDArray[np.int64], bounds: NDArray[np.int64]) -> None:
        self._members = members
        self._bounds = bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        return tuple(self._members[self._bounds[index] : self._bounds[index + 1]].tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(groups,) conversations in each."""
        return np.diff(self._bounds)

    @staticmethod
    def joined(parts: Sequence[Groups]) -> Groups:
        """The groups of several, one after the other."""
        if len(parts) == 1:
            return parts[0]
        sizes = np.concatenate([part.sizes for part in parts])
        return Groups(np.concatenate([part._members for part in parts]), np.append(0, np.cumsum(sizes)))


def group_by_picture(numbers: NDArray[np.int64], pictures: NDArray[np.uint32], *, limit: int) -> Groups:
    """Groups of at most `limit` of these conversations that show the same pictures, in order of their first member.

    numbers: (n,) conversation numbers in reading order; pictures: (n,) equal for the same pictures, 0 for none (a group
    of its own).
    """
    count = len(numbers)
    if not count:
        return Groups(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    together = np.argsort(pictures, kind="stable")
    picture = pictures[together]
    begins_run = np.ones(count, dtype=bool)
    begins_run[1:] = (picture[1:] != picture[:-1]) | (picture[1:] == 0)
    place = np.arange(count)
    rank_in_run = place - np.maximum.accumulate(np.where(begins_run, place, 0))
    begins = rank_in_run % limit == 0
    group_of = np.cumsum(begins) - 1
    order = np.argsort(together[begins], kind="stable")  # groups by the place of their first member
    place_of_group = np.empty(len(order), dtype=np.int64)
    place_of_group[order] = np.arange(len(order))
    members = together[np.argsort(place_of_group[group_of], kind="stable")]
    sizes = np.bincount(group_of)[order]
    return Groups(np.asarray(numbers, dtype=np.int64)[members], np.append(0, np.cumsum(sizes)))
