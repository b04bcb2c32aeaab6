"""Exact attention over rows of trees without the square of the row: scores only where a token may see another.

A token sees its tree's prefix and its own branch. So the scores of a tree against its prefix, and of each branch
against itself, are all there is: a fifth of a dense 12-branch row. How trees lie in rows does not matter, so one row
without padding holds them all. The layout of a batch travels to transformers' own `AttentionInterface` as an extra
argument; the mask of `Batch.attention_mask()` is the reference, and what the families take that hand no extra argument
on. Which those are is found out by trying (llava.model.tree_support), not by a list of names.
Not covered: attention dropout, soft-capped scores, attention sinks, caches. `model/tree_kernels.py` computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llava.model.tree_kernels import attend_blocked, attend_flash, attend_varlen, varlen_kernel

NAME = "llava_trees"
# Branches padded to one length: a bucket ends where a branch is shorter than this share of its longest.
_BUCKET_SHARE = 0.7
# Fewer tokens a prefix or branch than this on average: buckets beat a kernel call each (see tree_kernels).
_FLASH_TOKENS = 48
# What an attention function may be given that changes its result and that no kernel here computes.
_REFUSED = ("softcap", "s_aux", "position_bias", "head_mask", "score_mod")


class TreeRefusalError(RuntimeError):
    """This language model asks its attention for something that attention by trees does not compute."""


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """Where trees lie in a batch of B rows of T tokens. Flat positions are row * T + t; B * T is a bin for padding.

    Buckets of like-long trees or branches, one tensor each, flat positions padded with the bin: trees: (N, S) the
    tokens of trees that have a prefix; prefixes: (N, P) their prefixes; hidden: (N, 1, S, P) bool, True where the token
    may not see the prefix token; positions: (N, S) the tokens' positions; branches: (M, L); future: (L, L) bool above
    the diagonal.
    Slices: spans: a (flat start, prefix length, branch lengths) each tree.
    Sequences, each prefix and each branch one, in flat order: queries: (Q,) flat positions of all real tokens; keys:
    (K,) of what they see, a branch's prefix before its own; query_bounds, key_bounds: (sequences + 1,) int32.
    """

    trees: tuple[Tensor, ...]
    prefixes: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]
    positions: tuple[Tensor, ...]
    branches: tuple[Tensor, ...]
    future: tuple[Tensor, ...]
    spans: tuple[tuple[int, int, tuple[int, ...]], ...]
    queries: Tensor
    keys: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def from_ids(cls, tree_ids: NDArray[np.int64], branch_ids: NDArray[np.int64]) -> TreeLayout:
        """tree_ids, branch_ids: (B, T) as in llava.data.batch.Batch; negative trees are padding, branch 0 a prefix."""
        nowhere = tree_ids.size
        rows = np.repeat(np.arange(tree_ids.shape[0]), tree_ids.shape[1])
        branch_of = branch_ids.ravel()
        real = tree_ids.ravel() >= 0
        every = [run for run in _runs(rows, tree_ids.ravel()) if real[run[0]]]
        whole = [run for run in every if branch_of[run[0]] == 0]
        branches = [run for run in _runs(rows, tree_ids.ravel(), branch_of) if real[run[0]] and branch_of[run[0]] > 0]
        buckets = _bucketed(whole)
        trees = [_padded(bucket, nowhere) for bucket in buckets]
        prefixes = [_padded([run[branch_of[run] == 0] for run in b], nowhere) for b in buckets]
        # flat positions grow along a row, so "not after it" is a comparison; the bin is larger than all
        hidden = [
            (p[:, None, :] > t[:, :, None]) | (t[:, :, None] == nowhere) for t, p in zip(trees, prefixes, strict=True)
        ]
        positions = [_padded([_positions(branch_of[run]) for run in bucket], 0) for bucket in buckets]
        grouped = [_padded(bucket, nowhere) for bucket in _bucketed(branches)]
        future = [~np.tri(bucket.shape[1], dtype=bool) for bucket in grouped]
        spans = tuple(_span(run, branch_of[run]) for run in every)
        return cls(
            _tensors(trees),
            _tensors(prefixes),
            _tensors([h[:, None] for h in hidden]),
            _tensors(positions),
            _tensors(grouped),
            _tensors(future),
            spans,
            *_sequences(spans, np.flatnonzero(real)),
        )

    @property
    def num_sequences(self) -> int:
        """Prefixes and branches."""
        return len(self.query_bounds) - 1

    def mapped(self, change: Callable[[Tensor], Tensor]) -> TreeLayout:
        """The same layout with every tensor changed."""

        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            return tuple(map(changed, value)) if isinstance(value, tuple) else value

        return TreeLayout(**{name: changed(value) for name, value in vars(self).items()})

    def to(self, device: torch.device) -> TreeLayout:
        """The same layout on a device."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))


