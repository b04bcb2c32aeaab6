"""LoRA through peft: attached to a Llava in place, so that its names and its forward stay what they are.

The module tree keeps its paths (`language_model.model.layers.0.self_attn.q_proj`), with peft's layer in the place of
the linear one. Adapters are chosen by the full path of a module, never by a part of its name.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from llava.errors import CheckpointError, UsageError
from llava.model.llava import Llava

ADAPTER = "default"
# Every linear layer of the language model's blocks: the original's choice (all but lm_head).
LANGUAGE_TARGETS = r"language_model\..*\.(\w+_proj|Wqkv|out_proj|qkv_proj|gate_up_proj)"


def attach_lora(
    model: Llava,
    targets: str | Collection[str] = LANGUAGE_TARGETS,
    *,
    rank: int = 128,
    alpha: float = 256,
    dropout: float = 0.05,
    seed: int | None = None,
    scales: Mapping[str, float] | None = None,
) -> list[str]:
    """Put a LoRA beside every linear layer whose full path is one of `targets` (or matches it, a regular expression).

    The layers' own weights stop being trained, the adapters are; every other parameter keeps its setting. B starts at
    zero, so the model's output is unchanged. Adapters are float32 beside weights of any format, 4 bit included. seed:
    A's first values are then a function of seed and path alone (None: torch's generator). scales: alpha / rank by
    path, where they differ. Returns the paths. Raises UsageError when none matches.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(targets, str):
        pattern = re.compile(targets)
        paths = [name for name in linear if pattern.fullmatch(name)]
    else:
        wanted = set(targets)
        paths = [name for name in linear if name in wanted]
    if not paths:
        raise UsageError(f"LoRA targets {targets!r} match no linear layer; paths look like {linear[-1]!r}")
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = LoraConfig(
        r=rank,
        # peft's type says int, its arithmetic does not
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="|".join(re.escape(path) for path in paths),
    )
    if any(not model.get_parameter(f"{path}.weight").is_floating_point() for path in paths):
        cast(Any, model).is_loaded_in_4bit = True  # what peft asks before it builds its layer for packed weights
    with torch.random.fork_rng(enabled=seed is not None):
        inject_adapter_in_model(config, model, ADAPTER)
    # its settings live on in its layers; left here, the next part's injection would warn of a second adapter
    del cast(Any, model).peft_config
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)
        elif ".base_layer." not in name:
            parameter.requires_grad_(trained[name])
    for path in paths:
        layer: Any = model.get_submodule(path)
        for side in (layer.lora_A, layer.lora_B):
            side[ADAPTER].weight.data = side[ADAPTER].weight.data.float()  # peft takes the base's format
        if seed is not None:
            _draw(layer.lora_A[ADAPTER].weight, f"{seed}:{path}")
        if scales is not None and path in scales:
            layer.scaling[ADAPTER] = scales[path]
    return paths


@torch.no_grad()
def _draw(weight: Tensor, name: str) -> None:
    """peft's start of A, uniform within 1 / sqrt(in), from a name: the same on every machine, rank and device."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(weight.shape[1])
    weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * bound)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, peft layer) of every adapted layer."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def is_adapted(model: nn.Module) -> bool:
    """Whether a LoRA is attached."""
    return next(lora_layers(model), None) is not None


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its weight, in float32, and put the plain linear layers back."""
    for path, layer in list(lora_layers(model)):
        base = layer.get_base_layer()
        base.weight.copy_(merged_weight(layer))
        base.weight.requires_grad_(True)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, base)


def merged_weight(layer: Any) -> Tensor:
    """W + scale * B @ A of a peft layer, computed in float32, in W's number format.

    Raises CheckpointError for packed weights: a sum with them could not be packed again without a loss.
    """
    base = layer.get_base_layer().weight
    if not base.is_floating_point():
        raise CheckpointError(
            "a LoRA beside 4 or 8 bit weights cannot be merged into them; merge it into the base's own"
        )
    merged: Tensor = (base.float() + lora_product(layer)).to(base.dtype)
    return merged


@torch.no_grad()
def lora_product(layer: Any) -> Tensor:
    """What a peft layer adds to its weight, scale * B @ A, (out, in) in float32."""
    product: Tensor = layer.lora_B[ADAPTER].weight.float() @ layer.lora_A[ADAPTER].weight.float()
    return product * float(layer.scaling[ADAPTER])


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under the name that it has without adapters, adapters added to the weights they belong to.

    The model is left as it is; one merged weight exists at a time.
    """
    adapted = dict(lora_layers(model))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        path, marker, leaf = name.rpartition(".base_layer.")
        if not marker:
            yield name, parameter.detach()
        elif leaf == "weight":
            yield f"{path}.{leaf}", merged_weight(adapted[path]).detach()
        else:
            yield f"{path}.{leaf}", parameter.detach()


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapted layer by peft's names in an adapter file (`base_model.model.` and no adapter name)."""
    out = {}
    for path, layer in lora_layers(model):
        for side in ("A", "B"):
            weight = getattr(layer, f"lora_{side}")[ADAPTER].weight
            out[f"base_model.model.{path}.lora_{side}.weight"] = weight.detach()
    return out
