"""The layers of a Llama-like language model as plain functions over (N, width), for the lean decode step.

Calling a module costs more than the kernels of a small model do. So linear layers become function calls, queries, keys
and values one product, gate and up projection another. Joining copies weights, so only small models are joined; the
layers of LoRA or quantised models stay the modules that they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Joined weights are copies: worth it while Python costs more than memory traffic, a waste for large models.
MAX_JOINED_BYTES = 256 * 2**20

Function = Callable[[Tensor], Tensor]
Residual = Callable[[Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Layer:
    """One decoder layer. add_output and add_down take the residual stream first and return the new one."""

    input_norm: Function
    queries_keys_values: Function
    add_output: Residual
    feed_forward_norm: Function
    gate_and_up: Function
    activation: Function
    add_down: Residual


def read_layers(decoder: Any, *, eps: float) -> list[Layer]:
    """The layers of a transformers model with Llama's parameter names (`model.layers`)."""
    layers = list(decoder.layers)
    size = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    join = size <= MAX_JOINED_BYTES
    return [_read_layer(layer, eps, decoder.config.hidden_act, join) for layer in layers]


def as_function(module: nn.Module) -> Function:
    """A linear layer as a plain function call. Layers that are more than that stay themselves."""
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight.detach(), bias=_bias(module))
    return module


def _read_layer(layer: Any, eps: float, hidden_act: str, join: bool) -> Layer:
    attention, feed_forward = layer.self_attn, layer.mlp
    input_norm, queries_keys_values = _normed_product(
        layer.input_layernorm.weight.detach(), [attention.q_proj, attention.k_proj, attention.v_proj], eps, join
    )
    feed_forward_norm, gate_and_up = _normed_product(
        layer.post_attention_layernorm.weight.detach(), [feed_forward.gate_proj, feed_forward.up_proj], eps, join
    )
    return Layer(
        input_norm=input_norm,
        queries_keys_values=queries_keys_values,
        add_output=_as_residual(attention.o_proj),
        feed_forward_norm=feed_forward_norm,
        gate_and_up=gate_and_up,
        # transformers wraps silu in a module of its own; a call of a module costs more than silu does
        activation=F.silu if hidden_act == "silu" else feed_forward.act_fn,
        add_down=_as_residual(feed_forward.down_proj),
    )


def _normed_product(scale: Tensor, modules: Sequence[nn.Module], eps: float, join: bool) -> tuple[Function, Function]:
    """RMS norm with this scale, and several linear layers of its output as one product, outputs side by side."""
    width = scale.shape[0]
    norm = partial(F.rms_norm, normalized_shape=(width,), weight=scale, eps=eps)
    if not join or not all(type(module) is nn.Linear for module in modules):
        functions = [as_function(module) for module in modules]
        return norm, lambda x: torch.cat([function(x) for function in functions], dim=-1)
    linears = cast(Sequence[nn.Linear], modules)
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [bias for bias in map(_bias, linears) if bias is not None]
    bias = torch.cat(biases) if biases else None
    if weight.dtype is not torch.float32:
        return norm, partial(F.linear, weight=weight, bias=bias)
    # x / sqrt(mean(x^2) + eps) * scale = x / hypot(|x|, sqrt(D * eps)) * (sqrt(D) * scale): three kernels for six, and
    # the last factor goes into the weights. Exact to float32's last digits only, so float32 only.
    floor = torch.tensor(math.sqrt(width * eps), device=weight.device)
    # Stored (in, out): a product with one row reads it a fifth faster than the (out, in) of nn.Linear.
    folded = (weight * (scale * math.sqrt(width))).t().contiguous()
    product = partial(torch.mm, mat2=folded) if bias is None else partial(torch.addmm, bias, mat2=folded)
    return partial(_divide_by_norm, floor=floor), product


def _divide_by_norm(x: Tensor, floor: Tensor) -> Tensor:
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)


def _as_residual(module: nn.Module) -> Residual:
    """A linear layer whose output is added to the residual stream."""
    if type(module) is nn.Linear and _bias(module) is None:
        weight = module.weight.detach().t()
        return lambda residual, x: torch.addmm(residual, x, weight)
    function = as_function(module)
    return lambda residual, x: residual + function(x)


def _bias(linear: nn.Linear) -> Tensor | None:
    bias: Tensor | None = linear.bias
    return None if bias is None else bias.detach()
