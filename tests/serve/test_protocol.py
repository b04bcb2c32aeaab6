"""What a request may hold, and how it is told what it may not."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import openai
import pytest

from llava.serve.limits import ServeLimits
from llava.serve.problems import ApiError
from llava.serve.protocol import ChatRequest, read_request
from tests.serve.servers import NAME, Running, turn

HELLO: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}


def read(**changes: Any) -> ChatRequest:
    return read_request(HELLO | changes, ServeLimits())


def refusal(**changes: Any) -> ApiError:
    with pytest.raises(ApiError) as refused:
        read(**changes)
    return refused.value


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [{"type": "function", "function": FUNCTION}]},
        {"tool_choice": "auto"},
        {"functions": [FUNCTION]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "alloy", "format": "wav"}},
        {"logit_bias": {"50": 1}},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -1},
        {"prediction": {"type": "content", "content": "x"}},
        {"web_search_options": {}},
        {"reasoning_effort": "high"},
        {"store": True},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_is_not_offered_is_refused_by_its_name(server: Running, asked: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.chat.completions.create(**HELLO, **asked)
    name = next(iter(asked))
    assert refused.value.code == "unsupported_parameter"
    assert refused.value.param == name
    assert "does not offer" in refused.value.message


@pytest.mark.parametrize(
    "asked",
    [{"tools": []}, {"tool_choice": "none"}, {"response_format": {"type": "text"}}, {"modalities": ["text"]},
     {"logit_bias": {}}, {"presence_penalty": 0}, {"frequency_penalty": 0.0}, {"tools": None}, {"store": False},
     {"user": "ann"}, {"metadata": {"a": "b"}}, {"service_tier": "auto"}, {"seed": None}, {"stop": None}, {"n": None}],
    ids=str,
)  # fmt: skip
def test_what_asks_for_nothing_is_no_error(asked: dict[str, Any]) -> None:
    assert read(**asked).messages == read().messages


@pytest.mark.parametrize(
    ("asked", "code", "param"),
    [
        ({"model": None}, "missing_required_parameter", "model"),
        ({"messages": None}, "missing_required_parameter", "messages"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
        ({"messages": [{"content": "a"}]}, "missing_required_parameter", "messages[0].role"),
        ({"messages": [{"role": "king", "content": "a"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "unsupported_value", "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "invalid_type", "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "extra": 1}]}, "unknown_parameter", "messages[0].extra"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "unsupported_parameter",
         "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "unsupported_value",
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "invalid_value", "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "missing_required_parameter", "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}, "invalid_value",
         "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "invalid_value",
         "messages"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"},
                       {"role": "user", "content": "a"}]}, "invalid_value", "messages"),
        ({"messages": [turn(b"x", role="system"), turn("hi")]}, "invalid_value", "messages[0].content[0]"),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"temperature": "1"}, "invalid_type", "temperature"),
        ({"temperature": True}, "invalid_type", "temperature"),
        ({"top_p": -0.1}, "invalid_value", "top_p"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 9}, "invalid_value", "n"),
        ({"n": 1.0}, "invalid_type", "n"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"stop": [""]}, "invalid_value", "stop[0]"),
        ({"stop": "x" * 65}, "invalid_value", "stop[0]"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", None),
        ({"top_logprobs": 2}, "invalid_value", None),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"logprobs": 3}, "invalid_type", "logprobs"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", None),
        ({"stream": True, "stream_options": {"nonsense": 1}}, "unknown_parameter", "stream_options.nonsense"),
        ({"temprature": 1}, "unknown_parameter", "temprature"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_named_by_its_place(asked: dict[str, Any], code: str, param: str | None) -> None:
    error = refusal(**asked)
    assert (error.status, error.code, error.param) == (400, code, param), error.message


def test_a_misspelt_parameter_is_told_the_nearest() -> None:
    assert "did you mean 'temperature'?" in refusal(temprature=1).message
    assert len(refusal(**{"x" * 100_000: 1}).message) < 1000


def test_a_string_is_one_text_part_and_a_stop_a_list_of_one() -> None:
    request = read(stop="END")
    assert [part.text for part in request.messages[0].content] == ["hi"]  # type: ignore[union-attr]
    assert request.stop == ["END"]
    assert read(max_completion_tokens=7).token_limit == 7
    assert read(max_tokens=7, max_completion_tokens=7).token_limit == 7
    assert read().token_limit is None


def test_many_messages_and_parts_are_refused_before_they_are_looked_at() -> None:
    assert refusal(messages=[None] * 2000).code == "too_many_messages"
    assert refusal(messages=[{"role": "user", "content": [None] * 2000}]).code == "too_many_parts"


@pytest.mark.parametrize("module", ["protocol", "problems", "limits", "keys", "json_body", "logs"])
def test_the_protocol_needs_no_torch(module: str) -> None:
    heavy = "('torch', 'transformers', 'fastapi')"
    code = f"import sys, llava.serve.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_schema_that_is_published_describes_the_request(server: Running) -> None:
    operation = server.http.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["required"]) == {"model", "messages"}
    assert set(schema["properties"]) == set(ChatRequest.model_fields)
    assert "$ref" not in str(schema)
