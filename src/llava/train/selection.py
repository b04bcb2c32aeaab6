"""Which layers of a part a tune mode means: blocks, linear layers, and what a picture's features are read from.

Everything goes by the full path of a module (`vision_tower.encoder.layers.0.self_attn.q_proj`), never by a part of its
name: a tower's layers are often called like the language model's.
"""

from __future__ import annotations

import re
from typing import Any, Literal, cast

import torch
from torch import nn

from llava.checkpoint.quantised import Nf4, Storage
from llava.errors import RecipeError
from llava.model.llava import Llava
from llava.train.sections import TuneSection

Part = Literal["vision_tower", "projector", "language_model"]
PARTS: tuple[Part, ...] = ("vision_tower", "projector", "language_model")

_PART_BY_HEAD: dict[str, Part] = {
    "vision_tower": "vision_tower",
    "multi_modal_projector": "projector",
    "image_newline": "projector",  # the original left it untrained in stage 1, and so random in every anyres model
    "language_model": "language_model",
}
_HEAD_BY_PART = {part: head for head, part in _PART_BY_HEAD.items() if head != "image_newline"}


def part_of(name: str) -> Part:
    """The part that a parameter's or module's name belongs to."""
    head = name.split(".", 1)[0]
    assert head in _PART_BY_HEAD, f"parameter {name} belongs to no part"
    return _PART_BY_HEAD[head]


def mode_of(tune: TuneSection, part: Part) -> str:
    """What the recipe says of a part: frozen, frozen_4bit, full, last_layers, lora or qlora."""
    return cast(str, getattr(tune, part))


def is_packed(mode: str) -> bool:
    """Whether a mode holds a part's linear layers in NF4."""
    return mode in ("frozen_4bit", "qlora")


def is_frozen(mode: str) -> bool:
    """Whether a mode leaves every weight of a part as it is."""
    return mode in ("frozen", "frozen_4bit")


def blocks_of(model: Llava, part: Part) -> list[str]:
    """Paths of a part's transformer blocks, in order; of the tower only those that its features depend on.

    The tower's features are a hidden state of the layer that the configuration names: blocks behind it never see a
    gradient. Raises RecipeError for a part whose blocks cannot be told.
    """
    root: Any = model.decoder if part == "language_model" else model.get_submodule(_HEAD_BY_PART[part])
    count = int(root.config.num_hidden_layers)
    for name, module in model.named_modules():
        if name.startswith(f"{_HEAD_BY_PART[part]}.") and isinstance(module, nn.ModuleList) and len(module) == count:
            reached = _reached_blocks(model, count) if part == "vision_tower" else count
            return [f"{name}.{index}" for index in range(reached)]
    raise RecipeError(f"tune.{part}: no list of {count} blocks in {type(root).__name__}; tune it full or not at all")


def _reached_blocks(model: Llava, count: int) -> int:
    layer = model.config.vision_feature_layer
    layers = (layer,) if isinstance(layer, int) else layer
    return max(index + count + 1 if index < 0 else index for index in layers)


def linear_paths(model: Llava, part: Part) -> list[str]:
    """Every linear layer of a part, its output layer left out."""
    head = model.lm_head
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{_HEAD_BY_PART[part]}.")
        and isinstance(module, nn.Linear)
        and module is not head
        and ".lora_" not in name
    ]


def lora_paths(model: Llava, tune: TuneSection, part: Part) -> list[str]:
    """The linear layers that a part's LoRA stands beside: those of its blocks, or those that `targets` matches.

    Of the projector all of them. Raises RecipeError when none is left.
    """
    everything = linear_paths(model, part)
    if part == "projector":
        reachable = everything
    else:
        blocks = tuple(f"{block}." for block in blocks_of(model, part))
        outside = part == "language_model"  # a projection between embedding and blocks may be named, but only by name
        reachable = [name for name in everything if name.startswith(blocks)]
        everything = everything if outside else reachable
    targets: str | None = getattr(tune, f"{part}_lora").targets
    if targets is None:
        return reachable
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise RecipeError(f"tune.{part}_lora.targets: {targets!r} is no regular expression ({error})") from error
    chosen = [name for name in everything if pattern.fullmatch(name)]
    if not chosen:
        raise RecipeError(
            f"tune.{part}_lora.targets: {targets!r} matches no linear layer's whole path; they look like "
            f"{everything[-1] if everything else 'nothing: the part has none'!r}"
        )
    return chosen


def last_layer_names(model: Llava, tune: TuneSection, part: Part) -> set[str]:
    """Parameters that `last_layers` trains.

    Language model: its last N blocks, what stands behind them (final norm) and the output layer. Tower: the last N
    blocks before the layer that features are read from. Projector: its last N linear layers.
    Raises RecipeError when there are fewer.
    """
    number = cast(int, getattr(tune, f"{part}_layers"))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if part_of(name) == part]
    units = linear_paths(model, part) if part == "projector" else blocks_of(model, part)
    if number > len(units):
        what = "linear layers" if part == "projector" else "blocks that the loss reaches"
        raise RecipeError(f"tune.{part}_layers: {number}, but the {part} has {len(units)} {what}")
    chosen = tuple(f"{unit}." for unit in units[len(units) - number :])
    found = {name for name in names if name.startswith(chosen)}
    if part == "language_model":
        found |= _behind_blocks(model, tuple(f"{unit}." for unit in units))
    elif part == "projector" and model.image_newline is not None:
        found.add("image_newline")
    # a tied matrix has two names, of which the optimizer knows the first
    first = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    everything = dict(model.named_parameters(remove_duplicate=False))
    return {first[id(everything[name])] for name in found}


def _behind_blocks(model: Llava, blocks: tuple[str, ...]) -> set[str]:
    """The language model's output layer, and its parameters that are neither in a block nor an embedding's."""
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    head = next(name for name, module in model.named_modules() if module is model.lm_head)
    inside = f"language_model.{cast(Any, model.language_model).base_model_prefix}."
    return {
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name.startswith(f"{head}.")
        or (name.startswith(inside) and not name.startswith(blocks) and name.rpartition(".")[0] not in embeddings)
    }


def plan_storage(model: Llava, tune: TuneSection, compute: torch.dtype) -> dict[str, Storage]:
    """How weights that never move are held, by name: packed, or in the format that products are computed in.

    model: before anything is attached; its parameters may be on the meta device. Only weights and biases of linear
    and convolution layers are named: autocast rounds those to `compute` at each use anyway, so holding them rounded
    changes no bit of the loss and halves them. Norms and embeddings are used in float32, so they stay float32; and
    with float32 products everything does.
    """
    plan: dict[str, Storage] = {}
    tied = bool(model.config.text_config.get("tie_word_embeddings"))
    for part in PARTS:
        mode = mode_of(tune, part)
        if mode == "full":
            continue
        moving = last_layer_names(model, tune, part) if mode == "last_layers" else set()
        packed = set(linear_paths(model, part)) if is_packed(mode) else set()
        for path, module in model.named_modules():
            if not path.startswith(f"{_HEAD_BY_PART[part]}.") or not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            if tied and module is model.lm_head:  # its weight is the embedding
                continue
            for leaf, _ in module.named_parameters(recurse=False):
                name = f"{path}.{leaf}"
                if name in moving:
                    continue
                if path in packed and leaf == "weight":
                    plan[name] = Nf4(compute)
                elif compute in (torch.bfloat16, torch.float16):
                    plan[name] = compute
    return plan
