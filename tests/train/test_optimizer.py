"""Groups, peaks and the schedule."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from llava.model.llava import Llava
from llava.train.optimizer import build_optimizer, clip_gradients, rate_share, set_rate
from llava.train.sections import OptimSection, TuneSection
from llava.train.stages import apply_stage


def optim(**changes: object) -> OptimSection:
    return OptimSection(**{"learning_rate": 1e-3, **changes})  # type: ignore[arg-type]


def test_matrices_decay_and_vectors_do_not(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    apply_stage(model, TuneSection(language_model="full"))
    groups = build_optimizer(model.named_parameters(), optim(weight_decay=0.1)).param_groups
    for group in groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_each_part_has_its_own_peak(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    apply_stage(model, TuneSection(vision_tower="full", language_model="full"))
    rates = optim(projector_learning_rate=5e-3, vision_tower_learning_rate=1e-5)
    built = build_optimizer(model.named_parameters(), rates)
    set_rate(built, 0.5)
    by_parameter = {id(p): group["lr"] for group in built.param_groups for p in group["params"]}
    assert by_parameter[id(model.multi_modal_projector.linear_1.weight)] == 2.5e-3
    assert by_parameter[id(model.embed_tokens.weight)] == 5e-4
    tower = {by_parameter[id(p)] for p in model.vision_tower.parameters() if p.requires_grad}
    assert tower == {5e-6}


def test_the_cosine_rises_to_its_peak_and_falls_to_its_end() -> None:
    shares = [rate_share(step, 100, optim(warmup_share=0.1, final_share=0.2)) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[10] == 1.0
    assert all(a >= b for a, b in pairwise(shares[9:]))
    assert shares[55] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert 0.2 < shares[-1] < 0.21


def test_a_part_of_a_warm_up_step_is_a_whole_one() -> None:
    shares = [rate_share(step, 50, optim(warmup_share=0.03)) for step in range(3)]  # 1.5 steps, as transformers rounds
    assert shares[:2] == [0.5, 1.0]
    assert rate_share(0, 10, optim(warmup_share=0.03)) == 1.0  # of a single step the first is the last


def test_linear_and_constant_schedules() -> None:
    assert rate_share(50, 100, optim(schedule="linear", warmup_share=0.0)) == pytest.approx(0.5)
    assert {rate_share(s, 10, optim(schedule="constant", warmup_share=0.0)) for s in range(10)} == {1.0}


def test_adamw_is_torchs_own(tiny_llava: Callable[..., Llava]) -> None:
    """One step with a known gradient against the published update rule."""
    weight = torch.nn.Parameter(torch.full((2, 2), 1.0))
    built = build_optimizer([("language_model.x", weight)], optim(weight_decay=0.1, learning_rate=0.01))
    set_rate(built, 1.0)
    weight.grad = torch.full((2, 2), 0.5)
    built.step()
    torch.testing.assert_close(
        weight.detach(), torch.full((2, 2), 1.0 - 0.01 * 0.1 * 1.0 - 0.01 * 1.0), rtol=1e-5, atol=0
    )


def test_clipping_returns_the_norm_before() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0)
    assert clip_gradients([weight], 1.0) == pytest.approx(6.0)
    assert weight.grad.norm().item() == pytest.approx(1.0, rel=1e-4)
