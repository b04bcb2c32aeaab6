from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.inference.decoder import Decoder, PlainDecoder
from llava.inference.engine import Engine
from llava.inference.lean import LeanDecoder
from llava.inference.prefix_cache import MIN_TOKENS, PrefixCache, Stored, agreement, content_of
from llava.inference.requests import EngineLimits, Request
from llava.inference.sampling import SamplingParams
from llava.prompt.processor import Encoded
from tests.inference.models import Seeing, random_ids, tiny_llama

DECODERS: list[type[Any]] = [LeanDecoder, PlainDecoder]


def numbers(*values: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


def stored(length: int, *, nbytes: int = 1) -> Stored:
    return Stored(None, length, nbytes)


def run(*start: int, length: int = MIN_TOKENS) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.concatenate([numbers(*start), np.arange(length - len(start))])


def upto(n: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=n)


def engine(decoder: type[Any], **limits: int) -> tuple[Engine, Seeing, list[int]]:
    """An engine on a tiny model, and a list that notes how many tokens each forward pass of a prompt embeds."""
    seeing = Seeing(tiny_llama())
    read: list[int] = []
    embed = seeing.embed

    def noting(input_ids: torch.Tensor, image_features: torch.Tensor | None = None) -> torch.Tensor:
        read.append(input_ids.shape[1])
        return embed(input_ids, image_features)

    seeing.embed = noting  # type: ignore[method-assign]
    made: Decoder = decoder(seeing)
    return Engine(seeing, decoder=made, limits=EngineLimits(**limits)), seeing, read


def seen(ids: Any, pictures: Sequence[float] = ()) -> Encoded:
    """An encoded prompt in which every picture is two placeholders (63)."""
    ids = np.asarray(ids, dtype=np.int64)
    pixels = np.array(pictures, dtype=np.float32).reshape(-1, 1, 1, 1) * np.ones((1, 3, 4, 4), dtype=np.float32)
    count = len(pictures)
    return Encoded(ids, np.full_like(ids, -100), pixels, ((4, 4),) * count, (1,) * count, (2,) * count)


def answer(asked: Engine, ids: Any, pictures: Sequence[float] = (), n: int = 6) -> list[int]:
    return list(asked.submit(seen(ids, pictures), upto(n)))


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_second_turn_reads_only_what_is_new(decoder: type[Any]) -> None:
    asked, _, read = engine(decoder)
    first = random_ids(30, seed=1)
    said = answer(asked, first)
    second = [*first, *said, *random_ids(7, seed=2)]
    again = answer(asked, second)
    assert read == [30, len(second) - (30 + len(said) - 1)]  # the last token said was never read
    fresh, _, _ = engine(decoder, max_prefix_bytes=0)
    assert again == answer(fresh, second)
    assert asked.prefixes.hit_tokens == 30 + len(said) - 1


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_prompt_asked_again_reads_its_last_token_only(decoder: type[Any]) -> None:
    asked, _, read = engine(decoder)
    first = answer(asked, random_ids(30, seed=1))
    assert answer(asked, random_ids(30, seed=1)) == first
    assert read == [30, 1]


@pytest.mark.parametrize("decoder", DECODERS)
def test_another_picture_is_never_taken_for_the_one_before(decoder: type[Any]) -> None:
    asked, seeing, _ = engine(decoder)
    ids = [5, 63, 63, *random_ids(30, seed=3)]
    answer(asked, ids, [0.5])
    other = answer(asked, ids, [-0.9])
    assert len(seeing.encoded_tiles) == 2
    fresh, _, _ = engine(decoder, max_prefix_bytes=0)
    assert other == answer(fresh, ids, [-0.9])


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_picture_that_was_read_is_not_encoded_again_even_when_its_features_are_gone(decoder: type[Any]) -> None:
    asked, seeing, read = engine(decoder, max_feature_bytes=0)
    ids = [5, 63, 63, *random_ids(30, seed=3)]
    answer(asked, ids, [0.5])
    answer(asked, [*ids[:20], 7, 63, 63, 9], [0.5, 0.25])
    assert read == [33, 4]
    assert seeing.encoded_tiles == [1, 1]


def test_a_beginning_that_ends_inside_a_picture_keeps_the_rest_of_it() -> None:
    asked, _, _ = engine(LeanDecoder)
    words = random_ids(20, seed=4)
    answer(asked, [*words, 63, 63, 8], [0.5])
    # The whole prompt is known; its last token, a placeholder, must be read for an answer to come.
    fresh, _, _ = engine(LeanDecoder, max_prefix_bytes=0)
    assert answer(asked, [*words, 63, 63], [0.5]) == answer(fresh, [*words, 63, 63], [0.5])


@pytest.mark.parametrize("decoder", DECODERS)
def test_many_questions_on_a_picture_begin_where_an_earlier_question_did(decoder: type[Any]) -> None:
    head = [5, 63, 63, *random_ids(24, seed=5)]
    asked, _, read = engine(decoder)
    answer(asked, [*head, 3, 9], [0.5])
    requests = [Request(seen([*head, 4 + i, 11], [0.5]), upto(5)) for i in range(3)]
    together = asked.generate(requests)
    assert sum(read[1:]) == 3 * 2
    fresh, _, _ = engine(decoder, max_prefix_bytes=0)
    assert together == fresh.generate(requests)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(0, 3)), min_size=2, max_size=6))
