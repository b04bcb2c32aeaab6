"""Clients that leave, and a server that is told to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from llava.checkpoint.load import Loaded
from tests.cli.tiny_model import write_model
from tests.serve.servers import NAME, WAIT, Gate, Running, gated, picture, running, turn, wait_until


def connect(server: Running, **body: Any) -> socket.socket:
    """A request on a bare connection, which the test can cut."""
    content = json.dumps({"model": NAME, "messages": [turn("hi")], "temperature": 0, "max_tokens": 400} | body).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), WAIT)
    sock.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
    )
    return sock


def settle(server: Running, gate: Gate) -> int:
    """Open the gate until nothing runs any more; returns how many steps that took."""
    before = gate.steps
    while server.worker.service.engine.num_active:
        gate.open.release()
        wait_until(lambda: gate.open._value == 0 or not server.worker.service.engine.num_active)
    return gate.steps - before


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_stops_its_answers_within_two_tokens(tiny: Loaded, stream: bool, n: int) -> None:
    with gated(tiny) as (server, gate):
        sock = connect(server, stream=stream, n=n)
        gate.open.release(5)
        wait_until(lambda: gate.steps == 5)
        sock.close()
        wait_until(lambda: all(t.generation.cancelled for t in server.worker.service._tickets))
        assert settle(server, gate) <= 2
        wait_until(lambda: server.worker.service.stats().cancelled == n)
        assert server.worker.service.stats().answer_tokens <= n * 8
        assert server.worker.service.engine.num_active == 0
        gate.open.release(100)
        assert server.ask().status_code == 200


def test_a_client_that_leaves_while_its_request_waits_is_forgotten(tiny: Loaded) -> None:
    with gated(tiny) as (server, gate):
        engine = server.worker.service.engine
        engine._limits = type(engine._limits)(max_active=1)
        first = connect(server)
        wait_until(lambda: gate.blocked)
        second = connect(server)
        wait_until(lambda: engine.num_waiting == 1)
        second.close()
        wait_until(lambda: sum(t.generation.cancelled for t in server.worker.service._tickets) == 1)
        gate.open.release(3)
        wait_until(lambda: engine.num_waiting == 0)
        assert engine.num_active == 1
        first.close()
        wait_until(lambda: all(t.generation.cancelled for t in server.worker.service._tickets))
        settle(server, gate)


def test_two_hundred_clients_that_leave_leave_nothing_behind(tiny: Loaded) -> None:
    with running(tiny) as server:
        for i in range(200):
            sock = connect(server, stream=i % 2 == 0, messages=[turn(f"question {i % 7}")])
            if i % 4 == 0:
                sock.recv(200 + i)
            sock.close()
        service = server.worker.service
        wait_until(lambda: service.engine.num_active + service.engine.num_waiting == 0)
        assert server.ask().status_code == 200
        wait_until(lambda: not service._tickets)
        wait_until(lambda: "llava_requests_in_flight 1.0" in server.http.get("/metrics").text)


def test_a_client_that_takes_nothing_has_left(tiny: Loaded) -> None:
    """A stand-in for a full socket: sends that never return."""
    import asyncio

    from llava.serve.guard import RequestRecord
    from llava.serve.protocol import read_request
    from llava.serve.replies import Reply
    from llava.serve.streaming import EventStream
    from llava.serve.worker import Worker

    async def ask() -> tuple[str, int]:
        worker = Worker(tiny.model, tiny.processor, name=NAME)
        request = read_request({"model": NAME, "messages": [turn("hi")], "stream": True}, worker.limits)
        answers = await worker.begin(request)
        record = RequestRecord()
        stream = EventStream(
            answers, Reply(NAME, logprobs=False), record, n=1, include_usage=False, send_timeout_seconds=0.05
        )

        async def never(*_: object) -> Any:
            await asyncio.Event().wait()

        await stream({"type": "http"}, never, never)
        await asyncio.to_thread(worker.close)
        return record.code, worker.service.stats().active

    assert asyncio.run(ask()) == ("client_left", 0)


def test_draining_lets_answers_end_and_cuts_the_rest_with_an_error(tiny: Loaded) -> None:
    with gated(tiny, drain_seconds=0.3) as (server, gate):
        engine = server.worker.service.engine
        long = connect(server, stream=True)
        wait_until(lambda: gate.blocked)
        short = connect(server, stream=True, max_tokens=3)
        wait_until(lambda: engine.num_waiting == 1)
        gate.open.release()
        wait_until(lambda: engine.num_active == 2)
        server.server.should_exit = True
        wait_until(lambda: server.worker.draining)
        gate.open.release(3)
        said = read_all(short)
        assert '"finish_reason":"length"' in said
        assert said.rstrip("0\r\n").endswith("data: [DONE]")
        wait_until(lambda: any(t.generation.cancelled for t in server.worker.service._tickets))
        gate.open.release(10)
        said = read_all(long)
        assert "server_shutting_down" in said
        assert "[DONE]" not in said
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), 1)


def test_a_request_that_comes_while_the_server_drains_is_told_so(tiny: Loaded) -> None:
    with running(tiny) as server:
        server.worker.drain(0.1)
        response = server.ask()
        assert server.code(response) == (503, "server_shutting_down")
        assert int(response.headers["retry-after"]) >= 1
        health = server.http.get("/health")
        assert (health.status_code, health.json()["reason"]) == (503, "shutting down")


def read_all(sock: socket.socket) -> str:
    data = b""
    with sock:
        while more := sock.recv(65536):
            data += more
    return data.decode()


@contextmanager
def process(model: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`llava serve` as a user starts it, and its address."""
    started = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "llava",
            "serve",
            str(model),
            "--port",
            "0",
            "--name",
            NAME,
            "--device",
            "cpu",
            *arguments,
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        assert started.stderr is not None
        line = next(line for line in started.stderr if line.startswith("serving"))
        address = line.split(" at ")[1].split("/v1")[0]
        for _ in range(3000):
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            threading.Event().wait(0.01)
        yield started, address
    finally:
        started.kill()
        started.wait(WAIT)
        assert started.stderr is not None
        started.stderr.close()


