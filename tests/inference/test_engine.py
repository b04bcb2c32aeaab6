from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava.errors import ContextLengthError, EngineError, OutOfMemoryError
from llava.inference.decoder import Group
from llava.inference.engine import Engine
from llava.inference.requests import EngineLimits, Request
from llava.inference.sampling import SamplingParams
from tests.inference.models import Seeing, prompt, random_ids, tiny_llama


class Counter:
    """A model that counts: after n comes n + 1, up to 99."""

    config = SimpleNamespace(image_token_id=63)
    device, context_length, bytes_per_token = torch.device("cpu"), 50, 1

    def __init__(self) -> None:
        self.alive: set[int] = set()
        self.groups: list[int] = []

    def encode_images(self, pixel_values: Tensor, **_: Any) -> list[Tensor]:
        return [torch.zeros(2, 1)] * len(pixel_values)

    def prefill(self, group: Group, branches: Sequence[int]) -> Tensor:
        self.alive |= set(branches)
        self.groups.append(len(branches))
        return self.after([int(suffix[-1]) for suffix in group.suffix_ids])

    def step(self, branches: Sequence[int], token_ids: Sequence[int]) -> Tensor:
        assert set(branches) <= self.alive
        return self.after(token_ids)

    def keep(self, branch: int) -> None:
        assert branch in self.alive

    def free(self, branches: Sequence[int]) -> None:
        self.alive -= set(branches)

    @staticmethod
    def after(ids: Sequence[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(ids) + 1, 100).float()


def counting_engine(**limits: int) -> tuple[Engine, Counter]:
    counter = Counter()
    return Engine(counter, decoder=counter, limits=EngineLimits(**limits)), counter  # type: ignore[arg-type]


def upto(n: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=n, **more)


def test_an_answer_comes_token_by_token() -> None:
    engine, counter = counting_engine()
    generation = engine.submit(prompt([5]), upto(3))
    assert list(generation) == [6, 7, 8]
    assert generation.finish_reason == "length"
    assert not counter.alive


def test_an_answer_ends_with_its_stop_token() -> None:
    engine, counter = counting_engine()
    generation = engine.submit(prompt([5]), upto(30, stop_token_ids=(8, 20)))
    assert list(generation) == [6, 7, 8]
    assert generation.finish_reason == "stop"
    assert not counter.alive


def test_many_requests_are_stepped_together_and_answered_in_order() -> None:
    engine, counter = counting_engine(max_active=4)
    requests = [Request(prompt([n]), upto(1 + n % 3)) for n in range(10)]
    seen = []
    completions = engine.generate(iter(requests), on_done=seen.append)
    assert [list(c.token_ids) for c in completions] == [list(range(n + 1, n + 2 + n % 3)) for n in range(10)]
    assert sum(seen) == 10
    assert not counter.alive


def test_a_request_may_join_while_others_are_answered() -> None:
    engine, _ = counting_engine()
    first = iter(engine.submit(prompt([5]), upto(5)))
    assert next(first) == 6
    second = engine.submit(prompt([40]), upto(2))
    assert next(first) == 7
    assert list(second) == [41, 42]
    assert list(first) == [8, 9, 10]


def test_cancelling_frees_the_answer_at_once() -> None:
    engine, counter = counting_engine()
    generations = [engine.submit(prompt([n]), upto(20)) for n in (1, 2, 3)]
    engine.step()
    generations[1].cancel()
    assert len(counter.alive) == 2
    assert generations[1].finish_reason == "cancelled"
    said = len(generations[1].token_ids)
    engine.step()
    assert len(generations[1].token_ids) == said
    assert len(list(generations[0])) == 20


def test_cancelling_before_the_first_step_does_no_work() -> None:
    engine, counter = counting_engine()
    engine.submit(prompt([1]), upto(20)).cancel()
    assert engine.step() == 0
    assert counter.groups == []


def test_a_prompt_as_long_as_the_context_is_refused_before_any_work() -> None:
    engine, counter = counting_engine()
    with pytest.raises(ContextLengthError, match=r"50 tokens.*context is 50"):
        engine.submit(prompt([1] * 50))
    assert len(list(engine.submit(prompt([1] * 49), upto(9)))) == 1
    assert len(list(engine.submit(prompt([1] * 48), upto(9)))) == 2
    assert counter.groups == [1, 1]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(EngineError, match="empty prompt"):
        counting_engine()[0].submit(prompt([]))


def test_out_of_memory_ends_one_request_and_not_the_engine() -> None:
    class Full(Counter):
        def prefill(self, group: Group, branches: Sequence[int]) -> Tensor:
            if len(group.suffix_ids[0]) > 10:
                raise torch.OutOfMemoryError("no memory")
            return super().prefill(group, branches)

    counter = Full()
    engine = Engine(counter, decoder=counter)  # type: ignore[arg-type]
    large, small = engine.submit(prompt([1] * 20), upto(3)), engine.submit(prompt([4]), upto(3))
    assert list(small) == [5, 6, 7]
    with pytest.raises(OutOfMemoryError, match="drop a picture"):
        list(large)
    assert not counter.alive


def test_a_picture_that_cannot_be_encoded_fails_its_own_request_only() -> None:
    class Picky(Counter):
        def encode_images(self, pixel_values: Tensor, **_: Any) -> list[Tensor]:
            if bool((pixel_values == 0.5).any()):
                raise ValueError("a picture this model cannot take")
            return super().encode_images(pixel_values)

    counter = Picky()
    engine = Engine(counter, decoder=counter)  # type: ignore[arg-type]
    bad = [engine.submit(prompt([5], picture=0.5), upto(2)) for _ in range(2)]
    good = [engine.submit(prompt([5], picture=0.4), upto(2)), engine.submit(prompt([8]), upto(2))]
    assert [list(generation) for generation in good] == [[6, 7], [9, 10]]
    for generation in bad:
        with pytest.raises(ValueError, match="cannot take"):
            list(generation)
    assert not counter.alive


def test_an_interruption_ends_what_was_under_way_and_keeps_what_waits() -> None:
    class Interrupted(Counter):
        def prefill(self, group: Group, branches: Sequence[int]) -> Tensor:
            if int(group.suffix_ids[0][-1]) == 7:
                raise KeyboardInterrupt
            return super().prefill(group, branches)

    counter = Interrupted()
    engine = Engine(counter, decoder=counter)  # type: ignore[arg-type]
    first, second, third = (engine.submit(prompt([n]), upto(2)) for n in (5, 7, 9))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert second.done
    assert list(first) == [6, 7]
    assert list(third) == [10, 11]
    assert not counter.alive


def test_output_that_is_not_a_number_is_an_error_and_not_an_answer() -> None:
    class Broken(Counter):
        @staticmethod
        def after(ids: Sequence[int]) -> Tensor:
            return torch.full((len(ids), 100), torch.nan)

    counter = Broken()
    with pytest.raises(EngineError, match="not finite"):
        list(Engine(counter, decoder=counter).submit(prompt([1])))  # type: ignore[arg-type]
    assert not counter.alive


def test_a_memory_budget_makes_requests_wait_but_not_for_ever() -> None:
    engine, counter = counting_engine(max_cache_bytes=30)
    requests = [Request(prompt([n]), upto(9)) for n in range(8)] + [Request(prompt([1] * 40), upto(9))]
    generations = [engine.submit(request.encoded, request.params) for request in requests]
    engine.step()
    assert len(counter.alive) == 3
    while engine.step():
        assert len(counter.alive) <= 3
    assert all(generation.finish_reason == "length" for generation in generations)


def test_a_greedy_answer_does_not_depend_on_its_company() -> None:
    engine = Engine(Seeing(tiny_llama()))
    lengths = (1, 25, 3, 60, 12, 12, 40)
    requests = [Request(prompt(random_ids(n, seed=i)), upto(5 + 4 * i)) for i, n in enumerate(lengths)]
    requests.insert(3, Request(prompt(random_ids(30, seed=99)), upto(40, temperature=1.0, seed=4)))
    alone = [list(engine.submit(request.encoded, request.params)) for request in requests]
    generations = []
    for request in requests:  # they join one by one, at different times
        generations.append(engine.submit(request.encoded, request.params))
        engine.step()
        engine.step()
    assert [list(generation) for generation in generations] == alone
    assert [list(completion.token_ids) for completion in engine.generate(reversed(requests))] == alone[::-1]


def test_cancelled_company_does_not_change_an_answer_and_memory_is_given_back() -> None:
    engine = Engine(Seeing(tiny_llama()))
    requests = [Request(prompt(random_ids(9, seed=n), picture=0.1 * (n % 2)), upto(30)) for n in range(6)]
    alone = [list(engine.submit(request.encoded, request.params)) for request in requests]
    generations = [engine.submit(request.encoded, request.params) for request in requests]
    for n in (0, 3, 1):
        engine.step()
        generations[n].cancel()
    assert [list(generations[n]) for n in (2, 4, 5)] == [alone[n] for n in (2, 4, 5)]
    assert engine.decoder.cache_bytes == 0  # type: ignore[attr-defined]
    assert engine.num_active == engine.num_waiting == 0


def test_questions_on_one_picture_read_it_once() -> None:
    model = Seeing(tiny_llama())
    engine = Engine(model)
    requests = [Request(prompt(random_ids(4, seed=n), picture=n // 6), upto(2)) for n in range(18)]
    engine.generate(requests)
    assert model.encoded_tiles == [3]
    engine.generate(requests[:6])
    assert model.encoded_tiles == [3], "the engine keeps the features of pictures that it has seen"
    engine.clear()
    engine.generate(requests[:6])
    assert model.encoded_tiles == [3, 1]


def test_prompts_are_read_together_when_they_begin_with_the_same_picture_or_a_long_text() -> None:
    engine, counter = counting_engine()
    same, other = prompt([5, 6], picture=0.5), prompt([5, 7], picture=0.6)
    long, alike = prompt([*range(30), 1, 2, 7]), prompt([*range(30), 1, 2, 9, 9])
    short = prompt([0, 1, 2])
    engine.generate([Request(encoded, upto(2)) for encoded in (same, other, same, long, short, alike, short, same)])
    assert sorted(counter.groups) == [1, 2, 2, 3]


def test_kept_features_stay_within_their_budget() -> None:
    model = Seeing(tiny_llama())
    engine = Engine(model, limits=EngineLimits(max_feature_bytes=600))  # a picture's are 256 bytes
    engine.generate([Request(prompt([5, 6], picture=n), upto(1)) for n in range(4)])
    engine.generate([Request(prompt([5, 6], picture=9), upto(1))])
    assert engine.feature_bytes <= 600
    model.encoded_tiles.clear()
    engine.generate([Request(prompt([5, 6], picture=9), upto(1))])
    assert model.encoded_tiles == []


def test_several_pictures_in_one_prompt_are_read_in_order() -> None:
    model = Seeing(tiny_llama())
    engine = Engine(model)
    one, two = prompt([5], picture=0.7), prompt([6, 7], picture=0.1)
    pixels = np.concatenate([one.pixel_values, two.pixel_values])
    ids = np.concatenate([one.input_ids, two.input_ids])
    both = type(one)(ids, np.full_like(ids, -100), pixels, ((4, 4), (4, 4)), (1, 1), (2, 2))
    features = torch.cat(model.encode_images(torch.tensor(pixels), image_sizes=None, tiles_per_image=[1, 1]))
    with torch.inference_mode():
        embeddings = model.embed(torch.tensor(ids)[None], features)
        expected = int(model.language_model(inputs_embeds=embeddings).logits[0, -1].argmax())
    engine.generate([Request(two, upto(1))])  # the second picture is known, the first is new
    assert list(engine.submit(both, upto(1))) == [expected]


def test_a_seeded_random_answer_can_be_repeated() -> None:
    engine = Engine(Seeing(tiny_llama()))
    encoded = prompt(random_ids(8, seed=0))
    answers = [list(engine.submit(encoded, upto(30, temperature=1.5, seed=seed))) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
