"""Attention by trees against softmax with a mask, values and gradients."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from llava.model import tree_attention
from llava.model.tree_attention import TreeLayout, attend_trees
from llava.model.tree_kernels import attend_blocked, attend_flash, attend_varlen

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


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """What torch documents of varlen_attn, sequence by sequence: causal with the last query against the last key."""
    assert query_bounds.dtype == key_bounds.dtype == torch.int32
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(query_bounds.tolist()), pairwise(key_bounds.tolist()), strict=True):
        q, k, v = query[q0:q1].transpose(0, 1), key[k0:k1].transpose(0, 1), value[k0:k1].transpose(0, 1)
        assert q.shape[1] <= max_q and k.shape[1] <= max_k
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
        behind = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
        seen = behind >= 0 if window_size[0] < 0 else (behind >= 0) & (behind <= window_size[0])
        weights = torch.softmax((q @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf")), -1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


KERNELS = {"blocked": attend_blocked, "flash": attend_flash, "varlen": partial(attend_varlen, kernel=varlen_reference)}


def check_against_mask(kernel: str, rows: list[list[tuple[int, list[int]]]], seed: int, window: int | None) -> None:
    tree_ids, branch_ids = lay_out(rows)
    real = torch.from_numpy(tree_ids >= 0)[:, None, :, None]
    query, key, value = random_inputs(tree_ids.shape, seed)
    weight = torch.randn(query.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)) * real
    mask = reference_mask(tree_ids, branch_ids)
    layout = TreeLayout.from_ids(tree_ids, branch_ids)
    if window is not None:
        positions = torch.from_numpy(positions_of(rows, tree_ids.shape))
        mask &= ((positions[:, :, None] - positions[:, None, :]) < window)[:, None]
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.7)
    wanted = torch.autograd.grad((expected.nan_to_num() * weight).sum(), (query, key, value))
    options = {} if window is None else {"window": window}
    made = KERNELS[kernel](query, key, value, layout, scale=0.7, **options)
    got = torch.autograd.grad((made * weight).sum(), (query, key, value))
    torch.testing.assert_close(made * real, expected.nan_to_num() * real)
    assert not (made * ~real).any()
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left * real, right * real)


def positions_of(rows: list[list[tuple[int, list[int]]]], shape: tuple[int, int]) -> np.ndarray:
    positions = np.zeros(shape, dtype=np.int64)
    for number, row in enumerate(rows):
        flat = [p for pre, lengths in row for p in (*range(pre), *(pre + i for n in lengths for i in range(n)))]
        positions[number, : len(flat)] = flat
    return positions


ROWS = st.lists(st.lists(TREES, min_size=1, max_size=3), min_size=1, max_size=3)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=30)
@given(rows=ROWS, seed=st.integers(0, 99))
def test_every_kernel_gives_the_values_and_gradients_of_softmax_with_the_mask(
    kernel: str, rows: list[list[tuple[int, list[int]]]], seed: int
) -> None:
    check_against_mask(kernel, rows, seed, window=None)


@pytest.mark.parametrize("kernel", ["blocked", "varlen"])
@settings(deadline=None, max_examples=20)
@given(rows=ROWS, seed=st.integers(0, 99), window=st.integers(1, 9))
def test_a_sliding_window_counts_positions_not_columns(
    kernel: str, rows: list[list[tuple[int, list[int]]]], seed: int, window: int
) -> None:
    check_against_mask(kernel, rows, seed, window)


def test_fewer_key_heads_than_query_heads() -> None:
    tree_ids, branch_ids = lay_out([[(3, [2, 4]), (0, [5])]])
    layout = TreeLayout.from_ids(tree_ids, branch_ids)
    query, key, value = random_inputs(tree_ids.shape, 0)
    key, value = key[:, :1], value[:, :1]
    expected = attend_trees(query, key.repeat(1, HEADS, 1, 1), value.repeat(1, HEADS, 1, 1), layout, scale=1.0)
    torch.testing.assert_close(attend_trees(query, key, value, layout, scale=1.0), expected)
    torch.testing.assert_close(attend_varlen(query, key, value, layout, scale=1.0, kernel=varlen_reference), expected)


def test_the_varlen_kernel_of_an_older_torch_is_called_as_it_wants() -> None:
    """2.10: is_causal instead of a window, no scale, no grouped heads."""

    def older(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, c: int, d: int, is_causal: bool = False) -> Tensor:
        assert is_causal and q.shape[1] == k.shape[1]
        return varlen_reference(q, k, v, a, b, c, d, scale=WIDTH**-0.5, window_size=(-1, 0))

    tree_ids, branch_ids = lay_out([[(3, [2, 4]), (0, [5])]])
    layout = TreeLayout.from_ids(tree_ids, branch_ids)
    query, key, value = random_inputs(tree_ids.shape, 0)
    expected = attend_varlen(query, key[:, :1], value[:, :1], layout, scale=0.3, kernel=varlen_reference)
    made = attend_varlen(query, key[:, :1], value[:, :1], layout, scale=0.3, kernel=older)
    torch.testing.assert_close(made, expected)


def test_long_blocks_go_to_the_flash_kernel_and_short_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(tree_attention, "attend_flash", lambda *a, **k: called.append("flash") or attend_flash(*a, **k))
    for rows in ([[(100, [60, 70])]], [[(100, [3] * 20)]]):
        ids = lay_out(rows)
        attend_trees(*random_inputs(ids[0].shape, 0), TreeLayout.from_ids(*ids), scale=1.0)
    assert called == ["flash"]


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
