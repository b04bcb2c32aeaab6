"""Three ways to compute attention over rows of trees, all exact: which is fastest depends on device and sizes.

    blocked  plain matrix products over buckets of like-long trees and branches: many small branches, any device
    flash    torch's own CPU flash kernel, a call a block, joined by their log-sums: few long blocks on CPU
    varlen   flash attention with different query and key lengths: bfloat16 or float16 on a GPU

Milliseconds forward and backward, one CPU thread, blocked then flash: 550 and 255 for two trees of a 611 token prefix
and four branches (12 heads of 64, float32), 28 and 33 for twelve trees of 68 and twelve branches of 12 tokens (6 heads
of 32). All take query, key, value (B, H, T, d) with the same H and return (B, H, T, d); padding tokens get zeros.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llava.model.tree_attention import TreeLayout


def attend_blocked(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, *, scale: float, window: int | None = None
) -> Tensor:
    """Matrix products over buckets; the one that takes a sliding window, and values of another width, on every device.
    Keeps the weights for the backward pass."""
    return cast(Tensor, _Blocked.apply(query, key, value, layout, scale, window))  # type: ignore[no-untyped-call]


def attend_flash(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, *, scale: float) -> Tensor:
    """torch's CPU flash kernel, block by block; memory grows with the tokens, not with their pairs."""
    return cast(Tensor, _Flash.apply(query, key, value, layout, scale))  # type: ignore[no-untyped-call]


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    *,
    scale: float,
    window: int | None = None,
    kernel: Callable[..., Any] | None = None,
) -> Tensor:
    """Every prefix and every branch as a sequence of its own, a branch with its prefix's keys before its own.

    key and value may have fewer heads than query. `kernel` has the meaning of torch's varlen_attn, which is the
    default: causal with the last query against the last key.
    """
    shape = query.shape
    kernel = kernel or varlen_kernel()
    assert kernel is not None, "no varlen_attn in this torch"
    dtype = value.dtype
    flat_query = _flat(query.to(dtype)).index_select(0, layout.queries)  # (Q, H, d)
    keys = _flat(key.to(dtype)).index_select(0, layout.keys)  # (K, H', d)
    values = _flat(value).index_select(0, layout.keys)
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    known = _parameters(kernel)
    if "window_size" not in known:  # torch before 2.11
        assert window is None, "this torch's varlen_attn has no sliding window"
        options["is_causal"] = True
        del options["window_size"]
    if "scale" not in known:
        flat_query = flat_query * (options.pop("scale") * shape[-1] ** 0.5)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in known:
        options["enable_gqa"] = True
    elif groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    made = kernel(
        flat_query,
        keys,
        values,
        layout.query_bounds,
        layout.key_bounds,
        layout.longest_query,
        layout.longest_key,
        **options,
    )
    output = made.new_zeros(shape[0] * shape[2], *made.shape[1:]).index_copy(0, layout.queries, made)
    return _rows(output, shape)


@lru_cache(maxsize=4)
def _parameters(kernel: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(kernel).parameters)


