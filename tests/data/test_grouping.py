"""Groups by picture, against the plain loop that says the same."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llava.data.grouping import Groups, group_by_picture


def plainly(numbers: list[int], pictures: list[int], limit: int) -> list[tuple[int, ...]]:
    groups: list[list[int]] = []
    open_group: dict[int, list[int]] = {}
    for number, picture in zip(numbers, pictures, strict=True):
        group = open_group.get(picture) if picture else None
        if group is None or len(group) >= limit:
            group = []
            groups.append(group)
            open_group[picture] = group
        group.append(number)
    return [tuple(group) for group in groups]


@given(pictures=st.lists(st.integers(0, 5), max_size=40), limit=st.integers(1, 5), start=st.integers(0, 3))
def test_groups_are_those_of_the_plain_loop(pictures: list[int], limit: int, start: int) -> None:
    numbers = [start + 2 * i for i in range(len(pictures))]
    groups = group_by_picture(np.array(numbers, dtype=np.int64), np.array(pictures, dtype=np.uint32), limit=limit)
    assert list(groups) == plainly(numbers, pictures, limit)
    assert groups.sizes.tolist() == [len(group) for group in groups]


def test_groups_are_a_sequence() -> None:
    groups = Groups(np.array([3, 1, 2]), np.array([0, 1, 3]))
    assert (groups[0], groups[-1], groups[:1]) == ((3,), (1, 2), [(3,)])
    assert groups == [(3,), (1, 2)]
    assert list(Groups.joined([groups, groups])) == [(3,), (1, 2), (3,), (1, 2)]
    assert type(groups[1][0]) is int
