"""What is computed again changes no gradient, and what is kept is as little as it says."""

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from llava.data.batch import Batch, build_batch
from llava.model.checkpointing import Checkpointing, find_blocks, set_checkpointing
from llava.model.llava import Llava
from tests.train.tiny_training import build_tiny_llava, grow, make_mixed_conversations

MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")


def make_batch() -> Batch:
    return build_batch([grow(make_mixed_conversations())], pad_token_id=0)


def run(model: Llava, batch: Batch) -> Tensor:
    hidden = model(batch.input_ids, pixel_values=batch.pixel_values, attention_mask=batch.attention_mask())
    return model.logits(hidden.flatten(0, 1)[batch.predictors]).square().mean()


def gradients(model: Llava, batch: Batch) -> dict[str, Tensor]:
    torch.manual_seed(7)  # for dropout
    model.zero_grad()
    run(model, batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept_numbers(work: Callable[[], Tensor]) -> int:
    """How many numbers autograd keeps that are not parameters, views of one storage counted once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or not tensor.requires_grad:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = work()
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tower_trains", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_the_same_to_the_bit(mode: Checkpointing, tower_trains: bool, dropout: float) -> None:
    model = build_tiny_llava(dropout=dropout).train()
    model.vision_tower.requires_grad_(tower_trains)
    batch = make_batch()
    expected = gradients(model, batch)
    names = [name for name, _ in model.named_parameters()]
    set_checkpointing(model, mode)
    made = gradients(model, batch)
    assert [name for name, _ in model.named_parameters()] == names
    assert made.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(made[name], gradient), name


def test_full_computes_blocks_twice_and_selective_only_what_is_cheap() -> None:
    batch = make_batch()
    calls = {}
    for mode in MODES:
        model = build_tiny_llava()
        set_checkpointing(model, mode)
        with Counted() as counted:
            run(model, batch).backward()
        calls[mode] = counted.products
    assert calls["selective"] == calls["none"]
    assert calls["full"] > calls["none"]


def test_a_frozen_block_is_checkpointed_too_although_it_is_in_eval_mode() -> None:
    """transformers' own switch does nothing outside training mode, which a frozen language model is in."""
    model = build_tiny_llava()
    model.language_model.requires_grad_(False).eval()
    batch = make_batch()
    before = kept_numbers(lambda: run(model, batch))
    set_checkpointing(model, "full")
    assert kept_numbers(lambda: run(model, batch)) < before


def test_a_copy_is_checkpointed_by_itself() -> None:
    model = build_tiny_llava()
    set_checkpointing(model, "full")
    twin = copy.deepcopy(model)
    batch = make_batch()
    expected, made = gradients(model, batch), gradients(twin, batch)
    for name, gradient in expected.items():
        assert torch.equal(made[name], gradient), name


def test_nothing_is_kept_below_the_lowest_trained_parameter() -> None:
    """Four blocks, of which 4, 3, ... 0 are frozen from below: each frozen one keeps nothing."""
    batch = make_batch()
    kept = []
    for frozen in range(4, -1, -1):
        model = build_tiny_llava(layers=4)
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        for block in find_blocks(model.decoder)[frozen:]:
            block.requires_grad_(True)
        kept.append(kept_numbers(lambda model=model: run(model, batch)))
    token_row = batch.input_ids.numel() * 32  # numbers of one hidden state
    steps = [after - before for before, after in pairwise(kept)]
    assert kept[0] < 2 * token_row  # what the output layer needs
    assert min(steps) > 10 * token_row  # a block that learns keeps tens of numbers a token and width
    assert max(steps) < 1.1 * min(steps)  # and the frozen ones below it nothing


def test_a_frozen_tower_keeps_nothing() -> None:
    model = build_tiny_llava()
    pixels = torch.randn(3, 3, 8, 8)
    model.vision_tower.requires_grad_(False)
    model.multi_modal_projector.requires_grad_(False)
    assert kept_numbers(lambda: torch.cat(model.encode_images(pixels))) == 0


def test_the_lowest_blocks_of_a_tower_whose_last_ones_train_keep_nothing() -> None:
    pixels = torch.randn(3, 3, 8, 8)
    kept = []
    for trained in (1, 2):
        model = build_tiny_llava()
        model.vision_tower.requires_grad_(False)
        blocks = find_blocks(model.vision_tower)[:2]  # features are read before the third
        for block in blocks[-trained:]:
            block.requires_grad_(True)
        kept.append(kept_numbers(lambda model=model: torch.cat(model.encode_images(pixels))))
    assert kept[1] > 1.5 * kept[0]


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """How many matrix products of two matrices are computed."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.products += 1
        return func(*args, **(kwargs or {}))
