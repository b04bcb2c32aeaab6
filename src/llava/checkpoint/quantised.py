"""Loading in 4 or 8 bit through bitsandbytes: each linear layer of the language model's blocks, as its weight arrives.

NF4 with double quantisation, or int8 with outliers above 6 in full precision, as the original loads them. Embedding,
output layer, tower and projector keep their format. Memory while loading is the packed model and one weight.
On a CPU this is for testing: it is far slower than bfloat16 there. Needs `llava[quant]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from llava.errors import MissingExtraError, UsageError, name_nearest
from llava.model.llava import Llava

LoadIn = Literal["4bit", "8bit"]


@dataclass(frozen=True)
class Nf4:
    """Held in 4 bit under training; products are computed in `compute`."""

    compute: torch.dtype


# How a weight is held in memory: in a number format, or packed.
Storage = torch.dtype | Nf4
OUTLIER_THRESHOLD = 6.0


def import_bitsandbytes(load_in: str) -> Any:
    """The bitsandbytes package. Raises UsageError for an unknown format, MissingExtraError without the package."""
    if load_in not in get_args(LoadIn):
        raise UsageError(f"load_in {load_in!r}: {name_nearest(load_in, get_args(LoadIn))}")
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingExtraError(f"load_in {load_in!r}", "quant") from error
    return bitsandbytes


def packed_layers(model: Llava) -> frozenset[str]:
    """Paths of the layers that are packed: every linear layer of the language model but its output layer."""
    head = model.lm_head
    return frozenset(
        f"language_model.{name}"
        for name, module in model.language_model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )


def pack_layer(
    model: Llava, path: str, weight: Tensor, *, load_in: LoadIn, device: torch.device, training: bool = False
) -> None:
    """Put a packed layer with this weight (out, in) in the place of the linear layer at `path`; its bias is kept.

    training: gradients must pass through it. On processors with AVX512-BF16, bitsandbytes answers one forward pass
    without gradients by repacking the weight into a form that has no backward pass, silently and for good: every
    gradient before it is gone. Layers for training never repack.
    """
    bnb = import_bitsandbytes(load_in)
    old = model.get_submodule(path)
    assert isinstance(old, nn.Linear)
    sizes: tuple[int, int, bool] = (old.in_features, old.out_features, old.bias is not None)
    with torch.device("meta"):
        if load_in == "4bit":
            new = bnb.nn.Linear4bit(*sizes, compute_dtype=weight.dtype, compress_statistics=True, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD)
    if load_in == "4bit":
        packed = bnb.nn.Params4bit(
            weight.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
        )
    else:
        packed = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    new._parameters["weight"] = packed.to(device)  # packing happens on the way to the device
    new._parameters["bias"] = old._parameters.get("bias")
    if training:
        new.support_avx512bf16_for_cpu = False
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new.eval())


def has_lost_its_gradient(layer: nn.Module) -> bool:
    """Whether a packed layer's weight is in the form that bitsandbytes has no backward pass for (`pack_layer`)."""
    state = getattr(layer._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def would_lose_its_gradient(layer: nn.Module) -> bool:
    """Whether a forward pass without gradients, on the CPU, would bring a packed layer into that form."""
    return hasattr(layer._parameters.get("weight"), "quant_state") and bool(
        getattr(layer, "support_avx512bf16_for_cpu", False)
    )


def unpacked_numel(parameter: Tensor) -> int:
    """How many numbers a parameter stands for: a 4 bit one holds two in each of its bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else prod(state.shape)
