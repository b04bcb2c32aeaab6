"""Rows of trees as tensors: places, masks and who predicts whom."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.data.batch import PADDING_TREE, Batch, build_batch
from llava.data.packing import Branch, Tree
from llava.prompt.processor import IGNORE_LABEL


def tree(prefix: list[int], *branches: list[int], supervised: int = 1, picture: float | None = None) -> Tree:
    """A tree whose branches supervise their last `supervised` tokens."""

    def branch(ids: list[int]) -> Branch:
        labels = [IGNORE_LABEL] * (len(ids) - supervised) + ids[len(ids) - supervised :]
        return Branch(np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64))

    pixels = np.zeros((0, 3, 0, 0), np.float32) if picture is None else np.full((1, 3, 2, 2), picture, np.float32)
    sizes = () if picture is None else ((2, 2),)
    made = tuple(branch(ids) for ids in branches)
    return Tree(np.array(prefix, dtype=np.int64), made, pixels, sizes, (1,) * len(sizes))


def visible(batch: Batch, row: int, query: int) -> list[int]:
    return torch.nonzero(batch.attention_mask()[row, 0, query]).flatten().tolist()


def test_positions_in_a_branch_go_on_from_the_prefix() -> None:
    batch = build_batch([[tree([1, 2], [3, 4], [5, 6, 7]), tree([], [8, 9])]], pad_token_id=0, multiple=4)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 0, 1, 2]]
    assert batch.tree_ids.tolist() == [[0] * 7 + [1, 1] + [PADDING_TREE] * 3]
    assert batch.branch_ids.tolist() == [[0, 0, 1, 1, 2, 2, 2, 1, 1, 0, 0, 0]]
    assert batch.num_tokens == 9
    assert batch.num_conversations == 3


def test_a_branch_sees_its_prefix_and_itself_and_nothing_else() -> None:
    batch = build_batch([[tree([1, 2], [3, 4], [5, 6, 7]), tree([], [8, 9])]], pad_token_id=0, multiple=4)
    assert visible(batch, 0, 0) == [0]
    assert visible(batch, 0, 1) == [0, 1]
    assert visible(batch, 0, 3) == [0, 1, 2, 3]
    assert visible(batch, 0, 4) == [0, 1, 4]
    assert visible(batch, 0, 6) == [0, 1, 4, 5, 6]
    assert visible(batch, 0, 8) == [7, 8]
    assert visible(batch, 0, 9) == [9]
    assert visible(batch, 0, 11) == [9, 10, 11]


def test_an_answer_is_predicted_from_its_own_branch_or_from_the_end_of_its_prefix() -> None:
    rows = [[tree([1, 2], [3, 4], [5, 6, 7]), tree([1], [8], [9])], [tree([1], [2, 3])]]
    batch = build_batch(rows, pad_token_id=0, multiple=1)
    length = batch.input_ids.shape[1]
    assert batch.targets.tolist() == [4, 7, 8, 9, 3]
    assert batch.predictors.tolist() == [2, 5, 7, 7, length + 1]
    assert batch.num_answer_tokens == 5


def test_a_supervised_first_token_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="first token"):
        build_batch([[tree([], [1])]], pad_token_id=0)


def test_pictures_come_in_reading_order() -> None:
    batch = build_batch(
        [[tree([1], [2], picture=1.0), tree([], [3, 4])], [tree([1], [5], picture=2.0)]], pad_token_id=0
    )
    assert batch.pixel_values is not None
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [1.0, 2.0]
    assert batch.image_sizes == ((2, 2), (2, 2))
    assert build_batch([[tree([], [3, 4])]], pad_token_id=0).pixel_values is None


def brute_mask(batch: Batch) -> torch.Tensor:
    trees, branches = batch.tree_ids.tolist(), batch.branch_ids.tolist()
    length = len(trees[0])
    mask = torch.zeros(len(trees), 1, length, length, dtype=torch.bool)
    for row in range(len(trees)):
        for query in range(length):
            for key in range(query + 1):
                same_tree = trees[row][query] == trees[row][key]
                mask[row, 0, query, key] = same_tree and branches[row][key] in (0, branches[row][query])
    return mask


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 4), st.lists(st.integers(2, 4), min_size=1, max_size=4)), min_size=1, max_size=3
        ),
        min_size=1,
        max_size=3,
    )
)
def test_the_mask_says_what_its_definition_says(shapes: list[list[tuple[int, list[int]]]]) -> None:
    rows = [[tree([1] * prefix, *([2] * n for n in branches)) for prefix, branches in row] for row in shapes]
    batch = build_batch(rows, pad_token_id=0, multiple=4)
    assert torch.equal(batch.attention_mask(), brute_mask(batch))
    assert bool(batch.attention_mask().any(-1).all()), "a softmax row is empty"
