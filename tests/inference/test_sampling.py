from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava.errors import EngineError
from llava.inference.sampling import Sampler, SamplingParams, filter_logits, penalise

logits_lists = st.lists(st.floats(-8, 8).map(lambda x: round(x, 2)), min_size=2, max_size=12, unique=True)


def brute_force(logits: list[float], params: SamplingParams) -> list[float]:
    """Probabilities of each token, with Python's numbers and loops."""
    weights = {i: math.exp((x - max(logits)) / params.temperature) for i, x in enumerate(logits)}
    by_weight = sorted(weights, key=lambda i: -weights[i])
    if params.top_k:
        by_weight = by_weight[: params.top_k]
    total = sum(weights[i] for i in by_weight)
    kept, reached = [], 0.0
    for i in by_weight:
        if kept and reached >= params.top_p:
            break
        kept.append(i)
        reached += weights[i] / total
    kept = [i for i in kept if weights[i] >= params.min_p * weights[kept[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@settings(deadline=None, max_examples=200)
@given(
    logits=logits_lists,
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.5]),
    top_k=st.integers(0, 5),
    top_p=st.sampled_from([0.11, 0.503, 0.907, 1.0]),
    min_p=st.sampled_from([0.0, 0.053, 0.3]),
)
def test_probabilities_equal_those_computed_by_hand(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probabilities = filter_logits(torch.tensor(logits), params).softmax(-1).tolist()
    assert probabilities == pytest.approx(brute_force(logits, params), abs=1e-5)


def test_probabilities_equal_those_of_transformers() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    seen = [3, 7, 7, 20]
    params = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(0.8),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ]
    )(torch.tensor([seen]), logits[None])[0]
    ours = filter_logits(penalise(logits, set(seen), penalty=1.3), params)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1))
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    counts = Counter(sampler.pick(logits) for _ in range(3000))
    # three standard deviations of a share of 3000 draws are below 0.03
    assert [counts[i] / 3000 for i in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_the_same_seed_draws_the_same_tokens() -> None:
    logits = torch.zeros(100)
    draws = [
        [sampler.pick(logits) for _ in range(20)]
        for sampler in (Sampler(SamplingParams(temperature=1.0, seed=seed)) for seed in (5, 5, 6))
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_greedy_answer_with_a_penalty_leaves_what_it_has_said() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=1.5), prompt_ids=[0])
    logits = torch.tensor([3.0, 2.5, 2.4])
    assert [sampler.pick(logits) for _ in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0))
    assert sampler.pick(torch.tensor([1.0, 2.0, 1.5])) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", "nan"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 9),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("seed", 2**70),
        ("stop_token_ids", (-1,)),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(EngineError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
