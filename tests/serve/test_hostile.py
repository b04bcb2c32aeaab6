"""Input made to hurt gets an error that says so: nothing at or above 500, no crash, no word of a library, no call."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from typing import Any

import httpx
import pytest

from llava.checkpoint.load import Loaded
from llava.serve.worker import Question
from tests.serve.hostile import encode, injections, parameter_sets, picture_mutants
from tests.serve.servers import NAME, Listener, Running, picture, running, turn

# PIL warns of damage that it reads around; a server logs that and answers.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

_LEAKS = re.compile(r"0x[0-9a-fA-F]{6,}|BytesIO|PIL|pydantic|Traceback|site-packages|\.py\b|torch\.")
_CODES = {
    "invalid_image", "image_too_large", "invalid_type", "invalid_value", "missing_required_parameter",
    "unknown_parameter", "unsupported_parameter", "unsupported_value", "model_not_found", "too_many_messages",
    "too_many_parts", "invalid_image_url", "context_length_exceeded", "invalid_json",
}  # fmt: skip


def check(response: httpx.Response, what: object) -> str:
    """The error's code, "" for an answer."""
    assert response.status_code in (200, 400, 404), (response.status_code, response.text[:300], what)
    assert not _LEAKS.search(response.text), (response.text[:300], what)
    assert len(response.text) < 200_000
    if response.status_code == 200:
        return ""
    error = response.json()["error"]
    assert error["code"] in _CODES, (error, what)
    assert len(error["message"]) < 1500, what
    return str(error["code"])


def feed_pictures(server: Running, count: int) -> Counter[str]:
    return Counter(
        check(server.ask(messages=[turn("hi", data)], max_tokens=1), data[:60]) for data in picture_mutants(count)
    )


def feed_injections(server: Running, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Question] = []
    prepare = server.worker.prepare
    monkeypatch.setattr(server.worker, "prepare", lambda request: asked.append(prepare(request)) or asked[-1])
    tokenizer = server.worker.processor.tokenizer
    special = tokenizer.special_ids | {server.worker.processor.image_token_id}
    check(server.ask(messages=[turn("x")], max_tokens=1), "x")
    wanted = [int(token) for token in asked.pop().encoded.input_ids if int(token) in special]
    for text in injections(count):
        assert check(server.ask(messages=[turn(text)], max_tokens=1), text) == "", text
        ids = [int(token) for token in asked.pop().encoded.input_ids]
        assert [token for token in ids if token in special] == wanted, text


def test_damaged_pictures_are_answered_or_refused(server: Running) -> None:
    found = feed_pictures(server, 300)
    assert found[""] > 30, "hardly any mutant is still a picture"
    assert found["invalid_image"] > 100
    assert server.http.get("/health").status_code == 200


@pytest.mark.slow  # about a minute: 2,500 requests with a picture each
def test_thousands_of_damaged_pictures_are_answered_or_refused(server: Running) -> None:
    before = server.ask(messages=[turn("hi", picture())]).json()["choices"]
    feed_pictures(server, 2500)
    assert server.http.get("/health").status_code == 200
    assert server.ask(messages=[turn("hi", picture())]).json()["choices"] == before


def test_words_that_look_like_the_templates_are_words(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    feed_injections(server, 300, monkeypatch)


@pytest.mark.slow  # about a minute: 5,000 requests
def test_thousands_of_special_strings_are_words(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    feed_injections(server, 5000, monkeypatch)


def feed_parameters(server: Running, every: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for number, changes in enumerate(parameter_sets()):
        if number % every:
            continue
        base: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        found[check(server.post(encode(base | changes)), str(changes)[:200])] += 1
    return found


def test_parameters_of_every_wrong_kind_are_named(server: Running) -> None:
    found = feed_parameters(server, every=3)
    assert found.total() >= 400
    assert found["invalid_type"] > 50
    assert found[""] > 20, "hardly anything was right"
    assert server.http.get("/health").status_code == 200


@pytest.mark.slow  # half a minute: 1,600 requests
def test_all_parameters_of_every_wrong_kind_are_named(server: Running) -> None:
    assert feed_parameters(server, every=1).total() >= 1500


def test_hostile_input_is_refused_while_others_are_answered(tiny: Loaded, listener: Listener) -> None:
    """Every picture part names the listener's port, which nobody calls."""
    with running(tiny) as server:
        wanted = server.ask(max_tokens=8).json()["choices"]
        for path in (
            "/",
            "/v1/chat/completions/../models",
            "/v1/models/%00",
            "/v1/models/..%2f..%2fetc",
            "/%2e%2e/",
            "//",
        ):
            assert server.http.get(path).status_code in (200, 404, 405)
        for headers in ({"Content-Length": "-1"}, {"Content-Length": "abc"}, {"Transfer-Encoding": "chunked, gzip"}):
            with suppress(httpx.TransportError):  # the client's own library refuses, or the server hangs up
                assert server.post(b"{}", **headers).status_code < 500
        url = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{listener.port}/"}}
        for parts in ([url], [url] * 500, [url, {"type": "text", "text": "hi"}]):
            assert server.ask(messages=[{"role": "user", "content": parts}]).status_code == 400
        assert server.ask(max_tokens=8).json()["choices"] == wanted
    assert listener.calls == 0