@lru_cache(maxsize=1)
def varlen_kernel() -> Callable[..., Any] | None:
    """torch's varlen_attn, None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return cast(Callable[..., Any], varlen_attn)


# --- blocked -----------------------------------------------------------------------------------------------------


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float, window: int | None
    ) -> Tensor:
        shape = query.shape  # (B, H, T, d)
        precise = torch.promote_types(value.dtype, torch.float32)
        q, k, v = (_with_bin(t.to(value.dtype)) for t in (query * scale, key, value))  # (B*T + 1, H, d)
        blocks = list(_blocks(layout, window))
        highest = torch.full(q.shape[:2], float("-inf"), dtype=precise, device=q.device)  # (B*T + 1, H)
        scores = []
        for queries, keys, unseen in blocks:
            block = torch.matmul(_take(q, queries), _take(k, keys).transpose(-1, -2)).to(precise)  # (N, H, S, P)
            scores.append(block.masked_fill_(unseen, float("-inf")))
            highest[queries] = torch.maximum(highest[queries], block.amax(-1).transpose(1, 2))
        highest.masked_fill_(highest == float("-inf"), 0.0)  # padding sees nothing
        total = torch.zeros_like(highest)
        for (queries, _, _), block in zip(blocks, scores, strict=True):
            block.sub_(_take(highest, queries)).exp_()
            total[queries] += block.sum(-1).transpose(1, 2)
        total.masked_fill_(total == 0, 1.0)
        result = torch.zeros_like(v)
        weights = []
        for (queries, keys, _), block in zip(blocks, scores, strict=True):
            weight = block.div_(_take(total, queries)).to(v.dtype)
            weights.append(weight)
            result[queries] += torch.matmul(weight, _take(v, keys)).transpose(1, 2)
        ctx.blocks = [(queries, keys) for queries, keys, _ in blocks]
        ctx.scale, ctx.shape, ctx.dtypes = scale, shape, (query.dtype, key.dtype)
        ctx.save_for_backward(q, k, v, result, *weights)
        return _rows(result[:-1], shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, result, *weights = ctx.saved_tensors
        g = _with_bin(gradients[0].to(v.dtype))  # (B*T + 1, H, d)
        # sum over keys of weight * d weight, which is output * d output
        delta = (g * result).sum(-1, dtype=torch.promote_types(v.dtype, torch.float32))  # (B*T + 1, H)
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (queries, keys), weight in zip(ctx.blocks, weights, strict=True):
            own_g = _take(g, queries)
            grad_weight = torch.matmul(own_g, _take(v, keys).transpose(-1, -2))
            grad_block = (weight * (grad_weight - _take(delta, queries))).to(v.dtype)
            # a token is a key in one block only (its prefix or its branch), so writing is enough; the bin is dropped
            grad_v[keys] = torch.matmul(weight.transpose(-1, -2), own_g).transpose(1, 2)
            grad_k[keys] = torch.matmul(grad_block.transpose(-1, -2), _take(q, queries)).transpose(1, 2)
            grad_q[queries] += torch.matmul(grad_block, _take(k, keys)).transpose(1, 2)
        first, second = ctx.dtypes
        return (
            _rows(grad_q[:-1] * ctx.scale, ctx.shape).to(first),
            _rows(grad_k[:-1], ctx.shape).to(second),
            _rows(grad_v[:-1], ctx.shape),
            None,
            None,
            None,
        )


def _blocks(layout: TreeLayout, window: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(queries, keys, unseen): trees against their prefix, then branches against themselves."""
    for trees, prefixes, hidden, positions in zip(
        layout.trees, layout.prefixes, layout.hidden, layout.positions, strict=True
    ):
        if window is None:
            yield trees, prefixes, hidden
        else:
            place = torch.arange(prefixes.shape[1], device=prefixes.device)
            yield trees, prefixes, hidden | ((positions[:, :, None] - place) >= window)[:, None]
    for branches, future in zip(layout.branches, layout.future, strict=True):
        if window is None:
            yield branches, branches, future
        else:
            place = torch.arange(branches.shape[1], device=branches.device)
            yield branches, branches, future | ((place[:, None] - place) >= window)


# --- flash -------------------------------------------------------------------------------------------------------


