"""AdamW with decay groups and a rate per part, and the schedule as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from llava.train.adamw_8bit import AdamW8bit
from llava.train.sections import OptimSection
from llava.train.selection import Part, part_of
from llava.train.stages import peak_rate as peak_rate


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], optim: OptimSection) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, in groups by part and by decay.

    Matrices and embeddings decay; vectors (biases, norms, image_newline) do not. Each group carries `peak`, its peak
    learning rate, which `set_rate` scales.
    """
    members: dict[tuple[Part, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            members.setdefault((part_of(name), parameter.ndim >= 2), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "peak": peak_rate(part, optim),
            "lr": 0.0,
            "weight_decay": optim.weight_decay if decays else 0.0,
        }
        for (part, decays), parameters in members.items()
    ]
    betas = (optim.beta1, optim.beta2)
    if optim.optimizer == "adamw_8bit":
        return AdamW8bit(groups, betas=betas, eps=optim.eps)
    return torch.optim.AdamW(groups, betas=betas, eps=optim.eps, fused=True)


def rate_share(step: int, total_steps: int, optim: OptimSection) -> float:
    """The learning rate at a step (from 0) as a share of its peak.

    Warm-up reaches the peak at its last step; unlike in transformers its first step is not wasted on a rate of 0.

    >>> optim = OptimSection(learning_rate=1.0, warmup_share=0.2, final_share=0.1)
    >>> [round(rate_share(step, 10, optim), 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.55, 0.13]
    """
    warmup = math.ceil(optim.warmup_share * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if optim.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    falling = 1.0 - progress if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.final_share + (1.0 - optim.final_share) * falling


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group its peak rate times `share`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale the gradients to a norm of at most `limit`; returns the norm before, which may be inf or nan."""
    return float(nn.utils.clip_grad_norm_(parameters, limit, foreach=True))
