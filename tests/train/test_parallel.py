"""Two processes compute what one does, whatever each of them has to read."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava.train.parallel import Mode
from tests.train.bad_sample_cases import read_all
from tests.train.parallel_cases import Case, Modality, take_gradients
from tests.train.process_pair import ProcessPair

MODES: tuple[Mode, ...] = ("ddp", "zero2", "zero3")


@pytest.fixture(scope="module")
def pair() -> Iterator[ProcessPair]:
    with ProcessPair() as made:
        yield made


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


@pytest.mark.parametrize("mode", MODES)
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
