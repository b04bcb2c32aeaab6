"""Moments in a byte: near torch's AdamW, exact where tensors are small, small on disk and in memory."""

import pytest
import torch
from torch import nn

from llava.train.adamw_8bit import BLOCK, AdamW8bit, code_values
from llava.train.optimizer import build_optimizer
from llava.train.sections import OptimSection
from llava.train.state import collect_tensors, restore_tensors

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, start: int = 0) -> float:
    teacher = torch.randn(96, 96, generator=torch.Generator().manual_seed(5)) / 10
    loss = torch.zeros(())
    for step in range(start, start + steps):
        inputs = torch.randn(32, 96, generator=torch.Generator().manual_seed(step))
        loss = (model(inputs) - inputs @ teacher).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 96)


def test_small_tensors_are_updated_as_torch_does() -> None:
    mine, theirs = (nn.Linear(20, 20) for _ in range(2))
    theirs.load_state_dict(mine.state_dict())
    pair = AdamW8bit(mine.parameters(), **OPTIONS), torch.optim.AdamW(theirs.parameters(), **OPTIONS)
    for step in range(5):
        inputs = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((mine, theirs), pair, strict=True):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_large_tensors_learn_as_well_as_with_torchs() -> None:
    losses = []
    for kind in (AdamW8bit, torch.optim.AdamW):
        model = make_model()
        losses.append(train(model, kind(model.parameters(), **OPTIONS), 150))
    first = train(make_model(), torch.optim.SGD(make_model().parameters(), lr=0.0), 1)
    assert losses[1] < 0.1 * first
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_gradients_of_any_magnitude_side_by_side_move_their_weights_alike() -> None:
    """A second moment rounded to nothing would divide by eps and throw its weight away."""
    weight = nn.Parameter(torch.zeros(4096))
    scale = 10.0 ** -torch.linspace(0, 6, 4096)[torch.randperm(4096, generator=torch.Generator().manual_seed(0))]
    optimizer = AdamW8bit([weight], lr=1e-2)
    for _ in range(20):
        weight.grad = scale.clone()
        optimizer.step()
    moved = weight.detach()
    assert float(moved.max()) < 0
    assert float(moved.min()) > -0.5  # 20 steps of .01, a factor for rounding


def test_a_byte_a_moment_and_a_scale_a_block() -> None:
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), **OPTIONS)
    train(model, optimizer, 1)
    state = optimizer.state[model.weight]
    assert sum(t.numel() * t.element_size() for t in state.values()) == 2 * (96 * 96 + 4 * 96 * 96 // BLOCK) + 4


def test_a_run_that_was_stopped_goes_on_to_the_bit() -> None:
    straight = make_model()
    train(straight, AdamW8bit(straight.parameters(), **OPTIONS), 6)
    stopped = make_model()
    optimizer = AdamW8bit(stopped.parameters(), **OPTIONS)
    train(stopped, optimizer, 3)
    cpu = torch.device("cpu")
    saved = {name: tensor.clone() for name, tensor in collect_tensors(stopped, optimizer, cpu).items()}
    again = make_model()
    optimizer = AdamW8bit(again.parameters(), **OPTIONS)
    restore_tensors(saved, again, optimizer, cpu)
    train(again, optimizer, 3, start=3)
    assert torch.equal(again.weight, straight.weight)
    assert torch.equal(again.bias, straight.bias)


@pytest.mark.parametrize("signed", [True, False])
def test_there_are_256_different_values_and_zero_is_one_of_them(signed: bool) -> None:
    values = code_values(signed)
    assert len(values) == len(values.unique()) == 256
    assert values[-1] == 1 and 0 in values
    assert bool(values.min() < 0) is signed


def test_the_recipe_chooses_it() -> None:
    model = nn.ModuleDict({"language_model": nn.Linear(4, 4)})
    optim = OptimSection(learning_rate=1e-3, optimizer="adamw_8bit")
    optimizer = build_optimizer(model.named_parameters(), optim)
    assert isinstance(optimizer, AdamW8bit)
    assert optimizer.param_groups[0]["peak"] == 1e-3
