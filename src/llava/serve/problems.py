"""What can be wrong with a request, in the protocol's own words: a status, a code that programs can test, one sentence.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "messages[0].content[1]", "code": "..."}}

Texts are written here or are those of `LlavaError`, which name values and ways out. Those of libraries are never passed
on: they hold paths, addresses of objects, and pieces of other people's requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava.errors import (
    ContextLengthError,
    EngineError,
    ImageError,
    ImageTooLargeError,
    OutOfMemoryError,
    PromptError,
    QueueFullError,
)

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that gets an error for an answer.

    code: what a program tests. param: the place in the request, as in `messages[0].content[1]`. headers: further ones
    of the response, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error as the protocol writes it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(code: str, message: str, param: str | None = None) -> ApiError:
    """An error of the request's content (status 400)."""
    return ApiError(400, code, message, param=param)


def internal_error() -> ApiError:
    """A bug of ours, of which the client learns nothing but that it is one."""
    return ApiError(500, "internal_error", "the server failed on this request; its log says more")


def shutting_down() -> ApiError:
    return ApiError(503, "server_shutting_down", "the server is shutting down; ask again", headers={"Retry-After": "5"})


def busy(retry_after: int) -> ApiError:
    """Too much is under way already. retry_after: seconds."""
    return ApiError(
        429,
        "queue_full",
        f"too many requests wait already; try again in {retry_after} s",
        headers={"Retry-After": str(retry_after)},
    )


def explain(error: BaseException, *, param: str | None = None) -> ApiError:
    """The protocol's error for one of ours; `internal_error` for everything that is not of our error tree."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return busy(error.retry_after)
    if isinstance(error, ContextLengthError):
        return invalid("context_length_exceeded", str(error), param or "messages")
    if isinstance(error, ImageTooLargeError):
        return invalid("image_too_large", str(error), param)
    if isinstance(error, ImageError):
        return invalid("invalid_image", str(error), param)
    if isinstance(error, PromptError):
        return invalid("invalid_value", str(error), param or "messages")
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, "out_of_memory", str(error))
    if isinstance(error, EngineError):
        return ApiError(500, "model_failed", str(error))
    return internal_error()
