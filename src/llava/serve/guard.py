"""What stands before every route: keys, hosts, sizes and times of bodies, how many requests at once; and the log.

A body is counted while it arrives, with a length or without. Nothing that goes wrong behind the guard reaches a client
but as the protocol's error.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.serve.keys import Keys, names_this_machine
from llava.serve.limits import ServeLimits
from llava.serve.logs import log_event, log_failure
from llava.serve.metrics import Metrics
from llava.serve.problems import ApiError, busy, internal_error
from llava.serve.replies import dump
from llava.serve.words import Piece
from llava.serve.worker import Usage

OPEN_PATHS = ("/health",)

# After an early refusal so much more of a body is read and dropped, so that the client gets to read the answer.
_LINGER_BYTES = 1 << 20
_LINGER_SECONDS = 0.5


@dataclass
class RequestRecord:
    """What the log and the metrics say about a request. No words of it."""

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    code: str = ""
    pictures: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    first_token_seconds: float | None = None
    finish_reasons: list[str] = field(default_factory=list)

    def note_piece(self, piece: Piece) -> None:
        if self.first_token_seconds is None:
            self.first_token_seconds = time.monotonic() - self.started
        if piece.finish_reason is not None:
            self.finish_reasons.append(piece.finish_reason)

    def note_usage(self, usage: Usage) -> None:
        self.prompt_tokens, self.answer_tokens = usage.prompt_tokens, usage.answer_tokens


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, *, keys: Keys, limits: ServeLimits, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._metrics = metrics
        self._in_flight = 0
        self._buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        record = RequestRecord()
        scope["llava.record"] = record
        started = False

        async def send_noted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", record.request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        body = Body(scope, receive, self._limits, self._reserve)
        scope["llava.body"] = body
        self._in_flight += 1
        self._metrics.in_flight.inc()
        try:
            self._admit(scope)
            await self._app(scope, body.receive, send_noted)
        except ApiError as error:
            record.code = error.code
            if not started:
                await refuse(error, send_noted, body)
        except Exception:
            record.code = "internal_error"
            log_failure(record.request_id)
            if not started:
                await refuse(internal_error(), send_noted, body)
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.dec()
            body.release()
            self._note(scope, record)

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        path = scope["path"]
        if not self._keys and not names_this_machine(headers.get(b"host")):
            raise ApiError(403, "invalid_host", "this server has no key and answers to the name localhost only")
        if path not in OPEN_PATHS and not self._keys.allow(headers.get(b"authorization")):
            raise ApiError(
                401,
                "invalid_api_key",
                "a valid API key is needed: send it as `Authorization: Bearer KEY`",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._limits.max_body_bytes:
            raise too_large(self._limits)
        if path not in OPEN_PATHS and self._in_flight > self._limits.max_requests:
            raise busy(1)

    def _reserve(self, num_bytes: int) -> None:
        if self._buffered + num_bytes > self._limits.max_buffered_bytes:
            raise busy(1)
        self._buffered += num_bytes

    def _note(self, scope: Scope, record: RequestRecord) -> None:
        seconds = time.monotonic() - record.started
        route = str(getattr(scope.get("route"), "path", "other"))
        self._metrics.requests.labels(route, str(record.status), record.code).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if record.first_token_seconds is not None:
            self._metrics.first_token.observe(record.first_token_seconds)
        self._metrics.pictures.inc(record.pictures)
        if record.code == "client_left":
            self._metrics.left.inc()
        fields: dict[str, Any] = {
            "request_id": record.request_id,
            "route": route,
            "status": record.status,
            "seconds": round(seconds, 4),
        }
        if record.code:
            fields["code"] = record.code
        if record.prompt_tokens:
            fields |= {
                "pictures": record.pictures,
                "prompt_tokens": record.prompt_tokens,
                "answer_tokens": record.answer_tokens,
                "finish_reasons": record.finish_reasons,
                "first_token_seconds": None
                if record.first_token_seconds is None
                else round(record.first_token_seconds, 4),
            }
        log_event("request", **fields)


class Body:
    """A request's body on its way in: counted, and given a time to arrive in."""

    def __init__(self, scope: Scope, receive: Receive, limits: ServeLimits, reserve: Callable[[int], None]) -> None:
        self._receive = receive
        self._limits = limits
        self._reserve = reserve
        self._deadline = time.monotonic() + limits.body_timeout_seconds
        self.size = 0
        names = {name for name, value in scope["headers"] if value != b"0"}
        self.whole = not names & {b"content-length", b"transfer-encoding"}

    async def receive(self) -> Message:
        if self.whole:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                408, "request_timeout", f"the body did not arrive within {self._limits.body_timeout_seconds:g} s"
            ) from None
        if message["type"] != "http.request":
            self.whole = True
            return message
        more = len(message.get("body", b""))
        if self.size + more > self._limits.max_body_bytes:
            raise too_large(self._limits)
        self._reserve(more)
        self.size += more
        self.whole = not message.get("more_body", False)
        return message

    def release(self) -> None:
        """Nobody holds the body any more."""
        self._reserve(-self.size)
        self.size = 0

    async def drop(self) -> None:
        """Read on for a moment without keeping anything."""
        dropped = 0
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                while not self.whole and dropped < _LINGER_BYTES:
                    message = await self._receive()
                    dropped += len(message.get("body", b""))
                    self.whole = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:
            return


def too_large(limits: ServeLimits) -> ApiError:
    return ApiError(
        413,
        "request_too_large",
        f"the body is over {limits.max_body_bytes} bytes; send smaller or fewer pictures",
    )


async def refuse(error: ApiError, send: Callable[[Message], Awaitable[None]], body: Body) -> None:
    """Send an error; where the body has not been read to its end, the connection closes after it."""
    content = dump(error.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    if not body.whole:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": True})
    if not body.whole:
        await body.drop()
    await send({"type": "http.response.body", "body": b"", "more_body": False})
