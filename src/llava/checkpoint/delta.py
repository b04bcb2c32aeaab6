"""Delta weights: what a tuned model adds to its base, for licences that forbid passing the base on.

Each tensor is target - base; the projector, which no base has, is stored as it is. Where the target has more rows
than the base (new tokens), only the block that the base has is subtracted. After the original's make_delta and
apply_delta, which refuse every projector but the linear one; here all work.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from llava.checkpoint.opened import EMBEDDINGS, HEAD
from llava.checkpoint.weights import Source
from llava.errors import CheckpointError

NOT_IN_A_BASE = ("multi_modal_projector.", "vision_tower.", "image_newline")


def apply_delta(delta: Mapping[str, Source], base: Mapping[str, Source]) -> dict[str, Source]:
    """base + delta under common names. Raises CheckpointError when a shape or a key of the two does not fit."""
    return {name: _combined(name, source, base, 1) for name, source in delta.items()}


def make_delta(target: Mapping[str, Source], base: Mapping[str, Source]) -> dict[str, Source]:
    """target - base under common names, the inverse of `apply_delta` up to one rounding."""
    return {name: _combined(name, source, base, -1) for name, source in target.items()}


def _combined(name: str, source: Source, base: Mapping[str, Source], sign: int) -> Source:
    if name.startswith(NOT_IN_A_BASE):
        return source
    other = base.get(name)
    if other is None:
        raise CheckpointError(f"{source.file}: {source.key!r} has no counterpart in the base; is it the right base?")
    grown = name in (*EMBEDDINGS, HEAD) and source.shape[0] >= other.shape[0] and source.shape[1:] == other.shape[1:]
    if source.shape != other.shape and not grown:
        raise CheckpointError(
            f"{source.file}: {source.key!r} has shape {list(source.shape)}, but {other.key!r} in {other.file} has "
            f"{list(other.shape)}; is it the right base?"
        )

    def read() -> torch.Tensor:
        value = source.read().clone()
        rows = other.shape[0] if other.shape else None
        old = other.read().float()
        value[:rows] = (value[:rows].float() + sign * old).to(value.dtype)
        return value

    return source.changed(read)


def looks_like_delta(tensors: Mapping[str, Source], base: Mapping[str, Source]) -> bool:
    """Whether tensors are nearer to zero than to the base: a delta's are, a whole tuned model's are not.

    Decided on the final norm and the first layer's input norm, which are near one in every model.
    """
    norms = [
        name for name in tensors if name.endswith(("model.norm.weight", "norm_f.weight", "0.input_layernorm.weight"))
    ]
    votes = []
    for name in norms:
        if name in base and tensors[name].shape == base[name].shape:
            value, old = tensors[name].read().float(), base[name].read().float()
            votes.append(value.norm() < (value - old).norm())
    if not votes:
        raise CheckpointError(f"{_any_file(tensors)}: no norm weights that the base has too; is it the right base?")
    return all(bool(vote) for vote in votes)


def _any_file(tensors: Mapping[str, Source]) -> Path:
    return next(iter(tensors.values())).file
