"""Sources with weights: how often an epoch reads what, and that groups reach over all sources."""

from collections import Counter
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.loader import StepPlan
from llava.data.mixture import Mixture, SourceSpec, open_sources
from llava.data.sources import ConversationSet, read_conversations
from llava.errors import DataError
from tests.data.tiny_processor import record, write_lines


def make_set(folder: Path, *sizes: int, image: str | None = None) -> ConversationSet:
    files = [write_lines(folder / f"{i}.jsonl", *[record(image)] * size) for i, size in enumerate(sizes)]
    return ConversationSet([read_conversations(file) for file in files])


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> ConversationSet:
    return make_set(tmp_path_factory.mktemp("two"), 7, 5)


@settings(max_examples=60)
@given(weights=st.tuples(*[st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.3, 2.0, 2.75, 3.0])] * 2), seed=st.integers(0, 99))
def test_every_conversation_is_read_as_often_as_its_weight_says(
    two_sources: ConversationSet, weights: tuple[float, float], seed: int
) -> None:
    try:
        mixture = Mixture(two_sources, limit=3, seed=seed, weights=weights)
    except DataError:
        assert all(weight * size < 1 for weight, size in zip(weights, (7, 5), strict=True))
        return
    total = np.zeros(12, dtype=np.int64)
    for epoch in range(6):
        times = mixture.times(epoch)
        total += times
        assert Counter(n for group in mixture.in_epoch(epoch) for n in group) == Counter(
            {n: int(count) for n, count in enumerate(times) if count}
        )
        for share, begin, end in zip(weights, (0, 7), (7, 12), strict=True):
            expected = [floor((epoch + k) * Fraction(str(share)) * (end - begin)) for k in (0, 1)]
            assert times[begin:end].sum() == expected[1] - expected[0]
            assert total[begin:end].max() - total[begin:end].min() <= 1, "no conversation gets ahead of another"


def test_a_quarter_is_another_quarter_in_each_of_four_epochs(tmp_path: Path) -> None:
    mixture = Mixture(make_set(tmp_path, 100), limit=1, seed=3, weights=[0.25])
    quarters = [set(np.flatnonzero(mixture.times(epoch))) for epoch in range(8)]
    assert [len(quarter) for quarter in quarters] == [25] * 8
    assert set.union(*quarters[:4]) == set.union(*quarters[4:]) == set(range(100))
    assert quarters[:4] != quarters[4:], "another pass is another shuffle"
    again = Mixture(make_set(tmp_path, 100), limit=1, seed=3, weights=[0.25])
    assert set(np.flatnonzero(again.times(5))) == quarters[5]
    assert (
        set(np.flatnonzero(Mixture(make_set(tmp_path, 100), limit=1, seed=4, weights=[0.25]).times(0))) != quarters[0]
    )


def test_the_same_picture_is_one_group_over_all_sources(tmp_path: Path) -> None:
    (tmp_path / "pics" / "a").mkdir(parents=True)
    for name in ("pics/a/1.png", "pics/2.png"):
        (tmp_path / name).write_bytes(name.encode())
    first = write_lines(tmp_path / "1.jsonl", record("a/1.png"), record("2.png"), record(None))
    second = write_lines(tmp_path / "2.jsonl", record("1.png"), record("1.png"))
    sources = [
        SourceSpec(str(first), images=str(tmp_path / "pics")),
        SourceSpec(str(second), images=str(tmp_path / "pics/a")),
    ]
    conversations = open_sources(sources)
    assert Mixture(conversations, limit=3, seed=0).in_epoch(4) == [(0, 3, 4), (1,), (2,)]


def test_copies_of_a_conversation_are_in_different_groups(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    mixture = Mixture(make_set(tmp_path, 3, image="a.png"), limit=8, seed=0, weights=[2.0])
    assert mixture.in_epoch(0) == [(0, 1, 2), (0, 1, 2)]


def test_a_plan_follows_the_mixture_from_epoch_to_epoch(tmp_path: Path) -> None:
    conversations = make_set(tmp_path, 10, 8)
    plan = StepPlan(Mixture(conversations, limit=1, seed=1, weights=[0.5, 2.0]), 4, 1, epochs=2.0)
    read: dict[int, Counter[int]] = {0: Counter(), 1: Counter()}
    for step in range(plan.total_steps):
        read[plan.locate(step)[0]].update(n for group in plan.groups_of(step) for n in group)
    for epoch in (0, 1):
        assert read[epoch].total() == 5 + 16
        assert all(read[epoch][n] == 2 for n in range(10, 18))
    assert read[0] + read[1] == Counter({**dict.fromkeys(range(10), 1), **dict.fromkeys(range(10, 18), 4)})


def test_a_mixture_that_reads_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no conversation"):
        Mixture(make_set(tmp_path, 5), limit=1, seed=0, weights=[0.1])
