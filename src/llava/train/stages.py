"""Stages: which weights of a model learn. Stage 1 trains the projector, stage 2 the language model too.

`apply_stage` brings a model into the state that a recipe's `tune` section describes; `describe_stage` is the table
that is shown before the first step; `check_reached` looks after the first backward pass whether it is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from llava.checkpoint.quantised import Nf4, has_lost_its_gradient, pack_layer, unpacked_numel
from llava.distributed import any_process
from llava.errors import TrainingError
from llava.model.added_rows import ROWS, attach_added_rows
from llava.model.llava import Llava
from llava.model.lora import attach_lora
from llava.train.sections import OptimSection, TuneSection
from llava.train.selection import PARTS, Part, is_frozen, last_layer_names, lora_paths, mode_of, part_of, plan_storage

TABLE_HEAD = ("part", "mode", "parameters", "trained", "rate", "LoRA rank", "held in")


@dataclass(frozen=True)
class PartSummary:
    """One line of the table that is shown before the first step.

    unreached: weights that no loss can reach; rows: of trained, the numbers in rows of added tokens; rate: the peak
    learning rate (None: nothing learns, or the optimizer is not known yet); held_in: number formats, widest use first.
    """

    part: Part
    mode: str
    parameters: int
    trained: int
    unreached: int
    rows: int = 0
    rate: float | None = None
    rank: int | None = None
    held_in: str = ""


def apply_stage(
    model: Llava,
    tune: TuneSection,
    *,
    optim: OptimSection | None = None,
    seed: int = 0,
    compute: torch.dtype = torch.float32,
    added_ids: Sequence[int] = (),
) -> list[PartSummary]:
    """Freeze, unfreeze, pack and adapt the model's parts, set train and eval mode, and say what was done.

    seed: of the adapters' first values. compute: the format of matrix products; frozen weights are held in it
    (`selection.plan_storage`). added_ids: tokens whose rows learn even where their matrix does not. Weights of a
    tuned tower behind the layer that features are read from never see a gradient: they stay frozen. Weights that
    are trained are made float32. Raises RecipeError for layers that the model does not have.
    """
    chosen = {part: last_layer_names(model, tune, part) for part in PARTS if mode_of(tune, part) == "last_layers"}
    adapted = {part: lora_paths(model, tune, part) for part in PARTS if mode_of(tune, part) in ("lora", "qlora")}
    _hold(model, tune, compute)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        learns = mode_of(tune, part) == "full" or name in chosen.get(part, ())
        # the newline is a part of the projector that no mode leaves behind
        learns = learns or (name == "image_newline" and not is_frozen(tune.projector))
        parameter.requires_grad_(learns)
        if learns:
            parameter.data = parameter.data.float()
    unreached = _freeze_unreached(model) if tune.vision_tower == "full" else 0
    for part, paths in adapted.items():
        settings = getattr(tune, f"{part}_lora")
        attach_lora(model, paths, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, seed=seed)
    attach_added_rows(model, added_ids)
    model.train()
    for part, module in _modules(model).items():
        if is_frozen(mode_of(tune, part)):
            module.eval()
    return [_summarise(model, tune, part, optim, unreached if part == "vision_tower" else 0) for part in PARTS]


def peak_rate(part: Part, optim: OptimSection) -> float:
    """The peak learning rate of a part: its own, or the common one."""
    own: float | None = getattr(optim, f"{part}_learning_rate")
    return optim.learning_rate if own is None else own


def _modules(model: Llava) -> dict[Part, nn.Module]:
    return {
        "vision_tower": model.vision_tower,
        "projector": model.multi_modal_projector,
        "language_model": model.language_model,
    }


@torch.no_grad()
def _hold(model: Llava, tune: TuneSection, compute: torch.dtype) -> None:
    """Bring weights that never move into the format that they are held in, where loading has not done so yet."""
    for name, storage in plan_storage(model, tune, compute).items():
        parameter = model.get_parameter(name)
        if parameter.is_meta or not parameter.is_floating_point():
            continue
        if isinstance(storage, Nf4):
            path, value = name.removesuffix(".weight"), parameter.to(storage.compute)
            pack_layer(model, path, value, load_in="4bit", device=parameter.device, training=True)
        else:
            parameter.data = parameter.data.to(storage)


def _summarise(model: Llava, tune: TuneSection, part: Part, optim: OptimSection | None, unreached: int) -> PartSummary:
    mode = mode_of(tune, part)
    own = [(name, p) for name, p in model.named_parameters() if part_of(name) == part]
    trained = [(name, p) for name, p in own if p.requires_grad]
    sizes: dict[str, int] = {}
    for _, parameter in own:
        packed = hasattr(parameter, "quant_state")
        kind = "nf4" if packed else str(parameter.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + unpacked_numel(parameter)
    return PartSummary(
        part=part,
        mode=mode,
        parameters=sum(unpacked_numel(p) for _, p in own),
        trained=sum(p.numel() for _, p in trained),
        unreached=unreached,
        rows=sum(p.numel() for name, p in trained if name.endswith(f".{ROWS}")),
        rate=peak_rate(part, optim) if trained and optim is not None else None,
        rank=getattr(tune, f"{part}_lora").rank if mode in ("lora", "qlora") else None,
        held_in=", ".join(sorted(sizes, key=lambda kind: -sizes[kind])),
    )


def check_reached(model: Llava) -> None:
    """After the first backward pass with a picture: everything that should learn has a finite gradient.

    Raises TrainingError naming what is dead: a tensor without a gradient, one with a gradient that is not finite, or
    a part whose gradients are all exactly zero (it is cut off from the loss). Also 4 bit layers that lost their
    backward pass to bitsandbytes' repacking on CPUs: adapters behind them get a wrong gradient rather than none.
    A call of all processes, which agree: one of them may find nothing wrong itself, and then names no tensor.
    """
    repacked = [name for name, module in model.named_modules() if has_lost_its_gradient(module)]
    if any_process(bool(repacked)):
        raise TrainingError(
            f"bitsandbytes repacked {len(repacked)} layers ({_shown(repacked)}) in a CPU forward pass without "
            "gradients; that form has no backward pass, so what lies behind them gets a wrong gradient or none: open "
            "the model again, and run nothing on it before it trains"
        )
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    dead = [name for name, gradient in gradients.items() if gradient is None]
    if any_process(bool(dead)):
        raise TrainingError(f"{len(dead)} trained tensors got no gradient: {_shown(dead)}; freeze their part in `tune`")
    parts = {name: _own_part(gradient) for name, gradient in gradients.items() if gradient is not None}
    broken = [name for name, gradient in parts.items() if not bool(gradient.isfinite().all())]
    if any_process(bool(broken)):
        raise TrainingError(
            f"{len(broken)} trained tensors got a gradient that is not finite at the first step: {_shown(broken)}; "
            "look for weights or pictures that are not numbers (`llava model show`, `llava data check`)"
        )
    for part in PARTS:
        own = [gradient for name, gradient in parts.items() if part_of(name) == part]
        if own and not any_process(any(bool(gradient.count_nonzero()) for gradient in own)):
            raise TrainingError(f"every gradient of the {part} is zero; it is cut off from the loss")


def _own_part(gradient: Tensor) -> Tensor:
    """What this process holds of a sharded gradient; a whole one as it is."""
    return cast(Tensor, getattr(gradient, "to_local", lambda: gradient)())


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def describe_stage(summaries: Sequence[PartSummary]) -> list[tuple[str, ...]]:
    """Rows of the table under TABLE_HEAD, a total last."""
    rows = [
        (
            s.part,
            s.mode,
            f"{s.parameters:,}",
            f"{s.trained:,}"
            + (f" ({s.rows:,} in token rows)" * bool(s.rows))
            + (f" ({s.unreached:,} unreached)" * bool(s.unreached)),
            "" if s.rate is None else f"{s.rate:g}",
            "" if s.rank is None else str(s.rank),
            s.held_in,
        )
        for s in summaries
    ]
    total, trained = sum(s.parameters for s in summaries), sum(s.trained for s in summaries)
    return [*rows, ("all", "", f"{total:,}", f"{trained:,} ({trained / total:.1%})", "", "", "")]


def _freeze_unreached(model: Llava) -> int:
    """Freeze the tower's weights that a picture's features do not depend on; returns how many numbers they hold."""
    size = model.config.image_size
    with torch.enable_grad():
        features = model.encode_tiles(torch.zeros(1, 3, size, size, device=model.device))
        torch.autograd.backward(features.float().sum())
    unreached = 0
    for parameter in model.vision_tower.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
            unreached += parameter.numel()
    model.zero_grad(set_to_none=True)
    return unreached
