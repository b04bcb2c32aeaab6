"""Attention by trees against softmax with a mask, values and gradients."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from llava.model.tree_attention import TreeLayout, attend_trees, enable_tree_attention

HEADS, WIDTH = 2, 4


def lay_out(rows: list[list[tuple[int, list[int]]]]) -> tuple[np.ndarray, np.ndarray]:
    """tree_ids, branch_ids of rows of (prefix length, branch lengths), padded to the longest row and two more."""
    length = max(sum(prefix + sum(branches) for prefix, branches in row) for row in rows) + 2
    tree_ids = np.full((len(rows), length), -1, dtype=np.int64)
    branch_ids = np.zeros((len(rows), length), dtype=np.int64)
    for number, row in enumerate(rows):
        cursor = 0
        for tree, (prefix, branches) in enumerate(row):
            ends = np.cumsum([cursor + prefix, *branches])
            tree_ids[number, cursor : ends[-1]] = tree
            for branch, (start, stop) in enumerate(pairwise(ends), start=1):
                branch_ids[number, start:stop] = branch
            cursor = int(ends[-1])
    return tree_ids, branch_ids


def reference_mask(tree_ids: np.ndarray, branch_ids: np.ndarray) -> Tensor:
    trees, branches = torch.from_numpy(tree_ids), torch.from_numpy(branch_ids)
    same = trees[:, :, None] == trees[:, None, :]
    near = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    return (same & near & torch.ones(same.shape[1:], dtype=torch.bool).tril())[:, None]


def random_inputs(shape: tuple[int, int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (shape[0], HEADS, shape[1], WIDTH)
    return [torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]


TREES = st.tuples(st.integers(0, 6), st.lists(st.integers(1, 7), min_size=1, max_size=5))


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.lists(TREES, min_size=1, max_size=3), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_values_and_gradients_equal_softmax_with_the_mask(rows: list[list[tuple[int, list[int]]]], seed: int) -> None:
    tree_ids, branch_ids = lay_out(rows)
    real = torch.from_numpy(tree_ids >= 0)[:, None, :, None]
    query, key, value = random_inputs(tree_ids.shape, seed)
    weight = torch.randn(query.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)) * real
    mask = reference_mask(tree_ids, branch_ids)
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.7)
    wanted = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    made = attend_trees(query, key, value, TreeLayout.from_ids(tree_ids, branch_ids), scale=0.7)
    got = torch.autograd.grad((made * weight).sum(), (query, key, value))
    torch.testing.assert_close(made * real, expected * real)
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left * real, right * real)


def test_padding_is_zero_and_takes_no_gradient() -> None:
    tree_ids, branch_ids = lay_out([[(2, [3])], [(0, [1])]])
    query, key, value = random_inputs(tree_ids.shape, 0)
    made = attend_trees(query, key, value, TreeLayout.from_ids(tree_ids, branch_ids), scale=1.0)
    padding = torch.from_numpy(tree_ids < 0)
    assert not made.transpose(1, 2)[padding].any()
    made.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert not tensor.grad.transpose(1, 2)[padding].any()


def test_bfloat16_is_as_near_to_the_truth_as_sdpa() -> None:
    tree_ids, branch_ids = lay_out([[(20, [9, 14, 11]), (5, [30])]])
    exact = [tensor.detach() for tensor in random_inputs(tree_ids.shape, 3)]
    rounded = [tensor.bfloat16() for tensor in exact]
    mask = reference_mask(tree_ids, branch_ids)
    truth = functional.scaled_dot_product_attention(*exact, attn_mask=mask)
    theirs = functional.scaled_dot_product_attention(*rounded, attn_mask=mask)
    ours = attend_trees(*rounded, TreeLayout.from_ids(tree_ids, branch_ids), scale=WIDTH**-0.5)
    assert ours.dtype == torch.bfloat16
    real = torch.from_numpy(tree_ids >= 0)[:, None, :, None]
    error = ((ours - truth) * real).abs().max()
    assert error < 3 * ((theirs - truth) * real).abs().max() + 1e-3


def test_long_and_short_branches_lie_in_buckets_of_their_own() -> None:
    layout = TreeLayout.from_ids(*lay_out([[(3, [20, 19, 4, 5, 4])]]))
    assert [tuple(bucket.shape) for bucket in layout.branches] == [(2, 20), (3, 5)]
    assert [tuple(bucket.shape) for bucket in layout.trees] == [(1, 55)]


@pytest.mark.parametrize(
    ("changes", "able"),
    [
        ({}, True),
        ({"attention_dropout": 0.1}, False),
        ({"sliding_window": 8, "model_type": "mistral"}, False),
        ({"sliding_window": 8, "use_sliding_window": False, "model_type": "qwen2"}, True),
        ({"_attn_implementation": "eager"}, False),
        ({"model_type": "mpt"}, False),
    ],
)
def test_a_family_that_cannot_attend_by_trees_says_no(changes: dict[str, object], able: bool) -> None:
    class Config:
        model_type = "llama"
        _attn_implementation = "sdpa"

    class Model(torch.nn.Module):
        config = Config()

    for name, value in changes.items():
        setattr(Model.config, name, value)
    assert enable_tree_attention(Model()) is able
