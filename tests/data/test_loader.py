"""The plan is arithmetic; the loader only follows it."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.batch import PADDING_TREE
from llava.data.loader import GlobalStep, Layout, Loader, StepPlan
from llava.errors import DataError, TrainingError
from llava.prompt.processor import IGNORE_LABEL, Encoded

LAYOUT = Layout(tree_tokens=32, row_tokens=32, micro_batch_tokens=96, image_token_id=9, pad_token_id=0)


def make_groups(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    ends = np.cumsum(sizes)
    return [tuple(range(end - size, end)) for end, size in zip(ends.tolist(), sizes, strict=True)]


def encode(group: Sequence[int]) -> list[Encoded]:
    """Conversation n is the tokens 1, 100 + n, 100 + n, with the last one supervised."""
    return [Encoded(np.array([1, 100 + n, 100 + n]), np.array([IGNORE_LABEL, IGNORE_LABEL, 100 + n])) for n in group]


def make_loader(sizes: Sequence[int] = (2, 3, 1, 4, 2), *, batch: int = 4, **changes: object) -> Loader:
    settings = {"layout": LAYOUT, "fingerprint": "abc", **changes}
    epochs = settings.pop("epochs", 2.0)
    plan = StepPlan(make_groups(sizes), batch, 5, epochs=epochs)  # type: ignore[arg-type]
    return Loader(plan, encode, **settings)  # type: ignore[arg-type]


def targets(step: GlobalStep) -> list[int]:
    return sorted(t for batch in step.micro_batches for t in batch.targets.tolist())


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=30),
    batch=st.integers(6, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_epoch_holds_every_conversation_once(sizes: list[int], batch: int, seed: int) -> None:
    plan = StepPlan(make_groups(sizes), batch, seed, epochs=2.0)
    seen: dict[int, Counter[int]] = {0: Counter(), 1: Counter()}
    for step in range(plan.total_steps):
        epoch, _ = plan.locate(step)
        numbers = [n for group in plan.groups_of(step) for n in group]
        assert numbers
        assert len(numbers) < batch + max(sizes)
        seen[epoch].update(numbers)
    assert seen[0] == seen[1] == Counter(range(sum(sizes)))


def test_equal_groups_fill_steps_exactly() -> None:
    plan = StepPlan(make_groups([12] * 10), 36, 0)
    assert [len(plan.groups_of(step)) for step in range(plan.total_steps)] == [3, 3, 3, 1]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        plan = StepPlan(make_groups([1] * 20), 4, seed, epochs=3.0)
        return [group for step in range(5 * epoch, 5 * epoch + 5) for group in plan.groups_of(step)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_parts_of_an_epoch_and_a_step_limit() -> None:
    groups = make_groups([1] * 20)
    assert StepPlan(groups, 4, 0, epochs=1.5).total_steps == 8
    assert StepPlan(groups, 4, 0, epochs=0.1).total_steps == 1
    assert StepPlan(groups, 4, 0, epochs=3.0, max_steps=2).total_steps == 2
    assert StepPlan(groups, 4, 0, epochs=1e300, max_steps=2).total_steps == 2
    assert StepPlan(groups, 4, 0, epochs=2.0).epoch_at(6) == pytest.approx(1.4)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_do_not_change_what_comes(workers: int) -> None:
    steps = list(make_loader(workers=workers))
    expected = list(make_loader())
    assert [s.conversations for s in steps] == [s.conversations for s in expected]
    for mine, theirs in zip(steps, expected, strict=True):
        assert [b.input_ids.tolist() for b in mine.micro_batches] == [
            b.input_ids.tolist() for b in theirs.micro_batches
        ]


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=12), row_tokens=st.integers(1, 40))
def test_no_supervised_token_is_lost_on_the_way(sizes: list[int], row_tokens: int) -> None:
    layout = Layout(row_tokens, row_tokens, 3 * row_tokens, 9, 0)
    loader = make_loader(sizes, batch=6, layout=layout, epochs=1.0)
    steps = list(loader)
    assert sorted(t for step in steps for t in targets(step)) == [100 + n for n in range(sum(sizes))]
    assert all(step.dropped == 0 for step in steps)


def test_micro_batches_keep_their_limit_and_rows_their_length() -> None:
    for step in make_loader([3] * 20, batch=30):
        for batch in step.micro_batches:
            assert batch.input_ids.numel() <= LAYOUT.micro_batch_tokens or batch.input_ids.shape[0] == 1
            assert int((batch.tree_ids != PADDING_TREE).sum(-1).max()) <= LAYOUT.row_tokens


@pytest.mark.parametrize("stop", [0, 1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_another_stopped(stop: int, workers: int) -> None:
    whole = [step.conversations for step in make_loader()]
    first = make_loader(workers=workers)
    steps = iter(first)
    begun = [next(steps).conversations for _ in range(stop)]
    state = first.state_dict()
    assert state["position"] == stop
    second = make_loader(workers=workers)
    second.load_state_dict(state)
    assert begun + [step.conversations for step in second] == whole


def test_other_data_or_another_seed_is_refused() -> None:
    state = make_loader().state_dict()
    with pytest.raises(TrainingError, match="another data"):
        make_loader(fingerprint="other").load_state_dict(state)
    with pytest.raises(TrainingError, match="another seed"):
        make_loader().load_state_dict({**state, "seed": 6})


def test_processes_share_a_step_and_leave_nothing_out() -> None:
    for world_size in (2, 3):
        loaders = [make_loader(rank=rank, world_size=world_size) for rank in range(world_size)]
        for alone, *shares in zip(make_loader(), *loaders, strict=True):
            assert sorted(t for share in shares for t in targets(share)) == targets(alone)


def test_a_bad_record_ends_the_run_with_its_own_words() -> None:
    def broken(group: Sequence[int]) -> list[Encoded]:
        raise DataError(f"mix.json:{group[0]}: broken")

    for workers in (0, 2):
        loader = make_loader(workers=workers)
        loader._encode = broken
        with pytest.raises(DataError, match=r"mix.json:\d+: broken"):
            list(loader)


def test_dropped_conversations_are_counted() -> None:
    loader = make_loader([2, 2], batch=4, epochs=1.0)
    loader._encode = lambda group: encode(group[1:])
    (step,) = list(loader)
    assert step.dropped == 2
    assert len(step.conversations) == 4


def test_a_plan_of_like_lengths_and_one_in_file_order_follow_their_order() -> None:
    lengths = (5, -3, 9, 1, -8, 2)
    grouped = StepPlan(make_groups([1] * 6), 2, 0, order="grouped_by_length", lengths=lengths)
    steps = [[lengths[n] for group in grouped.groups_of(step) for n in group] for step in range(3)]
    assert sorted(length for step in steps for length in step) == sorted(lengths)
    assert sum(min(step) > 0 or max(step) < 0 for step in steps) >= 1
    in_order = StepPlan(make_groups([1] * 6), 4, 0, order="file", epochs=2.0)
    first = [(0,), (1,), (2,), (3,)]
    assert [in_order.groups_of(step) for step in (0, 1, 2)] == [first, [(4,), (5,)], first]


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("llava-loader")]


def test_threads_stop_at_the_next_group_when_nobody_wants_more_steps() -> None:
    hold, release = threading.Event(), threading.Event()
    waiting: list[Sequence[int]] = []
    begun: list[Sequence[int]] = []

    def slow(group: Sequence[int]) -> list[Encoded]:
        begun.append(group)
        if hold.is_set():
            waiting.append(group)
            release.wait(10)
        return encode(group)

    loader = make_loader([1] * 600, batch=6, workers=2)
    loader._encode = slow
    steps = iter(loader)
    next(steps)
    while len(begun) < 6 * 6:  # all that is prepared ahead
        time.sleep(0.001)
    hold.set()
    next(steps)  # makes room for a step more, so that a thread has something to do
    threading.Timer(0.05, release.set).start()
    steps.close()  # type: ignore[attr-defined]
    assert loader_threads() == []
    assert len(waiting) <= 2, "no thread began another group"


def test_ctrl_c_while_a_step_is_prepared_ends_at_once_and_leaves_no_thread() -> None:
    begun: list[Sequence[int]] = []

    def slow(group: Sequence[int]) -> list[Encoded]:
        begun.append(group)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        return encode(group)

    loader = make_loader([1] * 3000, batch=3000, workers=2)  # a minute's work
    loader._encode = slow
    with pytest.raises(KeyboardInterrupt):
        list(loader)
    for thread in loader_threads():  # one that was just being started when the signal came
        thread.join(10)
    assert loader_threads() == []
    assert len(begun) < 300
    assert loader.position == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_a_step_that_fails_is_raised_at_its_turn_and_the_steps_before_it_are_handed_out(workers: int) -> None:
    expected = [step.conversations for step in make_loader([1] * 12, batch=2, epochs=1.0)]
    poison = expected[3][1]

    def fail(group: Sequence[int]) -> list[Encoded]:
        if poison in group:
            raise DataError("too long")
        return encode(group)

    loader = make_loader([1] * 12, batch=2, epochs=1.0, workers=workers)
    loader._encode = fail
    handed = []
    with pytest.raises(DataError, match="too long"):
        for step in loader:
            handed.append(step.conversations)
    assert handed == expected[:3]
    assert loader.position == 3
    assert loader_threads() == []