def test_sigterm_lets_every_answer_end_and_the_process_leaves_with_zero(tmp_path: Path) -> None:
    """The command itself; its log holds nothing of what was said, and no key."""
    model = write_model(tmp_path / "model", context=2048)
    key = "canary-key-of-this-test"
    with process(model, LLAVA_API_KEY=key) as (started, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=WAIT)
        question: Any = {
            "model": NAME,
            "messages": [turn("canary-question \r\n\x1b[31m \u2028", picture())],
            "temperature": 0,
            "max_tokens": 600,
        }
        streams = [client.chat.completions.create(**question, stream=True) for _ in range(3)]
        first = [next(iter(stream)) for stream in streams]
        assert all(chunk.choices[0].delta.role == "assistant" for chunk in first)
        started.send_signal(signal.SIGTERM)
        texts = []
        for stream in streams:
            chunks = list(stream)
            assert chunks[-1].choices[0].finish_reason == "length"
            texts.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
        assert texts[0]
        assert texts == [texts[0]] * 3
        assert started.wait(WAIT) == 0
        assert started.stderr is not None
        lines = [json.loads(line) for line in started.stderr.read().splitlines() if line.startswith("{")]
        assert [line["event"] for line in lines[-2:]] == ["request", "stopped"] or "stopped" in str(lines[-1])
        asked = [line for line in lines if line.get("route") == "/v1/chat/completions"]
        assert [line["answer_tokens"] for line in asked] == [600, 600, 600]
        text = json.dumps(lines)
        for secret in (key, "canary", "\\u2028", "\x1b", "127.0.0.1", texts[0][:12]):
            assert secret not in text
        client.close()


def test_what_the_command_cannot_do_is_one_line_and_two(tmp_path: Path) -> None:
    from llava.cli.main import main

    model = write_model(tmp_path / "model")
    assert main(["serve", str(model), "--host", "0.0.0.0", "--port", "0"]) == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(model), "--port", str(taken.getsockname()[1])]) == 2
    assert main(["serve", str(model), "--port", "0", "--load-in", "3bit"]) == 2
    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 2
    assert main(["serve", str(model), "--port", "0", "--api-key-file", str(tmp_path / "nothing")]) == 2
    assert main(["serve", str(model), "--port", "0", "--name", ""]) == 2
