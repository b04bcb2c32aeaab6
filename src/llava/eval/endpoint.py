"""An OpenAI-compatible server as something that answers questions.

    with ChatEndpoint("http://localhost:8000/v1", model="llava-1.5-7b") as endpoint:
        reply = endpoint.ask([{"role": "user", "content": "Hello"}], temperature=0, max_tokens=8)

Requests that a server refuses for want of room (429), that fail in it (5xx) or on the way are sent again, later and
later, or when its Retry-After says. The key is read from an environment variable and never written or logged.
"""

from __future__ import annotations

import base64
import logging
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from llava.errors import EngineError, LlavaError, UsageError
from llava.eval.runner import OnAnswer, longest_first
from llava.eval.task import Question

KEY_VARIABLE = "OPENAI_API_KEY"
_TRIES = 8
_LONGEST_WAIT_SECONDS = 60.0
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_MIME = {".png": "image/png", ".webp": "image/webp", ".gif": "image/gif", ".bmp": "image/bmp"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """What a server said. model: the one that it says answered; tokens: None where it does not count."""

    text: str
    model: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


class ChatEndpoint:
    """A server's /chat/completions. Safe to use from several threads.

    url: up to and with /v1. model: None takes the only one that the server lists. transport: for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key: str | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url}: no web address; give the server's, http://localhost:8000/v1 for one")
        self.url = url.rstrip("/")
        key = key if key is not None else os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=_TIMEOUT, transport=transport)
        self._sleep = sleep
        self.model = self._only_model() if model is None else model

    def ask(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Reply:
        """One completion. settings: as the protocol names them. Raises EngineError when there is none in the end."""
        return self.send({"model": self.model, "messages": list(messages), **settings})

    def send(self, payload: Mapping[str, Any]) -> Reply:
        """One completion of exactly this payload."""
        body = self._request("POST", "/chat/completions", json=payload).json()
        try:
            choice = body["choices"][0]
            text = choice["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise EngineError(f"{self.url}: a reply without choices; is it an OpenAI-compatible server?") from None
        usage = body.get("usage") or {}
        return Reply(
            text,
            str(body.get("model", payload.get("model"))),
            choice.get("finish_reason"),
            usage.get("prompt_tokens"),
            usage.get("completion_tokens"),
        )

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> ChatEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _only_model(self) -> str:
        listed = [str(row["id"]) for row in self._request("GET", "/models").json().get("data", [])]
        if len(listed) != 1:
            raise UsageError(f"{self.url}: it has {len(listed)} models ({', '.join(listed[:9])}); name one")
        return listed[0]

    def _request(self, method: str, path: str, **body: Any) -> httpx.Response:
        said = ""
        for tries in range(_TRIES):
            pause = min(2.0**tries, _LONGEST_WAIT_SECONDS) * (0.5 + random.random() / 2)
            try:
                response = self._client.request(method, self.url + path, **body)
            except httpx.ConnectError as error:
                raise EngineError(f"{self.url}: nobody answers there ({error}); is the server running?") from None
            except httpx.TransportError as error:
                said = str(error) or type(error).__name__
            else:
                if response.is_success:
                    return response
                said = _problem(response)
                if response.status_code in (401, 403):
                    raise UsageError(f"{self.url}: {said}; put the key into {KEY_VARIABLE}")
                if response.status_code != 429 and response.status_code < 500:
                    raise EngineError(f"{self.url}: {said}")
                pause = _retry_after(response) or pause
            if tries + 1 < _TRIES:
                logger.info("%s: %s; again in %.1f s", self.url, said, pause)
                self._sleep(pause)
        raise EngineError(f"{self.url}: {said}, {_TRIES} times; try again later, or with less at once")


class EndpointModel:
    """A model behind an address. concurrency: requests under way at once."""

    def __init__(self, endpoint: ChatEndpoint, *, concurrency: int = 16) -> None:
        if concurrency < 1:
            raise UsageError(f"--concurrency {concurrency}: at least 1")
        self.endpoint = endpoint
        self.model_id = endpoint.model
        self.concurrency = concurrency

    def describe(self) -> dict[str, Any]:
        """The address and the model's name there; its weights cannot be known from outside."""
        return {"model": self.model_id, "endpoint": self.endpoint.url}

    def answer(self, questions: Sequence[Question], decoding: Mapping[str, Any], on_answer: OnAnswer) -> None:
        """Answer all; questions on one picture are sent one after the other, so that a server can keep it."""
        settings = request_settings(decoding)
        todo = chain.from_iterable(longest_first(questions))
        with ThreadPoolExecutor(self.concurrency) as pool:
            running: dict[Future[Reply], Question] = {}
            try:
                while True:
                    for question in islice(todo, 2 * self.concurrency - len(running)):
                        running[pool.submit(self._ask, question, settings)] = question
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        question = running.pop(future)
                        try:
                            text = future.result().text.strip()
                        except UsageError:
                            raise
                        except LlavaError as error:
                            on_answer(question, "", error)
                        else:
                            on_answer(question, text, None)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, question: Question, settings: Mapping[str, Any]) -> Reply:
        return self.endpoint.ask(question_messages(question), max_tokens=question.max_new_tokens, **settings)


def question_messages(question: Question) -> list[dict[str, Any]]:
    """A question as the protocol's messages: pictures as data addresses, then the words."""
    pictures = [{"type": "image_url", "image_url": {"url": data_url(path)}} for path in question.images]
    text = {"type": "text", "text": question.prompt}
    content = [text, *pictures] if question.meta.get("picture_last") else [*pictures, text]
    said = question.meta.get("system")
    system = [] if said is None else [{"role": "system", "content": said}]
    return [*system, {"role": "user", "content": content}]


def data_url(path: Path) -> str:
    """A picture's bytes as they are on disk, as a data: address."""
    mime = _MIME.get(path.suffix.lower(), "image/jpeg")
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"


def request_settings(decoding: Mapping[str, Any]) -> dict[str, Any]:
    """A task's decoding in the protocol's names. Raises UsageError for what the protocol has no word for."""
    if int(decoding.get("num_beams", 1)) > 1:
        raise UsageError(
            f"this benchmark is asked with {decoding['num_beams']} beams, which the protocol has not; "
            "use a model here, or --greedy, whose figures do not compare"
        )
    names = ("temperature", "top_p", "seed")
    return {"temperature": 0.0, **{name: decoding[name] for name in names if name in decoding}}


def _problem(response: httpx.Response) -> str:
    try:
        said = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = response.text[:200]
    return f"{response.status_code} {' '.join(str(said).split())}"


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return min(max(float(response.headers["retry-after"]), 0.1), _LONGEST_WAIT_SECONDS)
    except (KeyError, ValueError):
        return None
