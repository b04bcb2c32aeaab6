"""Reading orders: the original's length-grouped batches as recorded, and what every order promises."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.data.order import Order, deal_evenly, grouped_by_length, order_groups, signed_length, signed_lengths
from llava.data.sources import ConversationSet, read_conversations
from llava.prompt.conversation import from_record

GOLDEN = Path(__file__).parent.parent / "golden" / "sampler"
RECORDED = json.loads((GOLDEN / "expected.json").read_text())


def torch_permutations(seed: int | None = None) -> Callable[[int], list[int]]:
    """The stream that the recordings were drawn from; None is torch's global one."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return lambda n: torch.randperm(n, generator=generator).tolist()


def test_the_recorded_stream_is_todays() -> None:
    assert torch_permutations(123)(10) == RECORDED["randperm_seed123_10"]


@pytest.mark.parametrize("name", RECORDED["cases"])
def test_grouped_order_equals_the_originals(name: str) -> None:
    case = RECORDED["cases"][name]
    sizes = {"batch_size": case["batch_size"], "world_size": case["world_size"]}
    one_stream = grouped_by_length(case["lengths"], permute=torch_permutations(42), **sizes)
    assert one_stream == case["modality_seed42_global"]
    # The original hands its generator to the shuffle of the steps only; where there is one modality, to all of it.
    both = min(case["lengths"]) < 0 < max(case["lengths"])
    inner, outer = torch_permutations(42 if both else 7), torch_permutations(7)
    assert (
        grouped_by_length(case["lengths"], permute=inner, permute_steps=outer, **sizes)
        == case["modality_seed42_global_gen7"]
    )
    without_signs = [abs(length) for length in case["lengths"]]
    assert grouped_by_length(without_signs, permute=torch_permutations(7), **sizes) == case["length_gen7"]


@pytest.mark.parametrize("case", RECORDED["split_to_even_chunks"])
def test_items_are_dealt_as_the_original_deals_them(case: dict[str, list[int]]) -> None:
    assert deal_evenly(case["indices"], case["lengths"], case["num_chunks"]) == case["out"]  # type: ignore[arg-type]


def test_lengths_are_the_originals_with_the_sign_of_the_modality(tmp_path: Path) -> None:
    recorded = json.loads((GOLDEN / "dataset_lengths.json").read_text())
    assert [signed_length([from_record(record)]) for record in recorded["data"]] == recorded["modality_lengths"]
    (tmp_path / "mix.json").write_text(json.dumps(recorded["data"]))
    conversations = ConversationSet([read_conversations(tmp_path / "mix.json")])
    assert signed_lengths(conversations, [(0,), (1,), (0, 1)]) == [7, -3, 10]


def test_a_record_that_cannot_be_read_counts_one_word(tmp_path: Path) -> None:
    (tmp_path / "mix.jsonl").write_text('{"conversations": []}\n{"conversations": [{"from": "human", "value": ""}]}\n')
    conversations = ConversationSet([read_conversations(tmp_path / "mix.jsonl")])
    assert signed_lengths(conversations, [(0,), (1,)]) == [-1, -1]


def test_a_length_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="item 1 has length 0"):
        grouped_by_length([3, 0], batch_size=1, permute=range)


@given(
    lengths=st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=60),
    batch=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    order=st.sampled_from(["shuffled", "grouped_by_length", "file"]),
)
def test_every_order_reads_each_group_once_and_the_same_again(
    lengths: list[int], batch: int, seed: int, order: Order
) -> None:
    first, again, next_epoch = (
        order_groups(order, len(lengths), seed=seed, epoch=epoch, lengths=lengths, batch_size=batch)
        for epoch in (0, 0, 1)
    )
    assert sorted(first.tolist()) == list(range(len(lengths)))
    np.testing.assert_array_equal(first, again)
    if order == "file":
        np.testing.assert_array_equal(first, next_epoch)


@given(lengths=st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=60), seed=st.integers(0, 99))
def test_the_number_of_processes_changes_no_steps_set(lengths: list[int], seed: int) -> None:
    sets = []
    for batch, world in ((8, 1), (4, 2), (1, 8)):
        random = np.random.default_rng(seed)
        order = grouped_by_length(
            lengths, batch_size=batch, world_size=world, permute=lambda n, random=random: random.permutation(n).tolist()
        )
        sets.append([sorted(order[start : start + 8]) for start in range(0, len(order), 8)])
    # All but the last run of one modality, which is dealt before it is cut, are whole steps.
    assert sets[0] == sets[1] == sets[2]


def test_grouped_steps_hold_one_modality_and_like_lengths() -> None:
    random = np.random.default_rng(0)
    lengths = (random.integers(1, 200, 400) * random.choice([1, -1], 400)).tolist()
    order = order_groups("grouped_by_length", 400, seed=3, epoch=0, lengths=lengths, batch_size=20)
    steps = [[lengths[i] for i in order[start : start + 20]] for start in range(0, 400, 20)]
    assert all(min(step) > 0 or max(step) < 0 for step in steps[:-2])
    assert all([abs(n) for n in step] == sorted((abs(n) for n in step), reverse=True) for step in steps[:-2])
