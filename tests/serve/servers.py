"""A real server on a free port of this machine, in a thread, around a tiny random model that writes letters."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import PIL.Image
import torch
from torch import Tensor

from llava.checkpoint.load import Loaded, load
from llava.inference.decoder import Group
from llava.serve.keys import Keys
from llava.serve.limits import ServeLimits
from llava.serve.running import Server, bind
from llava.serve.worker import Worker
from tests.cli.tiny_model import write_model

NAME = "tiny"
WAIT = 30.0
# What the model can say when it takes the likeliest token: bytes, in the tokenizer's order behind three specials.
_LETTERS = [3 + ord(letter) for letter in "abcdefghijklmnopqrstuvwxyz ,."]


def load_tiny(folder: Path) -> Loaded:
    """The tiny model, its head cleared but for letters, so that greedy answers are readable."""
    loaded = load(write_model(folder), device="cpu", dtype="float32")
    head = loaded.model.language_model.get_output_embeddings().weight
    with torch.no_grad():
        letters = head[_LETTERS].clone()
        head.zero_()
        head[_LETTERS] = letters
    return loaded


class Running:
    """A server that runs; `client` is the official one."""

    def __init__(self, worker: Worker, server: Server, port: int, key: str | None) -> None:
        self.worker = worker
        self.server = server
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.http = httpx.Client(
            base_url=self.url, timeout=WAIT, headers={} if key is None else {"Authorization": f"Bearer {key}"}
        )
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0, timeout=WAIT)

    def ask(self, **body: Any) -> httpx.Response:
        """A bare request, with a question where none is given."""
        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 4,
            "temperature": 0,
        } | body
        return self.post(json.dumps(body).encode())

    def post(self, content: bytes, **headers: str) -> httpx.Response:
        """Any bytes as a request."""
        return self.http.post(
            "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"} | headers
        )

    def code(self, response: httpx.Response) -> tuple[int, str]:
        return response.status_code, response.json()["error"]["code"]


@contextmanager
def running(
    loaded: Loaded,
    *,
    limits: ServeLimits | None = None,
    key: str | None = None,
    drain_seconds: float = 5.0,
    prepare: Callable[[Worker], None] | None = None,
    **options: Any,
) -> Iterator[Running]:
    """prepare: called with the worker before the first request."""
    worker = Worker(loaded.model, loaded.processor, name=NAME, limits=limits, **options)
    if prepare is not None:
        prepare(worker)
    keys = Keys([] if key is None else [key])
    sock = bind("127.0.0.1", 0, keys=keys)
    ready = threading.Event()
    server = Server(worker, keys=keys, drain_seconds=drain_seconds, on_ready=ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    assert ready.wait(WAIT)
    found = Running(worker, server, sock.getsockname()[1], key)
    try:
        yield found
    finally:
        found.client.close()
        found.http.close()
        server.should_exit = True
        thread.join(WAIT)
        assert not thread.is_alive()


class Gate:
    """A decoder that adds one token each time that the test opens the gate."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.open = threading.Semaphore(0)
        self.steps = 0
        self.blocked = False
        """Whether the engine stands before the gate, so that what comes now has to wait."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def prefill(self, group: Group, branches: Sequence[int]) -> Tensor:
        logits: Tensor = self._decoder.prefill(group, branches)
        return logits

    def step(self, branches: Sequence[int], token_ids: Sequence[int]) -> Tensor:
        self.blocked = True
        assert self.open.acquire(timeout=WAIT)
        self.blocked = False
        self.steps += 1
        logits: Tensor = self._decoder.step(branches, token_ids)
        return logits


@contextmanager
def gated(loaded: Loaded, **options: Any) -> Iterator[tuple[Running, Gate]]:
    """A server whose answers go on only when the gate is opened."""
    gates: list[Gate] = []

    def prepare(worker: Worker) -> None:
        gates.append(Gate(worker.service.engine.decoder))
        worker.service.engine.decoder = gates[0]

    with running(loaded, prepare=prepare, **options) as server:
        try:
            yield server, gates[0]
        finally:
            gates[0].open.release(10_000)


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def picture(width: int = 20, height: int = 10, *, colour: str = "red", format: str = "PNG") -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), colour).save(file, format)
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def turn(*parts: str | bytes, role: str = "user") -> dict[str, Any]:
    """A message of words and pictures."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in parts
    ]
    return {"role": role, "content": content}


class Listener:
    """A port of this machine at which nobody may call."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]

    @property
    def calls(self) -> int:
        """Connections that were made; the system takes them without anybody accepting."""
        found = 0
        while True:
            try:
                self._socket.accept()[0].close()
            except BlockingIOError:
                return found
            found += 1

    def close(self) -> None:
        self._socket.close()
