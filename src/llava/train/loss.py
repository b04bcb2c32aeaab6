"""The loss: cross-entropy at answer tokens only, as a sum, so that the caller divides once by the whole step's count.

A mean of means would weigh a token by the batch it happened to lie in (up to .36 off in the gradient). Only hidden
states that predict an answer token go through the output layer: 25x less work there in stage 1, 6x in stage 2, with
bit-identical gradients. Their scores are made chunk by chunk, and each chunk's gradient with them, so that scores of a
few hundred tokens are alive at once and none is made twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava.model.llava import Llava

# Scores in float32 that are alive at once, counted once; their gradient, and a copy under autocast, lie beside them.
# 131 answer tokens at a vocabulary of 32,000. A GPU would multiply more rows at a time a little faster, but all of this
# is 2 % of a 7B step.
CHUNK_BYTES = 16 << 20


def answer_loss(
    hidden: Tensor,
    model: Llava,
    *,
    predictors: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """`scale` times the summed cross-entropy of the answer tokens, a scalar (float32; float64 for a float64 model).

    hidden: (B, T, D); model: gives the output layer; predictors: (A,) flat positions of `hidden` (row * T + t);
    targets: (A,). The predictor of a branch's first token is its prefix's last token, as in a sequence of its own.
    scale: given here rather than multiplied on later, it goes into the scores' gradient first, where float16 needs it
    and where a full forward pass that divides its loss has it.
    """
    flat = hidden.flatten(0, 1)  # (B*T, D)
    # the embedding too: the output layer may be tied to it, and rows of added tokens may lie there
    used = {id(p): p for part in (model.lm_head, model.embed_tokens) for p in part.parameters() if p.requires_grad}
    if torch.is_grad_enabled() and (flat.requires_grad or used):
        arguments = (flat, predictors, targets, model, scale, chunk_bytes)
        return cast(Tensor, _ChunkedLoss.apply(*arguments, *used.values()))  # type: ignore[no-untyped-call]
    picked = flat.index_select(0, predictors)  # (A, D)
    total = _zero(picked)
    for part, wanted in _chunks(picked, targets, _vocabulary_size(model), chunk_bytes):
        total = total + _summed(part, wanted, model, scale)
    return total


class _ChunkedLoss(torch.autograd.Function):
    """The gradient is made in the forward pass, chunk by chunk, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        flat: Tensor,
        predictors: Tensor,
        targets: Tensor,
        model: Llava,
        scale: float,
        chunk_bytes: int,
        *learning: nn.Parameter,
    ) -> Tensor:
        picked = flat.detach().index_select(0, predictors)  # (A, D)
        total = _zero(picked)
        wants_hidden = ctx.needs_input_grad[0]
        hidden_gradient = torch.empty_like(picked) if wants_hidden else None
        gradients: list[Tensor | None] = [None] * len(learning)
        cursor = 0

        def inputs(leaf: Tensor) -> list[Tensor]:
            return [leaf, *learning] if wants_hidden else list(learning)

        plain = _plain_head(model)
        own = next((place for place, p in enumerate(learning) if plain is not None and p is plain.weight), None)
        weight: Tensor | None = None
        for part, wanted in _chunks(picked, targets, _vocabulary_size(model), chunk_bytes):
            here = slice(cursor, cursor + len(part))
            cursor += len(part)
            if plain is not None:
                loss, scores_gradient = _through_scores(part, wanted, plain, scale)
                total = total + loss
                if hidden_gradient is not None:
                    weight = plain.weight.detach().to(scores_gradient.dtype) if weight is None else weight
                    hidden_gradient[here] = scores_gradient @ weight
                if own is not None:
                    product = scores_gradient.t(), part.to(scores_gradient.dtype)
                    gradients[own] = _add_product(gradients[own], *product, dtype=plain.weight.dtype)
                continue
            with torch.enable_grad():
                leaf = part.detach().requires_grad_(wants_hidden)
                loss = _summed(leaf, wanted, model, scale)
                made = list(torch.autograd.grad(loss, inputs(leaf), allow_unused=True))
            total = total + loss.detach()
            if hidden_gradient is not None:
                hidden_gradient[here] = made.pop(0)
            for place, gradient in enumerate(made):
                before = gradients[place]
                if before is None or gradient is None:
                    gradients[place] = gradient if before is None else before
                else:
                    before.add_(gradient)
        if hidden_gradient is not None:
            # here and not by autograd, which would make it twice on the way
            hidden_gradient = torch.zeros_like(flat).index_add_(0, predictors, hidden_gradient)
        ctx.made = [hidden_gradient, *gradients]
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.made is not None, "the loss is differentiated once"
        hidden_gradient, *gradients = (g if g is None else g.mul_(outer[0].to(g.dtype)) for g in ctx.made)
        ctx.made = None
        return (hidden_gradient, None, None, None, None, None, *gradients)


def _plain_head(model: Llava) -> nn.Linear | None:
    """The output layer when it is one matrix and nothing else: its gradient is then added up in place, chunk by chunk,
    where autograd would make a second whole one (half a gigabyte at 7B)."""
    head = model.lm_head
    if not isinstance(head, nn.Linear) or type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return None
    return head if head._parameters["bias"] is None and head.weight.is_floating_point() else None


def _through_scores(part: Tensor, wanted: Tensor, head: nn.Linear, scale: float) -> tuple[Tensor, Tensor]:
    """(`scale` times the summed cross-entropy, its gradient with respect to the scores in the dtype of the product)."""
    with torch.no_grad():
        scores = head(part)
        dtype = scores.dtype
        logs = functional.log_softmax(scores if dtype == torch.float64 else scores.float(), dim=-1)
        del scores
        places = wanted[:, None]
        loss = -logs.gather(1, places).sum() * scale
        # autograd's own operation, so that it rounds as a full forward pass does
        outer = torch.zeros_like(logs).scatter_(1, places, -scale)
        gradient = torch._log_softmax_backward_data(outer, logs, -1, logs.dtype)
    return loss, gradient.to(dtype)


def _add_product(before: Tensor | None, left: Tensor, right: Tensor, *, dtype: torch.dtype) -> Tensor:
    """before + left right, in place where there is something."""
    if before is None:
        return (left @ right).to(dtype)
    return before.addmm_(left, right) if before.dtype == left.dtype else before.add_(left @ right)


def _zero(picked: Tensor) -> Tensor:
    dtype = torch.float64 if picked.dtype == torch.float64 else torch.float32
    return torch.zeros((), dtype=dtype, device=picked.device)


def _vocabulary_size(model: Llava) -> int:
    return int(cast(Any, model.language_model).config.vocab_size)


def _chunks(picked: Tensor, targets: Tensor, width: int, chunk_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Answer positions and tokens, as many at a time as their float32 scores fit into `chunk_bytes` (at least one)."""
    rows = max(1, chunk_bytes // (4 * width))
    return zip(torch.split(picked, rows), torch.split(targets, rows), strict=True)


def _summed(picked: Tensor, targets: Tensor, model: Llava, scale: float) -> Tensor:
    scores = model.logits(picked)
    precise = scores if scores.dtype == torch.float64 else scores.float()
    return functional.cross_entropy(precise, targets, reduction="sum") * scale
