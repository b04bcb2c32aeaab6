"""Two processes compute what one does, whatever each of them has to read."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava.train.parallel import Mode
from tests.train.bad_sample_cases import read_all
from tests.train.parallel_cases import Case, Modality, take_gradients, take_steps
from tests.train.process_pair import ProcessPair

MODES: tuple[Mode, ...] = ("ddp", "zero2", "zero3")


def assert_equal_gradients(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert got["record"].loss == pytest.approx(wanted["record"].loss, rel=1e-5)
    assert got["record"].grad_norm == pytest.approx(wanted["record"].grad_norm, rel=1e-5)
    for count in ("tokens", "positions", "answer_tokens"):
        assert getattr(got["record"], count) == getattr(wanted["record"], count)
    # A process without pictures has exact zeros where one process alone has nothing.
    zeros = {name for name in set(got["gradients"]) - set(wanted["gradients"]) if got["gradients"][name].any()}
    assert not zeros
    largest = max(float(np.abs(gradient).max()) for gradient in wanted["gradients"].values())
    for name, gradient in wanted["gradients"].items():
        np.testing.assert_allclose(
            got["gradients"][name], gradient, rtol=1e-5, atol=1e-6 * largest, err_msg=f"gradient of {name}"
        )


@pytest.mark.parametrize("many", [False, True], ids=["one-batch", "micro-batches"])
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_have_the_loss_and_gradient_of_one(pair: ProcessPair, mode: Mode, many: bool) -> None:
    case = Case(mode, many=many)
    alone = take_gradients(replace(case, many=False))
    assert alone["gradients"]
    first, second = pair.run(take_gradients, case)
    assert_equal_gradients(first, alone)
    assert second["record"].loss == first["record"].loss, "every process records the loss of all"
    assert second["record"].grad_norm == first["record"].grad_norm


def test_micro_batches_of_one_row_have_the_loss_and_gradient_of_one_batch() -> None:
    assert_equal_gradients(take_gradients(Case(many=True)), take_gradients(Case(many=False)))


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_every_pattern_of_pictures_and_text_on_two_processes_gives_the_gradient_of_one(
    pair: ProcessPair, mode: Mode
) -> None:
    kinds: tuple[Modality, ...] = ("pictures", "text", "both", "nothing")
    for shares in product(kinds, kinds):
        case = Case(mode, shares=shares, many=shares[0] == "both")  # also another number of micro-batches on each
        first, _ = pair.run(take_gradients, case)
        alone = take_gradients(replace(case, many=False))
        if shares == ("nothing", "nothing"):
            assert first["record"].skipped and not first["gradients"]
            continue
        assert_equal_gradients(first, alone)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "tune",
    [
        (),
        (("language_model", "lora"),),
        (("language_model", "lora"), ("vision_tower", "lora")),
        (("language_model", "last_layers"), ("language_model_layers", 1)),
    ],
    ids=["stage-1", "lora", "both-lora", "last-layer"],
)
def test_what_is_frozen_or_adapted_changes_nothing_about_that(pair: ProcessPair, mode: Mode, tune: Any) -> None:
    for shares in (("pictures", "text"), ("nothing", "again")):
        case = Case(mode, shares=shares, tune=tune, many=True)
        first, _ = pair.run(take_gradients, case)
        assert_equal_gradients(first, take_gradients(replace(case, many=False)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ["newline", "dinov2", "added rows"])
def test_every_kind_of_part_is_reached_on_a_process_with_text_only(pair: ProcessPair, mode: Mode, model: str) -> None:
    tune = (("vision_tower", "full"),) if model != "added rows" else ()
    case = Case(mode, shares=("text", "pictures"), model=model, tune=tune)
    first, _ = pair.run(take_gradients, case)
    alone = take_gradients(case)
    assert_equal_gradients(first, alone)
    expected = {"newline": "image_newline", "added rows": "language_model.model.embed_tokens.added_rows"}
    assert expected.get(model, "multi_modal_projector.linear_1.weight") in alone["gradients"]


@pytest.mark.parametrize("mode", MODES)
def test_steps_end_in_the_weights_of_one_process(pair: ProcessPair, mode: Mode) -> None:
    case = Case(mode, shares=("both", "pictures"), steps=3, max_grad_norm=0.1)  # so that clipping counts
    first, second = pair.run(take_steps, case)
    alone = take_steps(case)
    assert [record.loss for record in first["records"]] == pytest.approx(
        [record.loss for record in alone["records"]], rel=1e-5
    )
    assert first["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        np.testing.assert_allclose(first["weights"][name], weight, rtol=1e-5, atol=1e-6, err_msg=name)
    assert not second["weights"], "the first process alone has the model to save"


def test_weights_and_moments_may_wait_in_cpu_memory(pair: ProcessPair) -> None:
    case = Case("zero3", steps=2, max_grad_norm=0.1, cpu_offload=True)
    first, _ = pair.run(take_steps, case)
    alone = take_steps(replace(case, cpu_offload=False))
    for name, weight in alone["weights"].items():
        np.testing.assert_allclose(first["weights"][name], weight, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_towers_blocks_are_sharded_and_the_tower_is_not(pair: ProcessPair) -> None:
    first, _ = pair.run(take_steps, Case("zero3"))
    sharded = [name.removeprefix("model.") for name in first["sharded"]]
    blocks = [f"vision_tower.encoder.layers.{n}" for n in range(3)]
    assert sorted(sharded) == sorted(["", *blocks, *(f"language_model.model.layers.{n}" for n in range(2))])


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_computes_what_autocast_does_on_one_process(pair: ProcessPair, mode: Mode) -> None:
    case = Case(mode, shares=("both", "text"), dtype="bfloat16", steps=3, max_grad_norm=0.1)
    first, _ = pair.run(take_steps, case)
    alone = take_steps(case)
    losses = [[record.loss for record in side["records"]] for side in (first, alone)]
    # The first to the bit's rounding; later the blocks' norm weights are rounded under zero2 and zero3.
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] != take_steps(replace(case, dtype="float32"))["records"][-1].loss, "bfloat16 was not used"
    assert {weight.dtype for weight in first["weights"].values()} == {np.dtype("float32")}


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_not_finite_on_one_process_is_skipped_by_all(pair: ProcessPair, mode: Mode) -> None:
    case = Case(mode, shares=("both", "both"), steps=3, poisoned_step=1)
    first, second = pair.run(take_steps, case)
    for records in (first["records"], second["records"]):
        assert [record.skipped for record in records] == [False, True, False]
        assert not np.isfinite(records[1].loss)
        assert np.isfinite(records[2].loss)
    alone = take_steps(case)
    assert first["records"][2].loss == pytest.approx(alone["records"][2].loss, rel=1e-5)


def test_frozen_weights_in_bfloat16_go_with_adapters_in_float32(pair: ProcessPair) -> None:
    case = Case("zero3", shares=("text", "both"), dtype="bfloat16", steps=2, tune=(("language_model", "lora"),))
    first, _ = pair.run(take_steps, case)
    alone = take_steps(case)
    assert [r.loss for r in first["records"]] == pytest.approx([r.loss for r in alone["records"]], rel=1e-4)
    assert first["weights"].keys() == alone["weights"].keys()
    assert any(".lora_" in name for name in first["weights"])


def test_a_process_whose_answers_are_all_masked_does_its_part(pair: ProcessPair) -> None:
    for mode in MODES:
        case = Case(mode, shares=("silent", "pictures"))
        first, _ = pair.run(take_gradients, case)
        assert_equal_gradients(first, take_gradients(case))


def test_both_processes_know_the_bad_samples_of_either(pair: ProcessPair, tmp_path: Path) -> None:
    first, second = pair.run(read_all, (tmp_path, 0.5))
    assert first == second
    assert sorted(number for number, *_ in first["state"]["entries"]) == list(range(0, 200, 5))
    assert first["state"]["seen"] == 200
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 40


def test_too_many_bad_samples_end_both_processes_at_the_same_step(pair: ProcessPair, tmp_path: Path) -> None:
    first, second = pair.run(read_all, (tmp_path, 0.001))
    assert first["position"] == second["position"] < 25
    assert "more than data.max_bad_share=0.001" in first["problem"]
    assert first["state"] == second["state"]
