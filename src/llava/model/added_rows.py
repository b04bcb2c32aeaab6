"""Rows of added tokens that learn while the rest of the embedding stays as it is.

A language model that is frozen or adapted still has to learn what `<im_start>` and `<im_end>` mean. Training the whole
embedding behind a mask would cost its gradient and two moments, and weight decay would move the rows behind the mask.
So the rows are parameters of their own, `added_rows`, beside the frozen weight: hooks put them into what the embedding
gives and the output layer scores, and nothing else can move. `write_added_rows` copies them into the weight, for code
that reads the weight itself; what is saved has them in their places (`llava.checkpoint.tuned`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava.model.llava import Llava

ROWS = "added_rows"


def attach_added_rows(model: Llava, ids: Sequence[int]) -> list[str]:
    """Let the rows of these token ids learn apart from the embedding (and the output layer, where it is not tied).

    Only matrices that are frozen get rows of their own. Returns the new parameters' names; float32, whatever the
    weight's format. Call it once a model.
    """
    if not ids:
        return []
    embedding: nn.Module = model.embed_tokens
    head: nn.Module = model.lm_head
    tied = head.weight is embedding.weight
    if not _weight(embedding).requires_grad:
        _attach(embedding, ids)
        embedding.register_forward_hook(_place_rows)
    if tied and hasattr(embedding, ROWS):
        # a closure, not an attribute: the rows would otherwise be two parameters of two names
        head.register_forward_hook(lambda module, given, scores: _place_scores(embedding, given, scores))
    elif not tied and not _weight(head).requires_grad:
        _attach(head, ids)
        head.register_forward_hook(_place_scores)
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == ROWS]


def added_rows(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name of the weight, ids (K,), rows (K, D)) of every matrix with rows of its own."""
    for name, module in model.named_modules():
        if ROWS in module._parameters:
            owner: Any = module
            yield f"{name}.weight", owner.added_ids, owner.added_rows


@torch.no_grad()
def write_added_rows(model: nn.Module) -> None:
    """Copy the learnt rows into the weights that they belong to, for code that reads the weights themselves."""
    for name, ids, rows in added_rows(model):
        weight = model.get_parameter(name)
        # .data: a frozen weight that a graph still holds must not count as changed
        weight.data[ids] = rows.detach().to(weight.dtype)


def _attach(module: nn.Module, ids: Sequence[int]) -> None:
    weight = _weight(module)
    index = torch.tensor(list(ids), device=weight.device)
    module.register_buffer("added_ids", index, persistent=False)
    module.register_parameter(ROWS, nn.Parameter(weight.detach()[index].float().clone()))


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _place_rows(module: Any, given: tuple[Tensor, ...], embeddings: Tensor) -> Tensor:
    """given[0]: (B, T) ids; embeddings: (B, T, D). The rows are part of the graph even where none of them is read."""
    hit = given[0][..., None] == module.added_ids  # (B, T, K)
    chosen = functional.embedding(hit.int().argmax(dim=-1), module.added_rows).to(embeddings.dtype)
    return torch.where(hit.any(dim=-1, keepdim=True), chosen, embeddings)


def _place_scores(owner: Any, given: tuple[Tensor, ...], scores: Tensor) -> Tensor:
    """given[0]: (..., D) hidden states; scores: (..., V), of which the rows' columns are computed anew."""
    fresh = functional.linear(given[0], owner.added_rows.to(given[0].dtype)).to(scores.dtype)
    return scores.index_copy(-1, owner.added_ids, fresh)
