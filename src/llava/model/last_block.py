"""The last block only where somebody reads it.

Of the last block's output only the positions count that predict an answer token. Keys and values of the others are
needed, their queries, output projection and feed-forward are not: a fifth of the work of stage 1 on a language model of
four layers, a seventh on six, 2.6 % on 32. Hooks on those modules pick the positions and put the results back, so that
transformers' block runs as it is; hidden states of other positions are then of no meaning. Whether a family's modules
take this is tried with the rest (model/tree_support.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from llava.model.checkpointing import find_blocks

# Modules of a block that work on each position alone; llama's names, which most families share.
_POSITION_WISE = ("self_attn.q_proj", "self_attn.o_proj", "mlp")


@contextmanager
def last_block_only_at(language_model: nn.Module, positions: Tensor | None) -> Iterator[None]:
    """Inside, the last block's queries, output projection and feed-forward are computed at `positions` only.

    positions: (A,) different flat positions (row * T + t); None: everywhere.
    """
    modules = [] if positions is None else position_wise_modules(language_model)
    handles = []
    for module in modules:
        picked = _Picked(cast(Tensor, positions))
        handles += [module.register_forward_pre_hook(picked.pick), module.register_forward_hook(picked.put_back)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def position_wise_modules(language_model: nn.Module) -> list[nn.Module]:
    """Those of the last block; empty when it has not got all of them."""
    blocks = find_blocks(cast(Any, language_model).base_model)
    if not blocks:
        return []
    named = dict(blocks[-1].named_modules())
    return [named[name] for name in _POSITION_WISE] if all(name in named for name in _POSITION_WISE) else []


class _Picked:
    def __init__(self, positions: Tensor) -> None:
        self._positions = positions
        self._shape = torch.Size()

    def pick(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """(B, T, D) to (1, A, D)."""
        self._shape = given[0].shape
        return given[0].flatten(0, 1).index_select(0, self._positions)[None], *given[1:]

    def put_back(self, module: nn.Module, given: tuple[Any, ...], made: Tensor) -> Tensor:
        """(1, A, D') to (B, T, D'), zero elsewhere."""
        rows, length = self._shape[:2]
        whole = made.new_zeros(rows * length, made.shape[-1]).index_copy(0, self._positions, made[0])
        return whole.view(rows, length, -1)
