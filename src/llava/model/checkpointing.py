"""Activation checkpointing: what a block keeps for the backward pass, and what is computed there again.

    none       keep everything; the fastest
    selective  keep the results of matrix products and attention, compute norms, activations and rotations again:
               about half the memory for a few percent of time
    full       keep each block's input only, compute the block again: a third more work

Gradients are the same to the bit: the same operations on the same numbers (and the same random draws). Parts below the
lowest trained parameter keep nothing in any mode, since autograd records nothing there.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn

from llava.model.llava import Llava

Checkpointing = Literal["none", "selective", "full"]


def set_checkpointing(model: Llava, mode: Checkpointing) -> None:
    """Checkpoint the blocks of the language model, and of the tower where it trains. Once a model, before sharding.

    Names of modules and parameters stay as they are; a copy of the model is checkpointed too.
    """
    if mode == "none":
        return
    # The composable form: hooks, no wrapper modules, made to go with fully_shard.
    from torch.distributed._composable.checkpoint_activation import checkpoint

    options: dict[str, Any] = {}
    if mode == "selective":
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept_operations())
    # The last block is the first that the backward pass would compute again: keeping it costs no peak, and saves that.
    blocks = find_blocks(model.decoder)[:-1]
    if any(parameter.requires_grad for parameter in model.vision_tower.parameters()):
        blocks += find_blocks(model.vision_tower)
    for block in blocks:
        checkpoint(block, **options)


def kept_operations() -> list[Any]:
    """The operations whose results `selective` keeps: those whose work grows with the width squared, or the tokens."""
    names = (
        "mm",
        "addmm",
        "_scaled_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    kept = [getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)]
    if hasattr(torch.ops, "torch_attn") and hasattr(torch.ops.torch_attn, "_varlen_attn"):
        kept.append(torch.ops.torch_attn._varlen_attn.default)
    return kept


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """A transformer's blocks: the module list that holds most of its parameters; empty when there is none."""
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList) and len(child)]
    return [*max(lists, key=_count_parameters)] if lists else []


def _count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in cast(Any, module).parameters())
