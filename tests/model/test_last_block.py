"""The last block at chosen positions only: the same there, less work, nothing left behind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava.model.language import run_language_model
from llava.model.last_block import last_block_only_at, position_wise_modules
from llava.model.tree_support import find_tree_support
from tests.model.test_tree_support import FAMILIES, build

CHOSEN = torch.tensor([2, 5, 6, 13])


def run(model: nn.Module, inputs: Tensor, positions: Tensor | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Hidden states at CHOSEN, and the gradients of their weighted sum."""
    model.zero_grad()
    inputs = inputs.clone().requires_grad_()
    with last_block_only_at(model, positions):
        hidden = run_language_model(model, inputs).flatten(0, 1)[CHOSEN]
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    assert inputs.grad is not None
    return hidden, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, inputs.grad


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mixtral"])
def test_what_is_read_and_every_gradient_is_the_same(family: str) -> None:
    model = build(family, FAMILIES[family])
    inputs = torch.randn(2, 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, wanted, below = run(model, inputs, None)
    made, got, got_below = run(model, inputs, CHOSEN)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_below, below, rtol=1e-5, atol=1e-6)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((got[name] - gradient).norm()) <= 1e-6 * float(gradient.norm()) + 1e-9, name


class Products(TorchDispatchMode):
    """Multiplications in matrix products of two matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.mm.default:
            self.count += args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        return func(*args, **(kwargs or {}))


def test_the_work_of_the_last_block_goes_with_the_positions() -> None:
    model: Any = build("llama", FAMILIES["llama"])
    inputs = torch.randn(2, 8, 32, dtype=torch.float64)
    counts = []
    for positions in (None, CHOSEN):
        with Products() as products:
            run(model, inputs, positions)
        counts.append(products.count)
    weights = sum(
        p.numel() for m in position_wise_modules(model) for p in m.parameters()
    )  # queries, output, feed-forward
    # forward, the input's gradient, the weights' own: for 12 tokens of 16 less
    assert counts[0] - counts[1] == 3 * weights * (16 - len(CHOSEN))


def test_outside_everything_is_computed_again() -> None:
    model = build("llama", FAMILIES["llama"])
    inputs = torch.randn(1, 8, 32, dtype=torch.float64)
    before = run_language_model(model, inputs)
    with pytest.raises(RuntimeError, match="stop"), last_block_only_at(model, torch.tensor([1])):
        assert not torch.equal(run_language_model(model, inputs), before)
        raise RuntimeError("stop")
    assert torch.equal(run_language_model(model, inputs), before)


def test_a_family_without_these_modules_computes_everything() -> None:
    model = build("gpt_neox", {})
    assert position_wise_modules(model) == []
    assert not find_tree_support(model).last_block