class _Flash(torch.autograd.Function):
    """A block is a slice of queries against a slice of keys. Softmax over several blocks is their outputs weighted by
    exp(own log-sum - joint log-sum); with the joint output and log-sum in hand, the kernel's backward of each block
    gives that block's exact share of the gradient (as in ring attention, arXiv:2310.01889)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float) -> Tensor:
        q, k, v = (_one_row(t.to(value.dtype)) for t in (query, key, value))  # (1, H, B*T, d)
        out = torch.zeros_like(q)
        precise = torch.promote_types(v.dtype, torch.float32)
        logsum = torch.zeros(q.shape[:3], dtype=precise, device=q.device)

        def attend(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
            made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scale
            )
            return cast(tuple[Tensor, Tensor], made)

        for prefix, rest, branches in _spans(layout):
            if prefix is not None:
                out[:, :, prefix], logsum[:, :, prefix] = attend(prefix, prefix, True)
                out[:, :, rest], logsum[:, :, rest] = attend(rest, prefix, False)
            for branch in branches:
                own, own_sum = attend(branch, branch, True)
                if prefix is None:
                    out[:, :, branch], logsum[:, :, branch] = own, own_sum
                    continue
                joint = torch.logaddexp(logsum[:, :, branch], own_sum)
                far = out[:, :, branch] * (logsum[:, :, branch] - joint).exp_()[..., None]
                out[:, :, branch] = far + own * (own_sum - joint).exp_()[..., None]
                logsum[:, :, branch] = joint
        ctx.layout, ctx.scale, ctx.shape, ctx.dtypes = layout, scale, query.shape, (query.dtype, key.dtype)
        ctx.save_for_backward(q, k, v, out, logsum)
        return _several_rows(out, query.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsum = ctx.saved_tensors
        g = _one_row(gradients[0].to(v.dtype))
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

        def descend(queries: slice, keys: slice, causal: bool) -> None:
            made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g[:, :, queries],
                q[:, :, queries],
                k[:, :, keys],
                v[:, :, keys],
                out[:, :, queries],
                logsum[:, :, queries],
                0.0,
                causal,
                scale=ctx.scale,
            )
            grad_q[:, :, queries] += made[0]
            grad_k[:, :, keys] += made[1]
            grad_v[:, :, keys] += made[2]

        for prefix, rest, branches in _spans(ctx.layout):
            if prefix is not None:
                descend(prefix, prefix, True)
                descend(rest, prefix, False)
            for branch in branches:
                descend(branch, branch, True)
        first, second = ctx.dtypes
        return (
            _several_rows(grad_q, ctx.shape).to(first),
            _several_rows(grad_k, ctx.shape).to(second),
            _several_rows(grad_v, ctx.shape),
            None,
            None,
        )


def _spans(layout: TreeLayout) -> Iterator[tuple[slice | None, slice, list[slice]]]:
    """Each tree's prefix (None when it has none), all its branches as one slice, and each branch."""
    for start, prefix, lengths in layout.spans:
        cursor = start + prefix
        branches = []
        for length in lengths:
            branches.append(slice(cursor, cursor + length))
            cursor += length
        yield (slice(start, start + prefix) if prefix else None), slice(start + prefix, cursor), branches


# --- shapes ------------------------------------------------------------------------------------------------------


def _one_row(rows: Tensor) -> Tensor:
    """(B, H, T, d) to (1, H, B*T, d)."""
    batch, heads, length, width = rows.shape
    return rows.transpose(1, 2).reshape(1, batch * length, heads, width).transpose(1, 2)


def _several_rows(row: Tensor, shape: Sequence[int]) -> Tensor:
    """(1, H, B*T, d) to (B, H, T, d)."""
    return _rows(row.transpose(1, 2)[0], shape)


def _flat(rows: Tensor) -> Tensor:
    """(B, H, T, d) to (B*T, H, d)."""
    return rows.transpose(1, 2).flatten(0, 1)


def _with_bin(rows: Tensor) -> Tensor:
    """(B, H, T, d) to (B*T + 1, H, d); the last entry is the bin, zero."""
    batch, heads, length, width = rows.shape
    flat = rows.new_zeros(batch * length + 1, heads, width)
    flat[:-1] = rows.transpose(1, 2).reshape(batch * length, heads, width)
    return flat


def _rows(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """(B*T, H, d) to (B, H, T, d); shape: of any such tensor, its d does not count."""
    batch, heads, length = shape[:3]
    return flat.reshape(batch, length, heads, flat.shape[-1]).transpose(1, 2)


def _take(flat: Tensor, index: Tensor) -> Tensor:
    """flat: (B*T + 1, H, d) or (B*T + 1, H), index: (N, L); returns (N, H, L, d), or (N, H, L, 1)."""
    values = flat if flat.dim() == 3 else flat.unsqueeze(-1)
    return values.index_select(0, index.flatten()).view(*index.shape, *values.shape[1:]).transpose(1, 2)
