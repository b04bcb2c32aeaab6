"""The application: the routes, and the errors of whatever stands behind the guard.

POST /v1/chat/completions    GET /v1/models    GET /v1/models/{id}    GET /health    GET /metrics
GET /openapi.json
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from llava import __version__
from llava.serve.guard import Body, Guard, RequestRecord, refuse
from llava.serve.keys import Keys
from llava.serve.metrics import CONTENT_TYPE, Metrics
from llava.serve.problems import ApiError, internal_error
from llava.serve.protocol import ChatRequest, ImagePart
from llava.serve.replies import Reply, dump
from llava.serve.streaming import ClientLeftError, EventStream, unless_gone
from llava.serve.words import Piece
from llava.serve.worker import Answers, Worker

_CLIENT_LEFT = 499  # nginx's number; nobody reads it but the log


def make_app(worker: Worker, *, keys: Keys) -> ASGIApp:
    """The whole application for one model."""
    metrics = Metrics(worker.service)
    return Guard(_make_routes(worker, metrics), keys=keys, limits=worker.limits, metrics=metrics)


def _make_routes(worker: Worker, metrics: Metrics) -> FastAPI:
    app = FastAPI(
        title="llava",
        version=__version__,
        description="OpenAI chat completions about pictures.",
        # The pages would load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            ApiError: _answer_error,
            ClientLeftError: _note_left,
            HTTPException: _answer_http_error,
            Exception: _answer_bug,
        },
    )

    @app.post("/v1/chat/completions", openapi_extra={"requestBody": _request_schema()})
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "unsupported_media_type", "send JSON with the header Content-Type: application/json")
        return await _answer(worker, request)

    @app.get("/v1/models")
    async def list_models() -> Response:
        """The one model that is served."""
        return _json({"object": "list", "data": [_describe(worker)]})

    @app.get("/v1/models/{model:path}")
    async def get_model(model: str) -> Response:
        """The same model by its name."""
        if model != worker.name:
            raise ApiError(404, "model_not_found", "no such model here; GET /v1/models names it", param="model")
        return _json(_describe(worker))

    @app.get("/health")
    async def get_health() -> Response:
        """Whether the model answers: where nothing is under way, a question of one token is asked."""
        problem = await worker.find_problem()
        if problem is None:
            return _json({"status": "ok"})
        return _json({"status": "unavailable", "reason": problem}, status=503)

    @app.get("/metrics")
    async def get_metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return app


@dataclass(frozen=True)
class _Form:
    """How the answers to a request are written."""

    n: int
    stream: bool
    include_usage: bool
    logprobs: bool


async def _answer(worker: Worker, request: Request) -> Response:
    record: RequestRecord = request.scope["llava.record"]
    form, answers = await _begin(worker, request)
    reply = Reply(worker.name, logprobs=form.logprobs)
    if form.stream:
        return EventStream(
            answers,
            reply,
            record,
            n=form.n,
            include_usage=form.include_usage,
            send_timeout_seconds=worker.limits.send_timeout_seconds,
        )
    try:
        pieces = await unless_gone(request.receive, _collect(answers, record))
    finally:
        answers.cancel()
        record.note_usage(answers.usage)
    return _json(reply.completion(pieces, form.n, answers.usage))


async def _begin(worker: Worker, request: Request) -> tuple[_Form, Answers]:
    """Read the body and queue the answers. Neither the body nor its pictures are kept while they are made."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    chat = await worker.read(bytes(body))
    body.clear()
    answers = await unless_gone(request.receive, worker.begin(chat))
    arrived: Body = request.scope["llava.body"]
    arrived.release()
    pictures = sum(isinstance(part, ImagePart) for turn in chat.messages for part in turn.content)
    request.scope["llava.record"].pictures = pictures
    include_usage = chat.stream_options is not None and chat.stream_options.include_usage
    return _Form(chat.n, chat.stream, include_usage, chat.logprobs), answers


async def _collect(answers: Answers, record: RequestRecord) -> list[Piece]:
    pieces = []
    async with aclosing(answers.pieces()) as coming:
        async for piece in coming:
            record.note_piece(piece)
            pieces.append(piece)
    return pieces


def _describe(worker: Worker) -> dict[str, Any]:
    return {
        "id": worker.name,
        "object": "model",
        "created": worker.created,
        "owned_by": "llava",
        "context_length": worker.context_length,
    }


def _request_schema() -> dict[str, Any]:
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    # One self-contained schema: what the others refer to is written where it is used.
    definitions = schema.pop("$defs", {})
    return {"required": True, "content": {"application/json": {"schema": _inlined(schema, definitions)}}}


def _inlined(value: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        if "$ref" in value:
            return _inlined(definitions[value["$ref"].rpartition("/")[2]], definitions)
        return {key: _inlined(entry, definitions) for key, entry in value.items() if key != "discriminator"}
    if isinstance(value, list):
        return [_inlined(entry, definitions) for entry in value]
    return value


def _json(value: object, *, status: int = 200) -> Response:
    return Response(dump(value), status_code=status, media_type="application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.scope["llava.record"].code = error.code
    return _Refusal(error, request.scope["llava.body"])


class _Refusal(Response):
    """An error as the guard sends it: what is left of the body is dropped behind it."""

    def __init__(self, error: ApiError, body: Body) -> None:
        super().__init__(status_code=error.status)
        self._error = error
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await refuse(self._error, send, self._body)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: an unknown path or a wrong method."""
    assert isinstance(error, HTTPException)
    texts = {
        404: ("not_found", "no such path; the API is at /v1/chat/completions"),
        405: ("method_not_allowed", "this path takes another method"),
    }
    code, text = texts.get(error.status_code, ("invalid_request", "the request cannot be read"))
    refused = ApiError(error.status_code, code, text, headers=error.headers)
    return await _answer_error(request, refused)


async def _note_left(request: Request, error: Exception) -> Response:
    request.scope["llava.record"].code = "client_left"
    return Response(status_code=_CLIENT_LEFT)


async def _answer_bug(request: Request, error: Exception) -> Response:
    """The framework raises the exception again behind this answer, so that the guard logs it."""
    return await _answer_error(request, internal_error())
