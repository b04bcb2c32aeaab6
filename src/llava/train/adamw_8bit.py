"""AdamW whose moments take one byte each instead of four. Not exact: moments are rounded to 256 values a block.

Blocks of 256 numbers share a scale, and the values are spaced by their magnitude (Dettmers et al. 2022, "8-bit
optimizers via block-wise quantization", arXiv:2110.02861). Of the second moment its root is kept: that has the range of
the first one, so that a small one beside a large one in its block does not become a division by nothing. Plain torch,
so it runs wherever training does. Tensors of fewer than 4,096 numbers keep float32 moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
SMALLEST = 4096
# Numbers of a tensor that are worked on at once: bounds the float32 copies.
_SLICE = BLOCK << 16


class AdamW8bit(torch.optim.Optimizer):
    """Decoupled weight decay as torch's AdamW. State a parameter: step, and two moments as (codes, scales)."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            _begin(state, parameter)
        state["step"] += 1
        done = float(state["step"])
        first, second = group["betas"]
        rate = group["lr"] / (1 - first**done)
        root = (1 - second**done) ** 0.5
        flat, gradient = parameter.view(-1), parameter.grad
        assert gradient is not None
        gradient = gradient.reshape(-1)
        for begin in range(0, len(flat), _SLICE):
            here = slice(begin, min(begin + _SLICE, len(flat)))
            g = gradient[here].float()
            mean = _read(state, "exp_avg", here, signed=True).lerp_(g, 1 - first)
            spread = _read(state, "exp_avg_root", here, signed=False)
            spread = spread.square_().mul_(second).addcmul_(g, g, value=1 - second).sqrt_()
            _write(state, "exp_avg", here, mean, signed=True)
            _write(state, "exp_avg_root", here, spread, signed=False)
            change = mean.div_(spread.div_(root).add_(group["eps"])).mul_(-rate)
            kept = flat[here].float().mul_(1 - group["lr"] * group["weight_decay"])
            flat[here] = kept.add_(change).to(flat.dtype)


def _begin(state: dict[str, Any], parameter: Tensor) -> None:
    count = parameter.numel()
    state["step"] = torch.zeros((), dtype=torch.float32)
    for name, signed in (("exp_avg", True), ("exp_avg_root", False)):
        if count < SMALLEST:
            state[name] = torch.zeros(count, dtype=torch.float32, device=parameter.device)
            continue
        zero = int((code_values(signed) == 0).nonzero())
        state[name] = torch.full((count,), zero, dtype=torch.uint8, device=parameter.device)
        state[f"{name}_scale"] = torch.zeros(-(-count // BLOCK), dtype=torch.float32, device=parameter.device)


def _read(state: dict[str, Any], name: str, here: slice, *, signed: bool) -> Tensor:
    """The moment at these places, a float32 tensor of its own."""
    codes = state[name][here]
    if codes.dtype == torch.float32:
        return torch.clone(codes)
    values = code_values(signed).to(codes.device)
    scales = state[f"{name}_scale"][here.start // BLOCK : -(-here.stop // BLOCK)]
    return values[codes.long()].mul_(scales.repeat_interleave(BLOCK)[: len(codes)])


def _write(state: dict[str, Any], name: str, here: slice, moment: Tensor, *, signed: bool) -> None:
    if state[name].dtype == torch.float32:
        state[name][here] = moment
        return
    count = len(moment)
    blocks = torch.nn.functional.pad(moment, (0, -count % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    shares = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).flatten()[:count]
    values = code_values(signed).to(moment.device)
    codes = torch.bucketize(shares, (values[1:] + values[:-1]) / 2)
    if not signed:
        codes = torch.where(shares > 0, codes.clamp(min=1), codes)  # a root that is not zero never becomes one
    state[name][here] = codes.to(torch.uint8)
    state[f"{name}_scale"][here.start // BLOCK : -(-here.stop // BLOCK)] = scales


@lru_cache(maxsize=2)
def code_values(signed: bool) -> Tensor:
    """(256,) ascending values in [-1, 1] or [0, 1]: seven decades, each halved in number towards 0 (the paper's dynamic
    tree)."""
    found = [0.0, 1.0]
    for decade in range(7):
        items = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, items + 1, dtype=torch.float64)
        means = (10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2).tolist()
        found += means + ([-value for value in means] if signed else [])
    return torch.tensor(sorted(found), dtype=torch.float32)
