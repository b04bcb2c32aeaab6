"""Trees and rows: nothing is lost, nothing is shared that should not be."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llava.data.packing import Tree, fit_rows, grow_trees
from llava.prompt.processor import IGNORE_LABEL, Encoded

IMAGE = 9


def encoded(ids: list[int], answers: set[int] = frozenset(), *, picture: float = 0.0) -> Encoded:  # type: ignore[assignment]
    """A conversation; `answers` are the supervised positions."""
    tokens = np.array(ids, dtype=np.int64)
    labels = np.array([t if i in answers else IGNORE_LABEL for i, t in enumerate(ids)], dtype=np.int64)
    if IMAGE not in ids:
        return Encoded(tokens, labels)
    pixels = np.full((1, 3, 2, 2), picture, dtype=np.float32)
    return Encoded(tokens, labels, pixels, ((2, 2),), (1,), (ids.count(IMAGE),))


def unfold(trees: list[Tree]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every conversation in the trees."""
    return [
        (
            [*tree.prefix_ids.tolist(), *branch.input_ids.tolist()],
            [IGNORE_LABEL] * len(tree.prefix_ids) + branch.labels.tolist(),
        )
        for tree in trees
        for branch in tree.branches
    ]


def test_conversations_on_one_picture_share_everything_up_to_the_first_difference() -> None:
    trees = grow_trees(
        [encoded([1, IMAGE, IMAGE, 3, 4, 5], {5}), encoded([1, IMAGE, IMAGE, 3, 6, 7, 8], {5, 6})],
        image_token_id=IMAGE,
        max_tokens=100,
    )
    assert len(trees) == 1
    assert trees[0].prefix_ids.tolist() == [1, IMAGE, IMAGE, 3]
    assert [b.input_ids.tolist() for b in trees[0].branches] == [[4, 5], [6, 7, 8]]
    assert trees[0].num_tokens == 9
    assert trees[0].num_answer_tokens == 3


def test_a_supervised_token_is_never_shared() -> None:
    trees = grow_trees(
        [encoded([1, IMAGE, 3, 4], {2, 3}), encoded([1, IMAGE, 3, 5], {2, 3})], image_token_id=IMAGE, max_tokens=100
    )
    assert trees[0].prefix_ids.tolist() == [1, IMAGE]
    assert trees[0].num_answer_tokens == 4


def test_two_equal_conversations_keep_a_branch_each() -> None:
    trees = grow_trees([encoded([1, IMAGE, 3]), encoded([1, IMAGE, 3])], image_token_id=IMAGE, max_tokens=100)
    assert [b.input_ids.tolist() for b in trees[0].branches] == [[3], [3]]


def test_a_picture_after_the_first_difference_is_not_shared() -> None:
    trees = grow_trees([encoded([1, 2, IMAGE, 3]), encoded([1, 4, IMAGE, 3])], image_token_id=IMAGE, max_tokens=100)
    assert [len(tree.prefix_ids) for tree in trees] == [0, 0]
    assert [len(tree.pixel_values) for tree in trees] == [1, 1]


def test_a_tree_that_grows_too_long_is_split_and_the_prefix_repeated() -> None:
    conversations = [encoded([1, IMAGE, 10 + i, 20 + i], {3}) for i in range(5)]
    trees = grow_trees(conversations, image_token_id=IMAGE, max_tokens=6)
    assert [len(tree.branches) for tree in trees] == [2, 2, 1]
    assert all(tree.num_tokens <= 6 for tree in trees)
    assert unfold(trees) == [(c.input_ids.tolist(), c.labels.tolist()) for c in conversations]


def test_a_lone_conversation_is_a_tree_without_a_prefix() -> None:
    (tree,) = grow_trees([encoded([1, IMAGE, 3], {2})], image_token_id=IMAGE, max_tokens=2)
    assert len(tree.prefix_ids) == 0
    assert tree.branches[0].input_ids.tolist() == [1, IMAGE, 3]


@given(
    tails=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=6), min_size=1, max_size=6),
    head=st.integers(0, 4),
    max_tokens=st.integers(1, 30),
    supervise_from=st.integers(1, 8),
)
def test_growing_trees_loses_no_token_and_no_label(
    tails: list[list[int]], head: int, max_tokens: int, supervise_from: int
) -> None:
    conversations = [
        encoded([1] + [IMAGE] * head + tail, set(range(max(supervise_from, head + 1), head + 1 + len(tail))))
        for tail in tails
    ]
    trees = grow_trees(conversations, image_token_id=IMAGE, max_tokens=max_tokens)
    assert unfold(trees) == [(c.input_ids.tolist(), c.labels.tolist()) for c in conversations]
    for tree in trees:
        assert tree.num_tokens <= max_tokens or len(tree.branches) == 1
        assert all(len(branch.input_ids) for branch in tree.branches)


@given(lengths=st.lists(st.integers(1, 50), max_size=40), capacity=st.integers(1, 60))
def test_every_item_lies_in_one_row_and_rows_keep_their_capacity(lengths: list[int], capacity: int) -> None:
    rows = fit_rows(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[item] for item in row) <= capacity or len(row) == 1


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_no_two_rows_could_have_been_one(lengths: list[int]) -> None:
    rows = fit_rows(lengths, 50)
    filled = sorted(sum(lengths[item] for item in row) for row in rows)
    assert len(filled) < 2 or filled[0] + filled[1] > 50


def test_best_fit_takes_the_tightest_row() -> None:
    assert fit_rows([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]