def test_turns_taken_back_and_asked_anew_are_answered_as_if_nothing_were_kept(
    turns: list[tuple[int, int, int]],
) -> None:
    """Each turn: go back by so many turns, add so many tokens, with one of four pictures in front of them (0: none)."""
    kept, _, _ = engine(LeanDecoder)
    fresh, _, _ = engine(LeanDecoder, max_prefix_bytes=0)
    talk: list[tuple[list[int], list[float]]] = [(random_ids(18, seed=9).tolist(), [])]
    for number, (back, words, picture) in enumerate(turns):
        talk = talk[: max(1, len(talk) - back)]
        ids, pictures = talk[-1]
        ids = [*ids, *([63, 63] if picture else []), *random_ids(words, seed=number)]
        pictures = [*pictures, *([picture / 4] if picture else [])]
        if len(ids) > 110:
            break
        said = answer(kept, ids, pictures, n=4)
        assert said == answer(fresh, ids, pictures, n=4)
        talk.append(([*ids, *said], pictures))


def test_the_longest_agreement_is_used() -> None:
    cache = PrefixCache(max_bytes=100)
    for content in (run(1), run(1, 2), run(1, 2, 3)):
        cache.store(content, stored(len(content)))
    found = cache.find(run(1, 2, 3, length=40), limit=39)
    assert found is not None
    assert found[1] == MIN_TOKENS


def test_a_beginning_of_a_longer_entry_is_not_kept_twice() -> None:
    cache = PrefixCache(max_bytes=100)
    cache.store(np.arange(20), stored(20))
    assert not cache.wants(np.arange(18))
    cache.store(np.arange(30), stored(30))
    assert len(cache) == 1
    assert cache.nbytes == 1


def test_the_one_not_used_for_the_longest_time_goes_first() -> None:
    cache = PrefixCache(max_bytes=2)
    cache.store(run(1), stored(MIN_TOKENS))
    cache.store(run(2), stored(MIN_TOKENS))
    assert cache.find(run(1), limit=MIN_TOKENS) is not None
    cache.store(run(3), stored(MIN_TOKENS))
    assert cache.find(run(2), limit=MIN_TOKENS) is None
    assert cache.find(run(1), limit=MIN_TOKENS) is not None
    assert cache.nbytes == 2


def test_what_is_larger_than_the_budget_is_not_kept() -> None:
    cache = PrefixCache(max_bytes=10)
    cache.store(run(1), stored(MIN_TOKENS, nbytes=11))
    assert len(cache) == 0
    assert cache.nbytes == 0


def test_contents_agree_where_tokens_and_pictures_do() -> None:
    ids = numbers(1, 63, 63, 2, 63, 63, 63, 3)
    content = content_of(ids, [b"cat", b"dog"], [2, 3], image_token_id=63)
    other = content_of(ids, [b"cat", b"hen"], [2, 3], image_token_id=63)
    assert agreement(content, other) == 4
    assert content[[0, 3, 7]].tolist() == [1, 2, 3]
    assert len(set(content.tolist())) == 8
    assert (content[[1, 2, 4, 5, 6]] < 0).all()


def test_clearing_forgets_what_was_read() -> None:
    asked, _, read = engine(LeanDecoder)
    answer(asked, random_ids(30, seed=1))
    assert asked.prefixes.nbytes > 0
    asked.clear()
    assert asked.prefixes.nbytes == 0
    answer(asked, random_ids(30, seed=1))
    assert read == [30, 30]
