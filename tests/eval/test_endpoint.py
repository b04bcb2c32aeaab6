from __future__ import annotations

import json
import threading
from pathlib import Path

import httpx
import pytest
from PIL import Image

from llava.errors import EngineError, LlavaError, UsageError
from llava.eval.endpoint import ChatEndpoint, EndpointModel, question_messages, request_settings
from llava.eval.task import Question


def reply(text: str) -> httpx.Response:
    return httpx.Response(
        200, json={"model": "m", "choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {}}
    )


def endpoint(answer: httpx.MockTransport, slept: list[float]) -> ChatEndpoint:
    return ChatEndpoint("http://host/v1/", model="m", key="secret", transport=answer, sleep=slept.append)


def test_a_refusal_for_want_of_room_is_sent_again_when_the_server_says() -> None:
    replies = [httpx.Response(429, headers={"retry-after": "3"}, json={}), httpx.Response(503), reply("yes")]
    slept: list[float] = []
    with endpoint(httpx.MockTransport(lambda request: replies.pop(0)), slept) as there:
        assert there.ask([{"role": "user", "content": "Hi"}]).text == "yes"
    assert slept[0] == 3
    assert 1 <= slept[1] <= 2


def test_a_server_that_never_has_room_is_an_error_that_says_so() -> None:
    slept: list[float] = []
    with (
        endpoint(httpx.MockTransport(lambda request: httpx.Response(429)), slept) as there,
        pytest.raises(EngineError, match="429"),
    ):
        there.ask([])
    assert len(slept) == 7


def test_a_wrong_request_is_not_sent_again() -> None:
    said = {"error": {"message": "too long"}}
    slept: list[float] = []
    with (
        endpoint(httpx.MockTransport(lambda request: httpx.Response(400, json=said)), slept) as there,
        pytest.raises(EngineError, match="400 too long"),
    ):
        there.ask([])
    assert not slept


def test_a_wrong_key_is_named_by_its_variable_and_not_shown() -> None:
    with (
        endpoint(httpx.MockTransport(lambda request: httpx.Response(401)), []) as there,
        pytest.raises(UsageError, match="OPENAI_API_KEY") as caught,
    ):
        there.ask([])
    assert "secret" not in str(caught.value)


def test_the_only_model_of_a_server_need_not_be_named() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/models"
        return httpx.Response(200, json={"data": [{"id": "only"}]})

    assert ChatEndpoint("http://host/v1", transport=httpx.MockTransport(answer)).model == "only"


def test_questions_are_asked_at_once_and_an_error_is_its_questions_own(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(picture)
    asked = [Question(str(n), f"Q{n}", (picture,), {}, 5 + n) for n in range(8)]
    meeting = threading.Barrier(4, timeout=20)

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        meeting.wait()
        assert body["temperature"] == 0
        text = body["messages"][0]["content"][1]["text"]
        assert body["max_tokens"] == 5 + int(text[1:])
        return httpx.Response(400, text="no") if text == "Q3" else reply(f" {text}! ")

    heard: dict[str, tuple[str, LlavaError | None]] = {}
    with endpoint(httpx.MockTransport(answer), []) as there:
        EndpointModel(there, concurrency=4).answer(
            asked, {"temperature": 0}, lambda question, text, error: heard.update({question.id: (text, error)})
        )
    assert len(heard) == 8
    assert heard["5"] == ("Q5!", None)
    assert isinstance(heard["3"][1], EngineError)


def test_a_picture_goes_as_the_bytes_on_disk_before_the_words(tmp_path: Path) -> None:
    picture = tmp_path / "a.jpg"
    picture.write_bytes(b"\x00\x01")
    question = Question("1", "Who?", (picture,), {"system": "Be kind."}, 5)
    system, user = question_messages(question)
    assert system == {"role": "system", "content": "Be kind."}
    assert [part["type"] for part in user["content"]] == ["image_url", "text"]
    assert user["content"][0]["image_url"]["url"] == "data:image/jpeg;base64,AAE="


def test_beams_are_refused_rather_than_forgotten() -> None:
    with pytest.raises(UsageError, match="3 beams"):
        request_settings({"num_beams": 3})
