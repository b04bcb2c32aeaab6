"""Needed FLOPs against torch's own counter and the published arithmetic of LLaVA-1.5."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from llava.errors import UsageError
from llava.model.llava import Llava
from llava.model.lora import attach_lora
from llava.train.sections import TuneSection
from llava.train.stages import apply_stage
from llava.train.step_loss import StepLoss
from llava.train.throughput import Cost, Device, Work, hours, measure_rate, named_device
from tests.train.test_estimate import STAGE_1, STAGE_2, build_wide_llava, llava_7b, make_batch


class ProductCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """FLOPs of matrix products and convolutions, by torch's own formulas. Its FlopCounterMode cannot look inside
    autograd.grad, which the loss uses; attention is left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry and str(packet).startswith(("aten.mm", "aten.addmm", "aten.convolution")):
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def count_products(model: Llava) -> int:
    """FLOPs of the matrix products of linear layers and the tower's stem in a forward and backward pass, counted."""
    step_loss = StepLoss(model, dtype=torch.float32)
    step_loss.picks_positions = False  # needed FLOPs count the last block whole
    with ProductCounter() as counter:
        torch.autograd.backward(step_loss(make_batch()))
    return counter.flops


@pytest.mark.parametrize(
    "tune",
    [STAGE_1, STAGE_2, TuneSection(vision_tower="full", language_model="full"), TuneSection(vision_tower="full")],
    ids=["projector", "language model", "all", "tower"],
)
def test_needed_flops_are_those_that_torch_counts(tune: TuneSection) -> None:
    model = build_wide_llava()
    apply_stage(model, tune)
    batch = make_batch()
    work = replace(Work.of([batch]), tokens=batch.input_ids.numel(), pairs=0)  # torch computes the padding as well
    cost = Cost.of_model(model)
    side = model.config.patches_per_side**2
    tower_attention = 4 * 16 * (side + 1) ** 2 * 2 * (3 if tune.vision_tower == "full" else 1)
    expected = cost.of(work) - tower_attention * work.tiles
    assert count_products(model) == pytest.approx(expected, rel=0.01)


def test_an_adapters_flops_are_its_own_and_the_activations_gradients() -> None:
    model = build_wide_llava()
    apply_stage(model, STAGE_2)
    model.requires_grad_(False)
    attach_lora(model, r"language_model\..*_proj", rank=4, alpha=8, dropout=0.0)
    batch = make_batch()
    work = replace(Work.of([batch]), tokens=batch.input_ids.numel(), pairs=0)
    attention = 4 * 16 * (model.config.patches_per_side**2 + 1) ** 2 * 2
    expected = Cost.of_model(model).of(work) - attention * work.tiles
    # the first layer's projections of the embeddings need no gradient of their input: 3 of 28
    assert count_products(model) == pytest.approx(expected, rel=0.04)


def test_pairs_are_the_ones_of_the_mask() -> None:
    batch = make_batch()
    real = batch.tree_ids >= 0
    seen = batch.attention_mask()[:, 0] & real[:, :, None] & real[:, None, :]
    work = Work.of([batch, batch])
    assert work.pairs == 2 * int(seen.sum())
    assert work.tokens == 2 * int(real.sum())
    assert work.tiles == 2 * 6
    assert work.times(0.5) == Work.of([batch])


@pytest.mark.parametrize(
    ("tune", "work", "exaflops", "h200_hours"),
    [
        (STAGE_1, Work(334_000_000, 558_000 * 22, 558_000, 558_000 * 598 * 599 // 2), 9.19, 2.5),
        (STAGE_2, Work(571_000_000, 665_298 * 140, 624_610, 665_298 * 850 * 851 // 2), 23.3, 6.5),
    ],
    ids=["stage 1", "stage 2"],
)
def test_the_published_runs_need_what_was_worked_out_for_them(
    tune: TuneSection, work: Work, exaflops: float, h200_hours: float
) -> None:
    """7B on LCS-558K and mix665k; the reference counts the whole head where ours counts answers only."""
    model = llava_7b()
    apply_stage(model, tune)
    flops = Cost.of_model(model).of(work)
    assert flops / 1e18 == pytest.approx(exaflops, rel=0.03)
    assert hours(flops, named_device("h200"), mfu=1.0) == pytest.approx(h200_hours, rel=0.03)
    assert hours(flops, named_device("h200"), mfu=0.5, processes=2) == pytest.approx(h200_hours, rel=0.03)


def test_an_unknown_device_is_answered_with_the_nearest() -> None:
    assert named_device("H100").teraflops == 989
    with pytest.raises(UsageError, match=r"'h10'.*did you mean 'h100'"):
        named_device("h10")


def test_the_measured_rate_is_a_rate() -> None:
    rate = measure_rate(torch.device("cpu"), torch.float32)
    assert 1e-4 < rate < 1e3
    assert hours(rate * 1e12 * 3600, Device("cpu", rate, 0, True), mfu=1.0) == pytest.approx(1.0)