def attend_trees(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, *, scale: float, window: int | None = None
) -> Tensor:
    """softmax(query key^T * scale) value over each token's prefix and branch, by whichever kernel is fastest.

    query: (B, H, T, d); key, value: (B, H', T, d), H' divides H; window: see no further back than so many positions.
    Returns (B, H, T, d) in value's dtype; padding tokens get zeros.
    """
    if window is not None and layout.longest_key <= window:
        window = None  # nothing is that far back
    if _takes_varlen(value, query.shape[-1]):
        return attend_varlen(query, key, value, layout, scale=scale, window=window)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    long_enough = len(layout.queries) >= _FLASH_TOKENS * layout.num_sequences
    if value.device.type == "cpu" and window is None and long_enough and query.shape[-1] == value.shape[-1]:
        return attend_flash(query, key, value, layout, scale=scale)
    return attend_blocked(query, key, value, layout, scale=scale, window=window)


def register() -> None:
    """Make attention by trees known to transformers under NAME."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _takes_varlen(value: Tensor, query_width: int) -> bool:
    """Whether flash attention by lengths runs on this tensor's device, in its dtype and head width."""
    return (
        value.device.type != "cpu"
        and value.dtype in (torch.bfloat16, torch.float16)
        and value.shape[-1] % 8 == 0
        and value.shape[-1] == query_width
        and value.shape[-1] <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and varlen_kernel() is not None
    )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_layout: TreeLayout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: by trees when a layout came along, else its own sdpa."""
    if tree_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        done = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            **kwargs,
        )
        return cast(tuple[Tensor, None], done)
    asked = [name for name in _REFUSED if kwargs.get(name) is not None]
    if asked or dropout > 0:
        raise TreeRefusalError(f"attention with {', '.join(asked) or f'dropout {dropout}'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = attend_trees(query, key, value, tree_layout, scale=scale, window=sliding_window)
    return output.transpose(1, 2), None  # (B, T, H, d)


# --- laying out --------------------------------------------------------------------------------------------------


def _span(run: NDArray[np.int64], branch_of: NDArray[np.int64]) -> tuple[int, int, tuple[int, ...]]:
    """(flat start, prefix length, branch lengths) of one tree."""
    cuts = np.flatnonzero(np.diff(branch_of)) + 1
    lengths = [len(part) for part in np.split(branch_of, cuts)]
    prefix = lengths.pop(0) if branch_of[0] == 0 else 0
    return int(run[0]), prefix, tuple(lengths)


def _positions(branch_of: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of one tree's tokens: the prefix from 0, every branch on from the prefix."""
    places = np.arange(len(branch_of))
    prefix = int((branch_of == 0).sum())
    starts = np.concatenate([[0], np.flatnonzero(np.diff(branch_of)) + 1])
    begin = starts[np.searchsorted(starts, places, side="right") - 1]
    return np.where(branch_of == 0, places, places - begin + prefix)


def _sequences(
    spans: Sequence[tuple[int, int, tuple[int, ...]]], queries: NDArray[np.int64]
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """queries, keys, query_bounds, key_bounds and the two longest, as in TreeLayout."""
    keys: list[NDArray[np.int64]] = []
    query_lengths: list[int] = []
    for start, prefix, lengths in spans:
        cursor = start + prefix
        beginning = np.arange(start, cursor)
        if prefix:
            keys.append(beginning)
            query_lengths.append(prefix)
        for length in lengths:
            keys.append(np.concatenate([beginning, np.arange(cursor, cursor + length)]))
            query_lengths.append(length)
            cursor += length
    key_lengths = [len(part) for part in keys]

    def bounds(lengths: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))

    gathered = np.concatenate(keys) if keys else np.zeros(0, dtype=np.int64)
    return (
        torch.from_numpy(queries),
        torch.from_numpy(gathered),
        bounds(query_lengths),
        bounds(key_lengths),
        max(query_lengths, default=0),
        max(key_lengths, default=0),
    )


def _tensors(arrays: Sequence[NDArray[Any]]) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


def _runs(*keys: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Positions cut where any of the keys changes."""
    stacked = np.stack(keys)
    starts = np.flatnonzero((stacked[:, 1:] != stacked[:, :-1]).any(0)) + 1
    return np.split(np.arange(stacked.shape[1]), starts)


def _bucketed(runs: Sequence[NDArray[np.int64]]) -> list[list[NDArray[np.int64]]]:
    """Runs of like length together, longest first."""
    buckets: list[list[NDArray[np.int64]]] = []
    for run in sorted(runs, key=len, reverse=True):
        if not buckets or len(run) < _BUCKET_SHARE * len(buckets[-1][0]):
            buckets.append([])
        buckets[-1].append(run)
    return buckets


def _padded(runs: Sequence[NDArray[np.int64]], filler: int) -> NDArray[np.int64]:
    """Runs as the rows of one array, padded at the end."""
    longest = max(len(run) for run in runs)
    padded = np.full((len(runs), longest), filler, dtype=np.int64)
    for row, run in zip(padded, runs, strict=True):
        row[: len(run)] = run
    return padded
