"""Answers sent while they are made, and given up when nobody listens any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from llava.serve.guard import RequestRecord
from llava.serve.problems import ApiError
from llava.serve.replies import DONE, PING, Reply, error_event
from llava.serve.worker import Answers

T = TypeVar("T")

_PING_SECONDS = 15.0


class ClientLeftError(Exception):
    """The client closed its connection before the answer's end."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientLeftError then.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_wait_for_leave(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError
    finally:
        for pending in (task, watch):
            if not pending.done():
                pending.cancel()
                with suppress(asyncio.CancelledError, ApiError):
                    await pending


class EventStream(Response):
    """Server-sent events of one request's answers."""

    def __init__(
        self,
        answers: Answers,
        reply: Reply,
        record: RequestRecord,
        *,
        n: int,
        include_usage: bool,
        send_timeout_seconds: float,
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._answers = answers
        self._reply = reply
        self._record = record
        self._n = n
        self._include_usage = include_usage
        self._send_timeout = send_timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._send_timeout):
                    await send(message)
            except TimeoutError:
                raise ClientLeftError from None

        try:
            await unless_gone(receive, self._send_all(send_in_time))
        except ClientLeftError:
            self._record.code = "client_left"
        finally:
            self._answers.cancel()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events()) as events:
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        usage = self._include_usage
        for index in range(self._n):
            yield self._reply.first_chunk(index, include_usage=usage)
        pieces = self._answers.pieces()
        waiting = asyncio.ensure_future(anext(pieces, None))
        try:
            while True:
                done, _ = await asyncio.wait((waiting,), timeout=_PING_SECONDS)
                if not done:
                    yield PING
                    continue
                piece = waiting.result()
                if piece is None:
                    break
                self._record.note_piece(piece)
                yield self._reply.chunks(piece, include_usage=usage)
                waiting = asyncio.ensure_future(anext(pieces, None))
        except ApiError as error:
            self._record.code = error.code
            yield error_event(error)
            return
        finally:
            waiting.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await waiting
            await pieces.aclose()
            self._record.note_usage(self._answers.usage)
        if usage:
            yield self._reply.usage_chunk(self._answers.usage)
        yield DONE


async def _wait_for_leave(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
