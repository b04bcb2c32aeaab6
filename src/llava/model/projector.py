"""Projectors: tower features to the language model's width.

In memory every layer is `linear_1` ... `linear_N`, the names that LlavaForConditionalGeneration writes for N = 2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava.errors import CheckpointError, name_nearest


class IdentityProjector(nn.Module):
    """Features as they are; both widths must agree."""

    num_layers = 0

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        if vision_width != text_width:
            raise CheckpointError(
                f"projector 'identity' needs equal widths, but the tower gives {vision_width} and the language model "
                f"takes {text_width}; use 'linear' or 'mlp2x_gelu'"
            )

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, Dv) to (N, P, D)."""
        return features


class MlpProjector(nn.Module):
    """`depth` linear layers with the exact (erf) GELU between them; depth 1 is the linear projector of LLaVA v0 and v1.

    After Liu et al. 2023 (arXiv:2304.08485), section 4.1, and 2023 (arXiv:2310.03744), section 3.2.
    """

    def __init__(self, vision_width: int, text_width: int, *, depth: int) -> None:
        super().__init__()
        self.num_layers = depth
        self.linear_1 = nn.Linear(vision_width, text_width)
        for index in range(2, depth + 1):
            setattr(self, f"linear_{index}", nn.Linear(text_width, text_width))

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, Dv) to (N, P, D)."""
        hidden: Tensor = self.linear_1(features)
        for index in range(2, self.num_layers + 1):
            hidden = getattr(self, f"linear_{index}")(functional.gelu(hidden))
        return hidden


# depth is the N of mlpNx_gelu; the other two have no such number
PROJECTORS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "linear": lambda vision, text, depth: MlpProjector(vision, text, depth=1),
    "mlpNx_gelu": lambda vision, text, depth: MlpProjector(vision, text, depth=depth),
    "identity": lambda vision, text, depth: IdentityProjector(vision, text),
}


def build_projector(name: str, vision_width: int, text_width: int) -> nn.Module:
    """A projector by its name in the configuration: "linear", "mlp2x_gelu" (any N), "identity".

    Raises CheckpointError for an unknown name or, for "identity", unequal widths.
    """
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", name)
    kind = "mlpNx_gelu" if match else name
    if kind not in PROJECTORS:
        raise CheckpointError(f"projector {name!r}; {name_nearest(name, PROJECTORS)}")
    return PROJECTORS[kind](vision_width, text_width, int(match.group(1)) if match else 1)


@torch.no_grad()
def initialise_projector(projector: nn.Module, *, seed: int) -> None:
    """Fill a new projector from a seed: Xavier-uniform weights and zero biases, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    for module in projector.modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            values = torch.rand(module.weight.shape, generator=generator) * 2 - 1
            module.weight.copy_((values * bound).to(module.weight))
            module.bias.zero_()


@torch.no_grad()
def scale_output(projector: nn.Module, features: Tensor, *, target_std: float) -> None:
    """Scale the last layer so that the projector's output on `features` (N, P, Dv) has the standard deviation given.

    A language model that was tuned on its own embeddings reads picture rows of their size from the first step; rows
    many times larger or smaller cost hundreds of steps of stage 1. Does nothing for the identity.
    """
    depth = int(projector.num_layers)  # type: ignore[arg-type]
    if depth == 0:
        return
    last = getattr(projector, f"linear_{depth}")
    std = projector(features.to(last.weight)).float().std().item()
    if std > 0:
        last.weight.mul_(target_std / std)
        last.bias.mul_(target_std / std)
