"""Log lines: one JSON object each, and nothing in them that somebody said."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from llava.checkpoint.load import Loaded
from llava.serve.logs import configure
from tests.serve.servers import Running, data_url, picture, running, turn

KEY = "canary-key-0123456789"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The log of everything, as the command writes it."""
    root, ours = logging.getLogger(), logging.getLogger("llava")
    before = root.handlers[:], root.level, ours.level
    stream = io.StringIO()
    configure(stream)
    yield stream
    logging.captureWarnings(False)
    root.handlers[:], level, ours_level = before
    root.setLevel(level)
    ours.setLevel(ours_level)


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def test_no_canary_of_any_kind_reaches_the_log(tiny: Loaded, log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = 'canary\r\n{"event": "forged"}\x1b[31m\u2028'
    image = picture(31, 17)
    with running(tiny, key=KEY, allow_urls=True) as server:

        def ask_everything(server: Running) -> None:
            server.ask(
                messages=[turn(canary, image)], stop=["canary"], user="canary-user", metadata={"canary": "canary"}
            )
            server.ask(messages=[turn(canary)], stream=True)
            server.ask(model=canary)
            server.ask(**{canary: canary})
            server.ask(temperature=canary)
            server.ask(messages=[turn(canary, b"canary")])
            url = {"type": "image_url", "image_url": {"url": "http://canary.localhost/canary"}}
            server.ask(messages=[{"role": "user", "content": [url]}])
            server.post(b'{"canary": ')
            server.http.get(
                "/canary", params={"canary": "canary"}, headers={"X-Canary": "canary", "User-Agent": "canary"}
            )
            server.http.get("/v1/models", headers={"Authorization": "Bearer canary-wrong-key"})

        ask_everything(server)

        def fail(*_: object) -> None:
            raise ValueError(f"{canary} {KEY}")

        monkeypatch.setattr(server.worker, "prepare", fail)
        ask_everything(server)
        monkeypatch.undo()
        monkeypatch.setattr(server.worker.service.engine.decoder, "prefill", fail)
        ask_everything(server)
        monkeypatch.undo()
    text = log.getvalue()
    for secret in ("canary", "forged", KEY, "\x1b", "u2028", data_url(image)[-20:], "127.0.0.1"):
        assert secret.lower() not in text.lower(), secret
    found = lines(log)
    requests = [line for line in found if line.get("event") == "request"]
    assert len(requests) == 30
    assert any(line.get("event") == "failure" and line["error"] == "ValueError" for line in found)


def test_a_requests_line_says_how_it_went(tiny: Loaded, log: io.StringIO) -> None:
    with running(tiny) as server:
        answered = server.ask(messages=[turn("hi", picture())])
        server.ask(model="other")
    first, second = (line for line in lines(log) if line.get("event") == "request")
    assert first["request_id"] == answered.headers["x-request-id"]
    assert (first["route"], first["status"]) == ("/v1/chat/completions", 200)
    assert (first["pictures"], first["answer_tokens"], first["finish_reasons"]) == (1, 4, ["length"])
    assert first["prompt_tokens"] == answered.json()["usage"]["prompt_tokens"]
    assert 0 <= first["first_token_seconds"] <= first["seconds"]
    assert (second["status"], second["code"]) == (404, "model_not_found")


def test_an_exceptions_text_is_left_out_and_its_place_is_not(log: io.StringIO) -> None:
    try:
        raise RuntimeError("secret")
    except RuntimeError:
        logging.getLogger("llava.inference.service").exception("the engine failed in a step")
    (line,) = lines(log)
    assert line["error"] == "RuntimeError"
    assert "test_logs.py" in line["at"][-1]
    assert "secret" not in log.getvalue()
