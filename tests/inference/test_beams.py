from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llava.errors import ContextLengthError, EngineError
from llava.inference.beams import search_beams
from llava.inference.decoder import PlainDecoder
from llava.inference.engine import Engine
from llava.inference.lean import LeanDecoder
from llava.inference.sampling import SamplingParams
from tests.inference.models import Seeing, prompt, random_ids, tiny_llama, tiny_qwen2

DECODERS: list[type[Any]] = [LeanDecoder, PlainDecoder]


def reference(model: Any, ids: Any, *, beams: int, n: int, stops: list[int], length_penalty: float) -> list[int]:
    """What transformers says, without what it pads the end with."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor(ids)[None],
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=n,
            length_penalty=length_penalty,
            eos_token_id=stops or None,
            pad_token_id=0,
        )
    said = out[0, len(ids) :].tolist()
    ends = [i for i, token_id in enumerate(said) if token_id in stops]
    return said[: ends[0] + 1] if ends else said


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("beams", "length_penalty"), [(1, 1.0), (2, 1.0), (3, 0.6), (4, 2.0), (3, -0.5)])
def test_the_answers_are_those_of_transformers(decoder: type[Any], beams: int, length_penalty: float) -> None:
    model = tiny_llama()
    seeing = Seeing(model)
    engine = Engine(seeing, decoder=decoder(seeing))
    stops = [7, 21, 40]
    rows = [random_ids(6 + seed, seed=seed) for seed in range(6)]
    params = SamplingParams(max_new_tokens=12, stop_token_ids=tuple(stops))
    found = search_beams(
        engine, [prompt(ids) for ids in rows], beams=beams, params=params, length_penalty=length_penalty
    )
    wanted = [reference(model, ids, beams=beams, n=12, stops=stops, length_penalty=length_penalty) for ids in rows]
    assert [list(completion.token_ids) for completion in found] == wanted
    assert {completion.finish_reason for completion in found} <= {"stop", "length"}


def test_some_answers_end_and_some_are_cut() -> None:
    """The comparison above would be worth little if no beam ever met a stop token."""
    seeing = Seeing(tiny_llama())
    params = SamplingParams(max_new_tokens=12, stop_token_ids=(7, 21, 40))
    rows = [prompt(random_ids(6 + seed, seed=seed)) for seed in range(6)]
    reasons = {completion.finish_reason for completion in search_beams(Engine(seeing), rows, beams=3, params=params)}
    assert reasons == {"stop", "length"}


def test_one_beam_is_the_greedy_answer() -> None:
    engine = Engine(Seeing(tiny_qwen2()))
    ids = random_ids(9, seed=1)
    params = SamplingParams(max_new_tokens=8)
    (found,) = search_beams(engine, [prompt(ids)], beams=1, params=params)
    assert list(found.token_ids) == list(engine.submit(prompt(ids), params))


def test_a_picture_is_read_and_all_memory_given_back() -> None:
    seeing = Seeing(tiny_llama())
    decoder = LeanDecoder(seeing)
    engine = Engine(seeing, decoder=decoder)
    (found,) = search_beams(engine, [prompt([4, 5], picture=0.5)], beams=3, params=SamplingParams(max_new_tokens=5))
    assert len(found.token_ids) == 5
    assert found.num_prompt_tokens == 5
    assert decoder.cache_bytes == 0


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_search_that_fails_leaves_nothing_behind(decoder: type[Any]) -> None:
    seeing = Seeing(tiny_llama())
    made = decoder(seeing)
    engine = Engine(seeing, decoder=made)
    with pytest.raises(ContextLengthError):
        search_beams(engine, [prompt([4]), prompt(np.full(200, 5))], beams=2, params=SamplingParams(max_new_tokens=5))
    assert not getattr(made, "_caches", {})
    assert getattr(made, "cache_bytes", 0) == 0


def test_values_out_of_range_are_refused() -> None:
    engine = Engine(Seeing(tiny_llama()))
    with pytest.raises(EngineError, match="beams = 0"):
        search_beams(engine, [prompt([4])], beams=0, params=SamplingParams())
    with pytest.raises(EngineError, match="temperature"):
        search_beams(engine, [prompt([4])], beams=2, params=SamplingParams(temperature=1.0))
