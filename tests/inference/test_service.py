from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.errors import ContextLengthError, EngineError, QueueFullError
from llava.inference.decoder import Group
from llava.inference.engine import Engine
from llava.inference.sampling import SamplingParams
from llava.inference.service import DoneEvent, EngineService, ErrorEvent, Event, TokenEvent
from tests.inference.models import Seeing, prompt, random_ids, tiny_llama
from tests.inference.test_engine import Counter, upto

WAIT = 30.0


class Gate(Counter):
    """A model that counts, one step each time that the test opens the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Semaphore(0)
        self.steps = 0

    def step(self, branches: Sequence[int], token_ids: Sequence[int]) -> Tensor:
        assert self.open.acquire(timeout=WAIT)
        self.steps += 1
        return super().step(branches, token_ids)


@contextmanager
def serving(model: Any, **options: Any) -> Iterator[EngineService]:
    service = EngineService(Engine(model, decoder=model), **options)
    try:
        yield service
    finally:
        if isinstance(model, Gate):
            model.open.release(1000)
        service.close()


def read(events: queue.Queue[Event]) -> tuple[list[int], Event]:
    """All tokens up to the last event, and that."""
    tokens: list[int] = []
    while isinstance(event := events.get(timeout=WAIT), TokenEvent):
        tokens += event.token_ids
    return tokens, event


def test_an_answer_is_heard_of_token_by_token_and_then_its_end() -> None:
    events: queue.Queue[Event] = queue.Queue()
    with serving(Counter()) as service:
        service.submit(prompt([5]), upto(4), on_event=events.put)
        assert read(events) == ([6, 7, 8, 9], DoneEvent("length", 1, 4))
        assert service.stats().answer_tokens == 4
        assert service.stats().prompt_tokens == 1


def test_answers_to_many_callers_at_once_are_each_ones_own() -> None:
    model = Seeing(tiny_llama())
    rows = [random_ids(5 + i, seed=i) for i in range(12)]
    alone = [list(Engine(model).submit(prompt(ids), upto(6))) for ids in rows]
    service = EngineService(Engine(model))
    streams: list[queue.Queue[Event]] = [queue.Queue() for _ in rows]

    def ask(i: int) -> None:
        service.submit(prompt(rows[i]), upto(6), on_event=streams[i].put)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read(stream)[0] for stream in streams] == alone
    service.close()


def test_a_cancelled_answer_ends_within_two_tokens_and_frees_everything() -> None:
    gate = Gate()
    events: queue.Queue[Event] = queue.Queue()
    with serving(gate) as service:
        ticket = service.submit(prompt([5]), upto(40), on_event=events.put)
        gate.open.release(3)
        heard = 0
        while heard < 4:
            event = events.get(timeout=WAIT)
            assert isinstance(event, TokenEvent)
            heard += len(event.token_ids)
        threading.Thread(target=ticket.cancel).start()
        gate.open.release(1)
        tokens, end = read(events)
        assert isinstance(end, DoneEvent)
        assert end.finish_reason == "cancelled"
        assert len(tokens) <= 2
        assert not gate.alive
        assert service.stats().cancelled == 1


def test_beyond_the_queue_a_request_is_refused_with_the_time_to_come_back() -> None:
    gate = Gate()
    events: queue.Queue[Event] = queue.Queue()
    with serving(gate, max_waiting=0) as service, pytest.raises(QueueFullError, match="try again in") as refused:
        service.submit(prompt([5]), upto(2), on_event=events.put)
    assert refused.value.retry_after >= 1
    assert service.stats().refused == 1


def test_a_prompt_that_does_not_fit_is_refused_before_any_work() -> None:
    with serving(Counter()) as service:
        with pytest.raises(ContextLengthError):
            service.submit(prompt([1] * 50), upto(2), on_event=lambda event: None)
        assert service.stats().requests == 0


def test_draining_lets_answers_end_and_takes_no_new_ones() -> None:
    events: queue.Queue[Event] = queue.Queue()
    with serving(Counter()) as service:
        service.submit(prompt([5]), upto(20), on_event=events.put)
        assert service.drain(timeout=WAIT)
        assert len(read(events)[0]) == 20
        with pytest.raises(EngineError, match="shutting down"):
            service.submit(prompt([5]), upto(2), on_event=events.put)


def test_what_does_not_end_in_time_is_cut_and_says_so() -> None:
    gate = Gate()
    events: queue.Queue[Event] = queue.Queue()
    with serving(gate) as service:
        service.submit(prompt([5]), upto(20), on_event=events.put)
        gate.open.release(1)
        assert isinstance(events.get(timeout=WAIT), TokenEvent)
        threading.Timer(0.2, gate.open.release, (1,)).start()
        assert not service.drain(timeout=0.05)
        end = read(events)[1]
        assert isinstance(end, DoneEvent)
        assert end.finish_reason == "cancelled"


def test_an_engine_that_still_answers_a_test_question_goes_on_after_a_failure() -> None:
    class Once(Counter):
        def prefill(self, group: Group, branches: Sequence[int]) -> Tensor:
            if int(group.suffix_ids[0][-1]) == 13:
                raise TypeError("a bug")
            return super().prefill(group, branches)

    events: queue.Queue[Event] = queue.Queue()
    with serving(Once(), probe=prompt([1])) as service:
        service.submit(prompt([13]), upto(2), on_event=events.put)
        end = read(events)[1]
        assert isinstance(end, ErrorEvent)
        assert isinstance(end.error, TypeError)
        service.submit(prompt([5]), upto(2), on_event=events.put)
        assert read(events)[0] == [6, 7]
        assert service.problem is None
        assert service.stats().failed == 1


def test_an_engine_that_answers_nothing_any_more_is_out_of_service() -> None:
    class Dead(Counter):
        dead = False

        def prefill(self, group: Group, branches: Sequence[int]) -> Tensor:
            if self.dead:
                raise RuntimeError("device-side assert triggered")
            return super().prefill(group, branches)

    model = Dead()
    events: queue.Queue[Event] = queue.Queue()
    with serving(model, probe=prompt([1])) as service:
        service.submit(prompt([5]), upto(2), on_event=events.put)
        assert read(events)[0] == [6, 7]
        model.dead = True
        ticket = service.submit(prompt([5]), upto(2), on_event=events.put)
        assert isinstance(read(events)[1], ErrorEvent)
        assert ticket.ended.wait(WAIT)
        for _ in range(1000):
            if service.problem is not None:
                break
            threading.Event().wait(0.01)
        assert service.problem is not None
        with pytest.raises(EngineError, match="does not answer"):
            service.submit(prompt([5]), upto(2), on_event=events.put)


def test_log_probabilities_are_the_models_own_whatever_the_sampling() -> None:
    model = tiny_llama()
    ids = random_ids(9, seed=4)
    params = SamplingParams(max_new_tokens=5, temperature=1.5, top_k=4, seed=3, logprobs=3)
    events: queue.Queue[Event] = queue.Queue()
    service = EngineService(Engine(Seeing(model)))
    service.submit(prompt(ids), params, on_event=events.put)
    said = []
    while isinstance(event := events.get(timeout=WAIT), TokenEvent):
        said += event.logprobs
    service.close()
    with torch.inference_mode():
        answer = [one.token_id for one in said]
        row = torch.tensor([*ids, *answer])[None]
        exact = model.double()(row).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    assert len(said) == 5
    for one, wanted in zip(said, exact, strict=True):
        assert one.logprob == pytest.approx(float(wanted[one.token_id]), abs=1e-4)
        values, places = wanted.topk(3)
        assert [token_id for token_id, _ in one.top] == places.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)
