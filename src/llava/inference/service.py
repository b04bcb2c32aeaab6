"""An engine for many callers at once: one thread steps it, and each request hears of its tokens as they come.

    service = EngineService(engine, max_waiting=64)
    ticket = service.submit(encoded, params, on_event=queue.put)    # TokenEvent ..., then one DoneEvent or ErrorEvent
    ticket.cancel()                                                 # in effect within two tokens
    service.drain(timeout=30); service.close()

Beyond `max_waiting` requests a submit is refused at once, with the seconds after which there should be room again.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from llava.errors import EngineError, LlavaError, QueueFullError
from llava.inference.engine import Engine
from llava.inference.requests import FinishReason, Generation
from llava.inference.sampling import SamplingParams, TokenLogprobs
from llava.prompt.processor import Encoded

_log = logging.getLogger(__name__)

# The drain rate is that of so many requests last finished, and nobody is told to wait longer than so many seconds.
_RATE_OVER = 32
_LONGEST_WAIT = 60


@dataclass(frozen=True)
class TokenEvent:
    """New tokens of an answer, in order; logprobs where the request asked for them."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class DoneEvent:
    """The answer's end."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_answer_tokens: int


@dataclass(frozen=True)
class ErrorEvent:
    """The request failed; an answer under way is not whole."""

    error: BaseException


Event = TokenEvent | DoneEvent | ErrorEvent


@dataclass(frozen=True)
class ServiceStats:
    """Counts since the start, and what is under way now."""

    active: int
    waiting: int
    requests: int
    refused: int
    failed: int
    cancelled: int
    prompt_tokens: int
    known_prompt_tokens: int
    answer_tokens: int
    feature_bytes: int
    prefix_bytes: int
    seconds_since_step: float
    """How long the engine has had work without finishing a step; 0 when it is idle."""


class Ticket:
    """One request of a service."""

    def __init__(self, service: EngineService, generation: Generation, on_event: Callable[[Event], None]) -> None:
        self._service = service
        self.generation = generation
        self._on_event = on_event
        self._given = 0
        self.ended = threading.Event()

    def cancel(self) -> None:
        """End the answer; a DoneEvent with "cancelled" follows unless it was done before."""
        self._service._cancel(self)

    def _report(self) -> bool:
        """Hand on what is new; returns whether that was the last."""
        generation = self.generation
        upto = len(generation.token_ids)
        if upto > self._given:
            event = TokenEvent(
                tuple(generation.token_ids[self._given : upto]), tuple(generation.logprobs[self._given : upto])
            )
            self._given = upto
            self._on_event(event)
        if not generation.done:
            return False
        if generation.error is not None:
            self._on_event(ErrorEvent(generation.error))
        else:
            assert generation.finish_reason is not None
            prompt = len(generation.request.encoded.input_ids)
            self._on_event(DoneEvent(generation.finish_reason, prompt, upto))
        self.ended.set()
        return True


class EngineService:
    """A thread that steps an engine while there is work. `on_event` is called in that thread and must be quick."""

    def __init__(self, engine: Engine, *, max_waiting: int = 64, probe: Encoded | None = None) -> None:
        """probe: a prompt that is answered to see whether the engine still works, after it has failed as a whole."""
        self.engine = engine
        self._max_waiting = max_waiting
        self._probe = probe
        self._tickets: list[Ticket] = []
        self._wake = threading.Condition()
        self._closed = False
        self._accepting = True
        self._broken: str | None = None
        self._finished: deque[float] = deque(maxlen=_RATE_OVER)
        self._counts = {"requests": 0, "refused": 0, "failed": 0, "cancelled": 0, "prompt": 0, "answer": 0}
        self._working_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="llava-engine", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """Why the engine cannot answer any more, None while it can."""
        if self._broken is None and not self._thread.is_alive() and not self._closed:
            return "the engine's thread has ended"
        return self._broken

    def submit(self, encoded: Encoded, params: SamplingParams, *, on_event: Callable[[Event], None]) -> Ticket:
        """Queue a request. Raises QueueFullError when too many wait, ContextLengthError when the prompt does not fit,
        EngineError when the service is closing or broken.
        """
        with self._wake:
            if self._broken is not None:
                raise EngineError(f"the engine has failed and does not answer: {self._broken}")
            if self._closed or not self._accepting:
                raise EngineError("the server is shutting down; ask another one")
            if self.engine.num_waiting >= self._max_waiting:
                self._counts["refused"] += 1
                raise QueueFullError(self.engine.num_waiting, retry_after=self._seconds_to_room())
            ticket = Ticket(self, self.engine.submit(encoded, params), on_event)
            self._tickets.append(ticket)
            self._counts["requests"] += 1
            self._counts["prompt"] += len(encoded.input_ids)
            self._wake.notify()
        return ticket

    def stats(self) -> ServiceStats:
        counts = self._counts
        since = self._working_since
        return ServiceStats(
            active=self.engine.num_active,
            waiting=self.engine.num_waiting,
            requests=counts["requests"],
            refused=counts["refused"],
            failed=counts["failed"],
            cancelled=counts["cancelled"],
            prompt_tokens=counts["prompt"],
            known_prompt_tokens=self.engine.prefixes.hit_tokens,
            answer_tokens=counts["answer"],
            feature_bytes=self.engine.feature_bytes,
            prefix_bytes=self.engine.prefixes.nbytes,
            seconds_since_step=0.0 if since is None else time.monotonic() - since,
        )

    def drain(self, timeout: float) -> bool:
        """Take no new requests and wait for those under way; what is left after `timeout` seconds is cancelled.

        Returns whether all ended by themselves.
        """
        with self._wake:
            self._accepting = False
            left = list(self._tickets)
        deadline = time.monotonic() + timeout
        whole = all(ticket.ended.wait(max(0.0, deadline - time.monotonic())) for ticket in left)
        if not whole:
            for ticket in left:
                ticket.cancel()
        return whole

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._wake:
            self._accepting = False
            self._closed = True
            left = list(self._tickets)
            self._wake.notify()
        for ticket in left:
            ticket.generation.cancel()
        self._thread.join(timeout=60)

    def _cancel(self, ticket: Ticket) -> None:
        ticket.generation.cancel()
        with self._wake:
            self._wake.notify()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._tickets and not self._closed:
                    self._working_since = None
                    self._wake.wait()
                if self._closed and not self._tickets:
                    return
            self._working_since = time.monotonic()
            try:
                self.engine.step()
            except LlavaError as error:
                _log.warning("a step failed: %s", error)
            except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, ArithmeticError) as error:
                _log.exception("the engine failed in a step")
                self._test(error)
            self._report()

    def _report(self) -> None:
        with self._wake:
            tickets = list(self._tickets)
        ended = []
        for ticket in tickets:
            # Before the caller hears of them, so that whoever asks then finds them counted.
            self._counts["answer"] += len(ticket.generation.token_ids) - ticket._given
            if ticket._report():
                ended.append(ticket)
        if not ended:
            return
        now = time.monotonic()
        for ticket in ended:
            self._counts["failed"] += ticket.generation.error is not None
            self._counts["cancelled"] += ticket.generation.finish_reason == "cancelled"
            self._finished.append(now)
        with self._wake:
            self._tickets = [ticket for ticket in self._tickets if ticket not in ended]
        errors = [ticket.generation.error for ticket in ended if ticket.generation.error is not None]
        unknown = [error for error in errors if not isinstance(error, LlavaError)]
        if unknown:
            self._test(unknown[0])

    def _seconds_to_room(self) -> int:
        """After how many seconds a place in the queue should be free, from the rate at which requests end."""
        if len(self._finished) < 2:
            return 1
        rate = (len(self._finished) - 1) / max(time.monotonic() - self._finished[0], 1e-3)
        return max(1, min(_LONGEST_WAIT, math.ceil(1 / rate)))

    def _test(self, error: BaseException) -> None:
        """Is an engine that failed for a reason that it does not know still good? One that cannot answer the probe is
        out of service, so that no more requests are sent to it.
        """
        if self._probe is None or self._broken is not None:
            return
        try:
            for _ in self.engine.submit(self._probe, SamplingParams(max_new_tokens=2)):
                pass
        except (LlavaError, RuntimeError, ValueError, TypeError, LookupError, AssertionError, ArithmeticError):
            self._broken = f"{type(error).__name__}, and a test question failed too"
            _log.exception("the engine does not answer a test question; it is out of service")
