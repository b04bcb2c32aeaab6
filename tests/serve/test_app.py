"""What the official client gets from a server that runs."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import openai
import pytest

from llava.checkpoint.load import Loaded
from llava.inference.answer import Answer, Assistant
from llava.inference.sampling import SamplingParams
from llava.prompt.conversation import Conversation, Image, Message, Text
from llava.serve.limits import ServeLimits
from tests.serve.servers import NAME, Running, data_url, gated, picture, running, turn, wait_until

GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0}


def direct(tiny: Loaded, *parts: str | bytes, **params: Any) -> Answer:
    """The same question asked of the model without a server."""
    said = tuple(Text(part) if isinstance(part, str) else Image(part) for part in parts)
    return Assistant(tiny.model, tiny.processor).answer(
        Conversation((Message("user", said),)), SamplingParams(**{"max_new_tokens": 12} | params)
    )


def test_an_answer_is_the_one_that_the_model_gives_without_a_server(server: Running, tiny: Loaded) -> None:
    got = server.client.chat.completions.create(messages=[turn("What is it?")], max_tokens=12, **GREEDY)
    wanted = direct(tiny, "What is it?")
    assert got.choices[0].message.content == wanted.text != ""
    assert got.choices[0].finish_reason == wanted.finish_reason
    assert got.usage is not None
    assert got.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert got.usage.completion_tokens == len(wanted.token_ids)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert got.object == "chat.completion"
    assert got.model == NAME


def test_pictures_come_as_data_urls_and_are_seen(server: Running, tiny: Loaded) -> None:
    answers = []
    for colour in ("red", "blue"):
        data = picture(colour=colour)
        got = server.client.chat.completions.create(messages=[turn(data, "What is it?")], max_tokens=12, **GREEDY)
        answers.append(got.choices[0].message.content)
        wanted = direct(tiny, data, "What is it?")
        assert answers[-1] == wanted.text
        assert got.usage is not None
        assert got.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert answers[0] != answers[1]


def test_a_conversation_with_system_text_and_several_pictures_is_read_whole(server: Running, tiny: Loaded) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        turn("first", picture(), "then", picture(colour="blue")),
        {"role": "assistant", "content": "a thing", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "And now?", "name": "ann"},
    ]
    got = server.client.chat.completions.create(messages=messages, max_tokens=8, **GREEDY)  # type: ignore[arg-type]
    conversation = Conversation(
        (
            Message("system", (Text("Be short."),)),
            Message("user", (Text("first"), Image(picture()), Text("then"), Image(picture(colour="blue")))),
            Message("assistant", (Text("a thing"),)),
            Message("user", (Text("And now?"),)),
        )
    )
    wanted = Assistant(tiny.model, tiny.processor).answer(conversation, SamplingParams(max_new_tokens=8))
    assert got.choices[0].message.content == wanted.text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_kind_of_picture_that_training_reads_is_answered(server: Running, kind: str) -> None:
    message = turn("hi")
    url = data_url(picture(format=kind), f"image/{kind.lower()}")
    message["content"].append({"type": "image_url", "image_url": {"url": url, "detail": "low"}})
    assert server.ask(messages=[message]).status_code == 200


def test_a_stream_says_the_same_and_counts_its_tokens_where_asked(server: Running) -> None:
    question: Any = {"messages": [turn(picture(), "What?")], "max_tokens": 20, **GREEDY}
    whole = server.client.chat.completions.create(**question)
    chunks = list(
        server.client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-2].choices[0].delta.content is None
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_a_stream_without_the_option_has_no_usage_and_ends_with_done(server: Running) -> None:
    response = server.ask(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_words_of_a_stream_come_one_by_one(tiny: Loaded) -> None:
    with gated(tiny) as (server, gate):
        stream = server.client.chat.completions.create(messages=[turn("hi")], max_tokens=30, stream=True, **GREEDY)
        said = 0
        for chunk in stream:
            if chunk.choices[0].delta.content:
                said += 1
                assert gate.steps <= said + 1, "tokens were made before the ones before them were sent"
            gate.open.release()
        assert said > 5


def test_the_asynchronous_client_is_answered_too(server: Running) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(messages=[turn(f"question {i}")], max_tokens=9, **GREEDY)
                  for i in range(6))
            )  # fmt: skip
            return [answer.choices[0].message.content for answer in answers]

    alone = [server.ask(messages=[turn(f"question {i}")], max_tokens=9).json() for i in range(6)]
    assert asyncio.run(ask()) == [answer["choices"][0]["message"]["content"] for answer in alone]


def test_many_clients_at_once_get_each_their_own_answer(server: Running, tiny: Loaded) -> None:
    questions = [f"{'what ' * (i % 4)}number {i}?" for i in range(24)]
    wanted = [direct(tiny, question, max_new_tokens=10).text for question in questions]
    got: list[str] = [""] * len(questions)

    def ask(i: int) -> None:
        if i % 2:
            with server.client.chat.completions.create(
                messages=[turn(questions[i])], max_tokens=10, stream=True, **GREEDY
            ) as stream:
                got[i] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        else:
            answer = server.client.chat.completions.create(messages=[turn(questions[i])], max_tokens=10, **GREEDY)
            got[i] = answer.choices[0].message.content or ""

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_differ_and_repeat_with_the_seed(server: Running, stream: bool) -> None:
    def ask(n: int, seed: int) -> list[str]:
        question: Any = {"model": NAME, "messages": [turn("hi")], "max_tokens": 8, "n": n, "seed": seed}
        texts = [""] * n
        if stream:
            for chunk in server.client.chat.completions.create(**question, stream=True):
                texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
            return texts
        for choice in server.client.chat.completions.create(**question).choices:
            texts[choice.index] = choice.message.content or ""
        return texts

    three = ask(3, 5)
    assert ask(3, 5) == three
    assert len(set(three)) == 3
    assert ask(1, 5) == three[:1]
    assert ask(1, 6) == three[1:2]


def test_the_usage_of_n_answers_counts_the_prompt_once(server: Running) -> None:
    one, three = (server.ask(n=n, max_tokens=5).json()["usage"] for n in (1, 3))
    assert three["prompt_tokens"] == one["prompt_tokens"]
    assert three["completion_tokens"] == 3 * one["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it(server: Running, stream: bool) -> None:
    whole = server.ask(max_tokens=20).json()["choices"][0]["message"]["content"]
    stop = whole[6:9]
    wanted = whole[: whole.index(stop)].rstrip()
    for given in (stop, ["never said", stop]):
        response = server.ask(max_tokens=20, stop=given, stream=stream)
        if stream:
            choices = [json.loads(line[6:])["choices"][0] for line in response.text.splitlines() if '"choices"' in line]
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            reason = choices[-1]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        assert (text, reason) == (wanted, "stop")


def test_the_longest_answer_has_two_names_and_says_length(server: Running) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = server.ask(**{"max_tokens": None, name: 3}).json()
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["choices"][0]["finish_reason"] == "length"


def test_a_longest_answer_beyond_the_context_is_what_the_context_holds(server: Running) -> None:
    for longest in (None, 100_000):
        answer = server.ask(max_tokens=longest).json()
        assert answer["usage"]["total_tokens"] == server.worker.context_length
        assert answer["choices"][0]["finish_reason"] == "length"


def test_a_request_that_names_no_longest_answer_gets_the_servers(tiny: Loaded) -> None:
    with running(tiny, limits=ServeLimits(default_answer_tokens=7)) as server:
        assert server.ask(max_tokens=None).json()["usage"]["completion_tokens"] == 7
        assert server.ask(max_tokens=9).json()["usage"]["completion_tokens"] == 9


def test_log_probabilities_are_the_models_own(server: Running, tiny: Loaded) -> None:
    asked: Any = {"messages": [turn("hi")], "max_tokens": 6, "logprobs": True, "top_logprobs": 3, **GREEDY}
    got = server.client.chat.completions.create(**asked)
    service = server.worker.service
    encoded = tiny.processor.encode(Conversation((Message("user", (Text("hi"),)),)), open_turn=True)
    wanted = service.engine.submit(encoded, SamplingParams(max_new_tokens=6, logprobs=3))
    list(wanted)
    assert got.choices[0].logprobs is not None
    content = got.choices[0].logprobs.content or []
    assert len(content) == 6
    for entry, one in zip(content, wanted.logprobs, strict=True):
        assert entry.logprob == pytest.approx(one.logprob, abs=1e-5)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx([value for _, value in one.top], abs=1e-5)
        assert entry.bytes == list(entry.token.encode())
    assert "".join(entry.token for entry in content).strip() == got.choices[0].message.content

    streamed = []
    for chunk in server.client.chat.completions.create(**asked, stream=True):
        logprobs = chunk.choices[0].logprobs
        streamed += (logprobs.content or []) if logprobs is not None else []
    assert [entry.token for entry in streamed] == [entry.token for entry in content]


def test_log_probabilities_end_with_the_words_that_a_stop_string_leaves(server: Running) -> None:
    whole = server.ask(max_tokens=20, logprobs=True).json()["choices"][0]
    stop = whole["message"]["content"][6:9]
    cut = server.ask(max_tokens=20, logprobs=True, stop=stop).json()["choices"][0]
    said = "".join(entry["token"] for entry in cut["logprobs"]["content"])
    assert said.strip() == cut["message"]["content"]
    assert server.ask(max_tokens=2).json()["choices"][0]["logprobs"] is None


def test_sampling_parameters_reach_the_engine(server: Running) -> None:
    greedy = server.ask(max_tokens=10).json()["choices"][0]["message"]["content"]
    for same in ({"top_k": 1}, {"top_p": 0}, {"min_p": 1.0}, {"temperature": 1e-9}):
        answer = server.ask(max_tokens=10, **{"temperature": 1.0} | same).json()
        assert answer["choices"][0]["message"]["content"] == greedy, same
    penalised = server.ask(max_tokens=10, repetition_penalty=10.0).json()["choices"][0]["message"]["content"]
    assert penalised != greedy


def test_the_models_are_listed_and_named(server: Running) -> None:
    assert [model.id for model in server.client.models.list()] == [NAME]
    assert server.client.models.retrieve(NAME).owned_by == "llava"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("org/other")


def test_metrics_count_what_was_asked(tiny: Loaded) -> None:
    with running(tiny) as server:
        server.ask(messages=[turn(picture(), "hi")])
        server.ask(model="other")
        wait_until(lambda: 'code="model_not_found"' in server.http.get("/metrics").text)
        wait_until(lambda: "llava_requests_in_flight 1.0" in server.http.get("/metrics").text)
        lines = server.http.get("/metrics").text.splitlines()
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}
    route = 'route="/v1/chat/completions"'
    assert values[f'llava_requests_total{{code="",{route},status="200"}}'] == 1
    assert values[f'llava_requests_total{{code="model_not_found",{route},status="404"}}'] == 1
    assert values["llava_pictures_total"] == 1
    assert values["llava_answer_tokens_total"] == 4
    assert values["llava_answers_active"] == 0
    assert values["llava_requests_in_flight"] == 1
    assert values["llava_first_token_seconds_count"] == 1


def test_health_asks_the_engine_and_says_when_it_does_not_answer(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tiny) as server:
        before = server.worker.service.stats().answer_tokens
        assert server.http.get("/health").json() == {"status": "ok"}
        assert server.worker.service.stats().answer_tokens == before + 1
        server.http.get("/health")
        assert server.worker.service.stats().answer_tokens == before + 1, "asked again within seconds"

        def fail(*_: object) -> None:
            raise RuntimeError("device-side assert at 0x7f3a secret")

        monkeypatch.setattr(server.worker.service.engine.decoder, "prefill", fail)
        refused = server.ask()
        assert server.code(refused) == (500, "internal_error")
        assert "0x7f3a" not in refused.text
        wait_until(lambda: server.worker.service.problem is not None)
        assert server.http.get("/health").status_code == 503
        assert server.code(server.ask()) == (503, "model_failed")


def test_an_engine_that_makes_no_progress_is_not_healthy(tiny: Loaded) -> None:
    with gated(tiny, limits=ServeLimits(stall_seconds=0.05)) as (server, gate):
        asking = threading.Thread(target=server.ask)
        asking.start()
        wait_until(lambda: gate.blocked)
        wait_until(lambda: server.http.get("/health").status_code == 503)
        assert server.http.get("/health").json()["reason"] == "the engine makes no progress"
        gate.open.release(100)
        asking.join()
        wait_until(lambda: server.http.get("/health").status_code == 200)


def test_a_stream_without_news_is_kept_open_with_comments(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    import llava.serve.streaming as room

    monkeypatch.setattr(room, "_PING_SECONDS", 0.01)
    with gated(tiny) as (server, gate):
        question = {"model": NAME, "messages": [turn("hi")], "temperature": 0, "max_tokens": 3, "stream": True}
        with server.http.stream("POST", "/v1/chat/completions", json=question) as response:
            lines = response.iter_lines()
            assert next(line for line in lines if line.startswith(":")) == ": still at it"
            gate.open.release(10)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        chunks = server.client.chat.completions.create(**question)
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_a_client_that_is_told_to_come_back_does_and_is_answered(tiny: Loaded) -> None:
    """The official client waits as long as Retry-After says."""
    with gated(tiny, limits=ServeLimits(max_waiting=1)) as (server, gate):
        engine = server.worker.service.engine
        others = [threading.Thread(target=server.ask) for _ in range(2)]
        others[0].start()
        wait_until(lambda: gate.blocked)
        others[1].start()
        wait_until(lambda: engine.num_waiting == 1)
        service = server.worker.service

        def open_after_the_refusal() -> None:
            wait_until(lambda: service.stats().refused == 1)
            gate.open.release(1000)

        others.append(threading.Thread(target=open_after_the_refusal))
        others[-1].start()
        patient = server.client.with_options(max_retries=3)
        answer = patient.chat.completions.create(messages=[turn("hi")], max_tokens=4, **GREEDY)
        assert answer.choices[0].finish_reason == "length"
        for thread in others:
            thread.join()


def test_running_out_of_memory_ends_one_request_with_an_error_of_its_own(
    tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    with running(tiny) as server:
        decoder = server.worker.service.engine.decoder
        prefill = decoder.prefill

        def fail(group: Any, branches: Any) -> Any:
            if group.image_features is not None:
                raise torch.OutOfMemoryError("tried to allocate 20 GiB at 0x7f")
            return prefill(group, branches)

        monkeypatch.setattr(decoder, "prefill", fail)
        assert server.code(server.ask(messages=[turn(picture(), "hi")])) == (503, "out_of_memory")
        streamed = server.ask(messages=[turn(picture(), "hi")], stream=True)
        last = [line for line in streamed.text.splitlines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "out_of_memory"
        assert server.ask().status_code == 200
