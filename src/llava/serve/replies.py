"""The protocol's answers: a whole completion, or chunks of one as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from typing import Any

from llava.serve.problems import ApiError
from llava.serve.words import Piece, ShownLogprobs, ShownToken
from llava.serve.worker import Usage

DONE = b"data: [DONE]\n\n"
PING = b": still at it\n\n"


def dump(value: object) -> bytes:
    """JSON in ASCII: text of any kind passes, and no character of it ends a line."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


class Reply:
    """Writes the answers to one request."""

    def __init__(self, model: str, *, logprobs: bool) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._logprobs = logprobs

    def completion(self, pieces: Iterable[Piece], n: int, usage: Usage) -> dict[str, Any]:
        """All answers at once."""
        texts = [""] * n
        logprobs: list[list[ShownLogprobs]] = [[] for _ in range(n)]
        reasons: list[str | None] = [None] * n
        for piece in pieces:
            texts[piece.index] += piece.text
            logprobs[piece.index] += piece.logprobs
            reasons[piece.index] = piece.finish_reason or reasons[piece.index]
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": texts[i], "refusal": None},
                "logprobs": self._as_logprobs(logprobs[i]),
                "finish_reason": reasons[i],
            }
            for i in range(n)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": as_usage(usage)}

    def first_chunk(self, index: int, *, include_usage: bool) -> bytes:
        """The chunk that says who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None, include_usage)

    def chunks(self, piece: Piece, *, include_usage: bool) -> bytes:
        """New words, an end, or one after the other: the chunk that ends an answer holds no words."""
        data = b""
        if piece.text or piece.logprobs:
            logprobs = self._as_logprobs(piece.logprobs)
            data += self._chunk(piece.index, {"content": piece.text}, logprobs, None, include_usage)
        if piece.finish_reason is not None:
            data += self._chunk(piece.index, {}, None, piece.finish_reason, include_usage)
        return data

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last chunk, where the request asked for one."""
        return event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": as_usage(usage)})

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None, include_usage: bool
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return event({**chunk, "usage": None} if include_usage else chunk)

    def _as_logprobs(self, entries: Iterable[ShownLogprobs]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            {**_as_token(entry.token), "top_logprobs": [_as_token(token) for token in entry.top]} for entry in entries
        ]
        return {"content": content, "refusal": None}


def error_event(error: ApiError) -> bytes:
    """What a stream ends with when the answer could not be finished; no [DONE] follows."""
    return event(error.body())


def event(value: object) -> bytes:
    """A server-sent event of one line."""
    return b"data: " + dump(value) + b"\n\n"


def as_usage(usage: Usage) -> dict[str, int]:
    """Token counts as the protocol writes them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.answer_tokens,
        "total_tokens": usage.prompt_tokens + usage.answer_tokens,
    }


def _as_token(token: ShownToken) -> dict[str, Any]:
    return {"token": token.text, "bytes": None if token.utf8 is None else list(token.utf8), "logprob": token.logprob}
