"""Stages: which part of a model learns. Stage 1 trains the projector, stage 2 the language model too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from llava.errors import TrainingError
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


@dataclass(frozen=True)
class PartSummary:
    """One line of the table that is shown before the first step. `unreached`: weights that no loss can reach."""

    part: Part
    mode: str
    parameters: int
    trained: int
    unreached: int


def part_of(name: str) -> Part:
    """The part that a parameter's name belongs to."""
    head = name.split(".", 1)[0]
    assert head in _PART_BY_HEAD, f"parameter {name} belongs to no part"
    return _PART_BY_HEAD[head]


def apply_stage(model: Llava, tune: TuneSection) -> list[PartSummary]:
    """Freeze and unfreeze the model's parts, set train and eval mode, and say what was done.

    Weights of a tuned tower behind the layer that features are read from never see a gradient: they stay frozen.
    """
    modes: dict[Part, str] = {
        "vision_tower": tune.vision_tower,
        "projector": tune.projector,
        "language_model": tune.language_model,
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(modes[part_of(name)] != "frozen")
    unreached = _freeze_unreached(model) if tune.vision_tower != "frozen" else 0
    model.train()
    if tune.vision_tower == "frozen":
        model.vision_tower.eval()
    if tune.language_model == "frozen":
        model.language_model.eval()
    named = list(model.named_parameters())
    return [
        PartSummary(
            part=part,
            mode=modes[part],
            parameters=sum(p.numel() for name, p in named if part_of(name) == part),
            trained=sum(p.numel() for name, p in named if part_of(name) == part and p.requires_grad),
            unreached=unreached if part == "vision_tower" else 0,
        )
        for part in PARTS
    ]


def check_reached(model: Llava) -> None:
    """After the first backward pass with a picture: every part that should learn has a gradient.

    Raises TrainingError naming what is dead. A tensor without any gradient is never right; a part whose gradients are
    all exactly zero is cut off from the loss.
    """
    dead = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if dead:
        shown = ", ".join(dead[:4]) + (f" and {len(dead) - 4} more" if len(dead) > 4 else "")
        raise TrainingError(f"{len(dead)} trained tensors got no gradient: {shown}; freeze their part in `tune`")
    for part in PARTS:
        gradients = [p.grad for name, p in model.named_parameters() if p.grad is not None and part_of(name) == part]
        if gradients and not any(bool(gradient.count_nonzero()) for gradient in gradients):
            raise TrainingError(f"every gradient of the {part} is zero; it is cut off from the loss")


def describe_stage(summaries: Sequence[PartSummary]) -> list[tuple[str, str, str, str]]:
    """Rows (part, mode, parameters, trained) of the table, a total last."""
    rows = [
        (s.part, s.mode, f"{s.parameters:,}", f"{s.trained:,}" + (f" ({s.unreached:,} unreached)" * bool(s.unreached)))
        for s in summaries
    ]
    total, trained = sum(s.parameters for s in summaries), sum(s.trained for s in summaries)
    return [*rows, ("all", "", f"{total:,}", f"{trained:,} ({trained / total:.1%})")]


def _freeze_unreached(model: Llava) -> int:
    """Freeze the tower's weights that a picture's features do not depend on; returns how many numbers they hold."""
    size = model.config.image_size
    with torch.enable_grad():
        features = model.encode_tiles(torch.zeros(1, 3, size, size, device=model.device))
        torch.autograd.backward(features.sum())
    unreached = 0
    for parameter in model.vision_tower.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
            unreached += parameter.numel()
    model.zero_grad(set_to_none=True)
    return unreached
