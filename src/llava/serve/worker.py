"""One model behind the protocol: requests to encoded prompts in threads, the engine's tokens to words as they come.

The engine's thread does nothing for a request but hand its events over; words are made in the event loop. A request
that was refused, failed or left alone holds nothing afterwards: `Answers.cancel` ends whatever runs for it.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from llava.errors import ContextLengthError, EngineError, LlavaError
from llava.inference.engine import Engine
from llava.inference.requests import EngineLimits
from llava.inference.sampling import SamplingParams
from llava.inference.service import DoneEvent, EngineService, ErrorEvent, Event, Ticket, TokenEvent
from llava.prompt.conversation import Conversation, Message, Text
from llava.prompt.fetch import Fetcher, FetchLimits
from llava.serve.json_body import read_object
from llava.serve.limits import ServeLimits
from llava.serve.pictures import has_web_pictures, read_conversation
from llava.serve.problems import ApiError, explain, internal_error, shutting_down
from llava.serve.protocol import ChatRequest, TextPart, read_request
from llava.serve.words import Piece, Words

if TYPE_CHECKING:
    from llava.inference.decoder import LlavaLike
    from llava.prompt.processor import Encoded, Processor

T = TypeVar("T")

_FETCH_THREADS = 16
_SMALLEST_TOP_P = 1e-9
# Far above any text's mean; only runs of blanks make longer tokens.
_MAX_CHARS_A_TOKEN = 64
_PROBE_SECONDS = 20.0
_PROBE_KEPT_SECONDS = 5.0


@dataclass(frozen=True)
class Question:
    """What remains of a request when it is read: one prompt, and how each of the `n` answers is chosen."""

    encoded: Encoded
    params: tuple[SamplingParams, ...]
    stop_strings: tuple[str, ...]


@dataclass(frozen=True)
class Usage:
    """Tokens of a request. The prompt counts once, whatever `n` is."""

    prompt_tokens: int
    answer_tokens: int


class Worker:
    """A model that answers requests of the protocol. Its methods are called in one event loop."""

    def __init__(
        self,
        model: LlavaLike,
        processor: Processor,
        *,
        name: str,
        limits: ServeLimits | None = None,
        engine_limits: EngineLimits | None = None,
        allow_urls: bool = False,
        new_fetcher: Callable[[], Fetcher] | None = None,
    ) -> None:
        """name: what requests call the model. new_fetcher: replaces the one for web pictures (tests)."""
        self.name = name
        self.created = int(time.time())
        self.limits = limits or ServeLimits()
        self.processor = processor.with_template(processor.template)
        self.processor.image_settings = replace(processor.image_settings, limits=self.limits.picture)
        if allow_urls and new_fetcher is None:
            bounds = FetchLimits(
                max_bytes=self.limits.picture.max_bytes, timeout_seconds=self.limits.fetch_timeout_seconds
            )
            new_fetcher = partial(Fetcher, bounds)
        self._new_fetcher = new_fetcher if allow_urls else None
        self._probe = self.processor.encode(Conversation((Message("user", (Text("hi"),)),)), open_turn=True)
        engine = Engine(model, limits=engine_limits)
        self.context_length = engine.context_length
        self.service = EngineService(engine, max_waiting=self.limits.max_waiting, probe=self._probe)
        self._pool = ThreadPoolExecutor(self.limits.prepare_threads, thread_name_prefix="llava-prepare")
        # Requests that wait for the web have threads of their own: slow hosts keep nobody else waiting.
        self._web_pool = ThreadPoolExecutor(self.limits.prepare_threads, thread_name_prefix="llava-prepare-web")
        self._fetch_pool = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="llava-fetch")
        self._probed_at = -math.inf
        self._probe_result: str | None = None
        self._probing = asyncio.Lock()
        self.draining = False

    async def read(self, body: bytes) -> ChatRequest:
        """Check a request's body. Raises ApiError."""
        return await self._in_thread(self._pool, partial(self._read, body))

    async def begin(self, request: ChatRequest) -> Answers:
        """Encode a request and queue its answers. Raises ApiError before any work of the engine."""
        answers = Answers(self, asyncio.get_running_loop())
        pool = self._web_pool if self._new_fetcher is not None and has_web_pictures(request) else self._pool
        try:
            await self._in_thread(pool, partial(self._begin, request, answers))
        except BaseException:
            answers.cancel()  # the thread may still be at it
            raise
        return answers

    async def find_problem(self) -> str | None:
        """Why the model does not answer, None when it does: a word of the engine itself, at most seconds old."""
        if self.draining:
            return "shutting down"
        if self.service.problem is not None:
            return "the engine has failed"
        stats = self.service.stats()
        if stats.seconds_since_step > self.limits.stall_seconds:
            return "the engine makes no progress"
        if stats.active or stats.waiting:
            return None  # it steps
        async with self._probing:
            if time.monotonic() - self._probed_at > _PROBE_KEPT_SECONDS:
                self._probe_result = await self._ask_probe()
                self._probed_at = time.monotonic()
            return self._probe_result

    def drain(self, timeout: float) -> bool:
        """Take nothing new and let answers end; what is left after `timeout` seconds is cut. Called in a thread."""
        self.draining = True
        return self.service.drain(timeout)

    def close(self) -> None:
        """Cancel what runs and end the threads."""
        self.draining = True
        self.service.close()
        for pool in (self._pool, self._web_pool, self._fetch_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        except LlavaError as error:
            raise explain(error) from None

    def _read(self, body: bytes) -> ChatRequest:
        request = read_request(read_object(body, self.limits), self.limits)
        if request.model != self.name:
            shown = f"{request.model[:100]!a}"
            raise ApiError(404, "model_not_found", f"no model {shown} here; GET /v1/models names it", param="model")
        return request

    def _begin(self, request: ChatRequest, answers: Answers) -> None:
        question = self.prepare(request)
        answers.question = question
        for index, params in enumerate(question.params):
            if answers.cancelled:
                return
            answers.add(self._submit(question.encoded, params, partial(answers.on_event, index)))

    def prepare(self, request: ChatRequest) -> Question:
        """Everything but the answer. Raises ApiError or LlavaError."""
        if self.draining:
            raise shutting_down()
        processor = self.processor
        self._check_chars(request)
        conversation = read_conversation(
            request,
            limits=self.limits,
            settings=processor.image_settings,
            new_fetcher=self._new_fetcher,
            fetch_pool=self._fetch_pool,
        )
        counted = processor.encode(conversation, open_turn=True, pixels=False)
        self._check_length(counted)
        encoded = processor.encode(conversation, open_turn=True) if conversation.images else counted
        stops = tuple(processor.stop_token_ids)
        longest = self.limits.default_answer_tokens if request.token_limit is None else request.token_limit
        params = SamplingParams(
            temperature=request.temperature,
            top_p=max(request.top_p, _SMALLEST_TOP_P),
            top_k=request.top_k,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            max_new_tokens=longest,
            stop_token_ids=stops,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )
        # Answers of one request differ; each is the one that its own seed gives alone.
        seeds = [None if request.seed is None else _seed(request.seed, i) for i in range(request.n)]
        return Question(
            encoded,
            tuple(replace(params, seed=seed) for seed in seeds),
            (*request.stop, *processor.stop_strings),
        )

    def _check_chars(self, request: ChatRequest) -> None:
        """Refuse words that cannot fit before they are cut into tokens, which takes seconds a million."""
        chars = sum(len(part.text) for turn in request.messages for part in turn.content if isinstance(part, TextPart))
        if chars > self.context_length * _MAX_CHARS_A_TOKEN:
            raise ContextLengthError(
                f"{chars} characters of text are more than the model's context of {self.context_length} tokens holds; "
                "shorten them"
            )

    def _check_length(self, encoded: Encoded) -> None:
        """Refuse a prompt that leaves no room for an answer, before a picture of it is decoded."""
        length = len(encoded.input_ids)
        if length < self.context_length:
            return
        pictures = sum(encoded.tokens_per_image)
        seen = f", {pictures} of them for {len(encoded.tokens_per_image)} pictures" if pictures else ""
        raise ContextLengthError(
            f"the prompt has {length} tokens{seen}, and the model's context is {self.context_length}; shorten it, drop "
            "a picture or start a new conversation"
        )

    def _submit(self, encoded: Encoded, params: SamplingParams, on_event: Callable[[Event], None]) -> Ticket:
        try:
            return self.service.submit(encoded, params, on_event=on_event)
        except EngineError as error:
            if self.draining:
                raise shutting_down() from None
            if self.service.problem is not None:
                raise ApiError(503, "model_failed", "the model does not answer any more") from None
            raise explain(error) from None

    async def _ask_probe(self) -> str | None:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def on_event(event: Event) -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            ticket = self.service.submit(self._probe, SamplingParams(max_new_tokens=1), on_event=on_event)
        except LlavaError:
            return "the engine takes no question"
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                while isinstance(event := await events.get(), TokenEvent):
                    pass
        except TimeoutError:
            return "the engine does not answer"
        finally:
            ticket.cancel()
        return None if isinstance(event, DoneEvent) else "the engine fails"


class Answers:
    """The answers to one request, as they come."""

    def __init__(self, worker: Worker, loop: asyncio.AbstractEventLoop) -> None:
        self._worker = worker
        self._loop = loop
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._lock = threading.Lock()
        self.question: Question | None = None
        self.cancelled = False
        self._answer_tokens = 0

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        prompt = 0 if self.question is None else len(self.question.encoded.input_ids)
        return Usage(prompt, self._answer_tokens)

    def add(self, ticket: Ticket) -> None:
        with self._lock:
            self._tickets.append(ticket)
            if not self.cancelled:
                return
        ticket.cancel()

    def on_event(self, index: int, event: Event) -> None:
        """Take an event of one answer over from the engine's thread."""
        with suppress(RuntimeError):  # the loop has ended, and with it everybody who listened
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def cancel(self) -> None:
        """End everything that runs for this request."""
        with self._lock:
            self.cancelled = True
            tickets = list(self._tickets)
        for ticket in tickets:
            if not ticket.ended.is_set():
                ticket.cancel()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """New words of any of the answers. Raises ApiError when one of them fails; nothing runs on afterwards."""
        assert self.question is not None, "asked for the pieces of a request that was not begun"
        question = self.question
        everyone = [
            Words(self._worker.processor.decode, question.stop_strings, question.params[i].stop_token_ids, index=i)
            for i in range(len(question.params))
        ]
        under_way = set(range(len(everyone)))
        try:
            while under_way:
                index, event = await self._events.get()
                if index not in under_way:
                    continue
                words = everyone[index]
                if isinstance(event, TokenEvent):
                    self._answer_tokens += len(event.token_ids)
                    piece = words.take(event)
                    if piece.finish_reason is not None:
                        self._tickets[index].cancel()
                else:
                    piece = words.end(self._finish_reason(event))
                if piece.finish_reason is not None:
                    under_way.discard(index)
                if piece:
                    yield piece
        finally:
            self.cancel()

    def _finish_reason(self, event: DoneEvent | ErrorEvent) -> str:
        if isinstance(event, ErrorEvent):
            raise explain(event.error) from event.error
        if event.finish_reason == "cancelled":
            raise shutting_down() if self._worker.draining else internal_error()
        return event.finish_reason


def _seed(seed: int, index: int) -> int:
    """A seed of its own for each answer; the first has the request's."""
    return (seed + index) if seed + index < 2**63 else seed + index - 2**63
