"""The least recomputation that fits: the modes' order, the choice, and that nothing is estimated when all fits."""

import logging

import pytest
import torch

from llava.data.batch import Batch, build_batch
from llava.train import recompute
from llava.train.estimate import MicroBatch, Sharding
from llava.train.recompute import apply_recomputation, bound_memory, estimate_modes, largest_micro_batch
from llava.train.sections import Recipe
from tests.train.tiny_training import build_tiny_llava, grow, make_mixed_conversations

TOKENS = 4096


def make_recipe(**run: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "a"},
            "data": {"files": ["b"]},
            "optim": {"learning_rate": 1e-3},
            "run": {"micro_batch_tokens": TOKENS, **run},
        }
    )


def make_batches() -> list[Batch]:
    return [build_batch([grow(make_mixed_conversations(seed))], pad_token_id=0) for seed in range(2)]


def needs() -> dict[str, int]:
    largest = largest_micro_batch(make_batches(), TOKENS)
    return estimate_modes(build_tiny_llava(), largest, dtype=torch.float32, optimizer="adamw", sharding=Sharding())  # type: ignore[return-value]


def test_every_mode_needs_less_than_the_one_before_and_all_less_than_the_bound() -> None:
    found = needs()
    bound = bound_memory(build_tiny_llava(), TOKENS, optimizer="adamw", dtype=torch.float32)
    assert bound > found["none"] > found["selective"] > found["full"]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_auto_takes_the_first_mode_that_fits(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = int(1.01 * needs()[mode] / recompute.USABLE_SHARE)
    monkeypatch.setattr(recompute, "memory_of", lambda device: memory)
    model = build_tiny_llava()
    with caplog.at_level(logging.INFO, logger="llava.train.recompute"):
        made = apply_recomputation(
            make_recipe(), model, make_batches(), device=torch.device("cpu"), dtype=torch.float32
        )
    assert made == mode
    assert f"activation checkpointing: {mode}" in caplog.text


def test_nothing_is_estimated_for_a_model_that_fits_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "estimate_modes", lambda *a, **k: pytest.fail("estimated"))
    made = apply_recomputation(
        make_recipe(), build_tiny_llava(), make_batches(), device=torch.device("cpu"), dtype=torch.float32
    )
    assert made == "none"


def test_what_the_recipe_says_is_done_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "estimate_modes", lambda *a, **k: pytest.fail("estimated"))
    set_to = []
    monkeypatch.setattr(recompute, "set_checkpointing", lambda model, mode: set_to.append(mode))
    recipe = make_recipe(activation_checkpointing="selective")
    apply_recomputation(recipe, build_tiny_llava(), [], device=torch.device("cpu"), dtype=torch.float32)
    assert set_to == ["selective"]


def test_the_largest_micro_batch_is_scaled_to_the_budget() -> None:
    batches = make_batches()
    shape = largest_micro_batch(batches, 10 * batches[0].input_ids.numel() + 1)
    assert shape.rows * shape.tokens >= 9 * batches[0].input_ids.numel()
    assert largest_micro_batch(batches, 8) == MicroBatch.of(max(batches, key=lambda b: b.input_ids.numel()))
