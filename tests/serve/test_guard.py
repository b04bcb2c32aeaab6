"""Who may ask, how much, and what a client learns when something is refused."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import openai
import pytest

from llava.checkpoint.load import Loaded
from llava.errors import UsageError
from llava.prompt.decoding import ImageLimits
from llava.serve.keys import Keys, check_binding, names_this_machine, read_key_file
from llava.serve.limits import ServeLimits
from llava.serve.running import bind
from tests.serve.servers import NAME, WAIT, Running, gated, picture, running, turn, wait_until

KEY = "a-key-of-the-tests"


def test_every_route_but_health_asks_for_a_key(tiny: Loaded) -> None:
    with running(tiny, key=KEY) as server:
        paths = server.http.get("/openapi.json").json()["paths"]
        routes = [(method.upper(), path) for path, methods in paths.items() for method in methods]
        assert {"/v1/chat/completions", "/v1/models", "/v1/models/{model}", "/metrics", "/health"} == set(paths)
        # And what the router has beyond its own list, under every method, and paths that do not exist.
        routes += [
            (method, path)
            for path in (*paths, "/openapi.json", "/docs", "/redoc", "/", "/nothing", "//health", "/health/", "/Health")
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
        ]
        for method, path in routes:
            for headers in (
                {"Authorization": ""},
                {"Authorization": "Bearer wrong"},
                {"Authorization": f"Basic {KEY}"},
            ):
                response = server.http.request(method, path.replace("{model}", NAME), headers=headers)
                if path == "/health":
                    assert response.status_code in (200, 405)
                else:
                    assert server.code(response) == (401, "invalid_api_key"), (method, path)
        assert server.http.head("/v1/models", headers={"Authorization": ""}).status_code == 401
        assert server.client.models.list().data[0].id == NAME
        with pytest.raises(openai.AuthenticationError):
            server.client.with_options(api_key="wrong").models.list()


def test_each_of_several_keys_is_good_and_none_is_kept() -> None:
    keys = Keys(["first-key-1", "second-key-2"])
    assert keys.allow(b"Bearer first-key-1")
    assert keys.allow(b"bearer second-key-2")
    for wrong in (None, b"", b"Bearer", b"Bearer ", b"first-key-1", b"Bearer first-key", b"Bearer first-key-1 x"):
        assert not keys.allow(wrong), wrong
    assert "first" not in repr(vars(keys))


def test_a_key_that_cannot_be_one_is_refused(tmp_path: Any) -> None:
    for key in ("", "short", "with a blank", "schlüssel-schlüssel", "line\nbreak-line"):
        with pytest.raises(UsageError, match="API key 1"):
            Keys([key])
    file = tmp_path / "keys"
    file.write_text("# ours\n\n  first-key-1  \nsecond-key-2\n")
    assert read_key_file(file) == ["first-key-1", "second-key-2"]
    file.write_text("# none\n")
    with pytest.raises(UsageError, match="no key in it"):
        read_key_file(file)
    with pytest.raises(UsageError, match="no such file"):
        read_key_file(tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "8.8.8.8", "192.168.1.5"])
def test_other_machines_are_let_in_with_a_key_only(host: str) -> None:
    with pytest.raises(UsageError, match="--api-key-file"):
        bind(host, 0, keys=Keys())
    check_binding(host, Keys([KEY]))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_this_machine_needs_no_key(host: str) -> None:
    check_binding(host, Keys())


def test_a_port_in_use_is_said_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: address already in use"):
            bind("127.0.0.1", port, keys=Keys())


def test_a_web_page_cannot_ask_a_server_without_a_key(server: Running) -> None:
    rebound = server.http.get("/v1/models", headers={"Host": "evil.example:8000"})
    assert server.code(rebound) == (403, "invalid_host")
    # What a page may send to another origin without being allowed to: no JSON.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = server.post(b"{}", **{"Content-Type": kind})
        assert server.code(response) == (415, "unsupported_media_type")
    preflight = server.http.options("/v1/chat/completions", headers={"Origin": "http://evil.example"})
    assert preflight.status_code == 405
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    for good in (b"localhost:1", b"127.0.0.1", b"[::1]:80", b"127.9.9.9:1"):
        assert names_this_machine(good)
    for bad in (None, b"", b"localhost.evil.example", b"127.0.0.1.evil.example", b"[", b"10.0.0.1", b"[::2]"):
        assert not names_this_machine(bad)


def test_unknown_paths_and_methods_are_errors_of_the_protocol(server: Running) -> None:
    assert server.code(server.http.get("/v1/nothing")) == (404, "not_found")
    wrong = server.http.get("/v1/chat/completions")
    assert server.code(wrong) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert server.code(server.ask(model="gpt-4")) == (404, "model_not_found")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_cut_off_while_it_arrives(tiny: Loaded, chunked: bool) -> None:
    with running(tiny, limits=ServeLimits(max_body_bytes=100_000)) as server:
        sent = 0
        with socket.create_connection(("127.0.0.1", server.port), WAIT) as sock:
            length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 1000000000"
            sock.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{length}"
                "\r\n\r\n".encode()
            )
            block = b"x" * 16_384
            piece = b"%x\r\n%s\r\n" % (len(block), block) if chunked else block
            try:
                while sent < 50_000_000:
                    sock.sendall(piece)
                    sent += len(block)
            except (BrokenPipeError, ConnectionResetError):
                pass
        assert sent < 10_000_000, "the server read on"
        assert server.ask().status_code == 200
        # A client that waits for the answer before it sends gets it.
        with socket.create_connection(("127.0.0.1", server.port), WAIT) as sock:
            sock.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100001\r\n\r\n"
            )
            answer = b""
            while more := sock.recv(65536):
                answer += more
        assert b" 413 " in answer.splitlines()[0]
        assert b"request_too_large" in answer
        assert server.code(server.post(b"x" * 100_001)) == (413, "request_too_large")


def test_a_body_of_exactly_the_limit_is_read(tiny: Loaded) -> None:
    with running(tiny, limits=ServeLimits(max_body_bytes=1000)) as server:
        assert server.code(server.post(b"{" + b" " * 999)) == (400, "invalid_json")
        assert server.code(server.post(b"{" + b" " * 1000)) == (413, "request_too_large")


def test_a_body_that_does_not_come_is_not_waited_for(tiny: Loaded) -> None:
    with running(tiny, limits=ServeLimits(body_timeout_seconds=0.2)) as server:
        with socket.create_connection(("127.0.0.1", server.port), WAIT) as sock:
            sock.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000\r\n\r\n{"
            )
            answer = b""
            while more := sock.recv(65536):
                answer += more
        assert b" 408 " in answer.splitlines()[0]
        assert b"request_timeout" in answer


def test_bodies_of_all_requests_together_are_bounded(tiny: Loaded) -> None:
    with running(tiny, limits=ServeLimits(max_buffered_bytes=10_000)) as server:
        refused = server.post(b" " * 20_000)
        assert server.code(refused) == (429, "queue_full")
        for _ in range(4):
            assert server.code(server.post(b" " * 4000)) == (400, "invalid_json"), "bodies are counted for ever"


def test_a_body_is_not_kept_while_it_is_answered(tiny: Loaded) -> None:
    body = b'{"model": "tiny", "max_tokens": 4, ' + b" " * 6000 + b'"messages": [{"role": "user", "content": "hi"}]}'
    with gated(tiny, limits=ServeLimits(max_buffered_bytes=10_000)) as (server, gate):
        asked: list[Any] = []
        threads = [threading.Thread(target=lambda: asked.append(server.post(body))) for _ in range(3)]
        for number, thread in enumerate(threads, start=1):
            thread.start()
            wait_until(lambda number=number: server.worker.service.stats().requests == number)  # type: ignore[misc]
            wait_until(lambda: server.server.config.app._buffered == 0)  # type: ignore[union-attr]
        gate.open.release(100)
        for thread in threads:
            thread.join(WAIT)
    assert [response.status_code for response in asked] == [200, 200, 200]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"text"', b"null", b"\xff\xfe{}", b'{"model": NaN}', b'{"temperature": Infinity}',
     b'{"n": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a":' * 100_000, b"[" * 17 + b"]" * 17,
     b"{" + b",".join(b'"k%d":1' % i for i in range(300_000)) + b"}", b"\\\"" * 200_000, b'"' * 200_001,
     b" " * 20_000_000, b"1" * 20_000_000,
        b'{"a": "' + b"x" * 20_000_000],
    ids=lambda body: f"{body[:12]!r} of {len(body)}",
)  # fmt: skip
def test_what_is_no_reasonable_json_is_refused(server: Running, body: bytes) -> None:
    started = time.process_time()
    assert server.code(server.post(body)) == (400, "invalid_json")
    assert time.process_time() - started < 5, "the time does not grow with the body alone"


def test_a_full_queue_is_429_with_the_time_to_come_back(tiny: Loaded) -> None:
    with gated(tiny, limits=ServeLimits(max_waiting=2)) as (server, gate):
        results: list[Any] = []
        ask = {"max_tokens": 6}
        first = threading.Thread(target=lambda: results.append(server.ask(**ask)))
        first.start()
        wait_until(lambda: gate.blocked)
        others = [threading.Thread(target=lambda: results.append(server.ask(**ask))) for _ in range(2)]
        for thread in others:
            thread.start()
        wait_until(lambda: server.worker.service.engine.num_waiting == 2)
        refused = server.ask(**ask)
        assert server.code(refused) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            server.client.chat.completions.create(model=NAME, messages=[turn("hi")])
        assert server.http.get("/health").status_code == 200
        gate.open.release(1000)
        for thread in (first, *others):
            thread.join(WAIT)
        assert [response.status_code for response in results] == [200, 200, 200]


def test_a_request_whose_answers_do_not_all_find_room_leaves_none_behind(tiny: Loaded) -> None:
    with gated(tiny, limits=ServeLimits(max_waiting=2)) as (server, gate):
        blocker = threading.Thread(target=server.ask, kwargs={"max_tokens": 6})
        blocker.start()
        wait_until(lambda: gate.blocked)
        assert server.code(server.ask(n=4)) == (429, "queue_full")
        gate.open.release(1000)
        blocker.join(WAIT)
        wait_until(lambda: server.worker.service.engine.num_waiting + server.worker.service.engine.num_active == 0)
        assert server.worker.service.stats().cancelled == 2


def test_more_requests_at_once_than_allowed_are_429(tiny: Loaded) -> None:
    with gated(tiny, limits=ServeLimits(max_requests=1)) as (server, gate):
        blocker = threading.Thread(target=server.ask)
        blocker.start()
        wait_until(lambda: gate.blocked)
        assert server.code(server.ask()) == (429, "queue_full")
        assert server.http.get("/health").status_code == 200
        gate.open.release(1000)
        blocker.join(WAIT)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and holds next to nothing."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "size", [(60_000, 1), (1, 60_000), (8193, 8000), (13_000, 13_000), (8000, 8000), (2**31 - 1, 2**31 - 1), (300, 1)]
)
def test_a_picture_beyond_a_limit_is_refused_from_its_header(server: Running, size: tuple[int, int]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.chat.completions.create(model=NAME, messages=[turn("hi", png_header(*size))])
    assert refused.value.code == "image_too_large"
    assert refused.value.param == "messages[0].content[1]"
    assert f"{size[0]} x {size[1]}" in refused.value.message or "pixels" in refused.value.message


def test_each_limit_of_pictures_is_the_servers_own(tiny: Loaded) -> None:
    limits = ServeLimits(
        max_pictures=2,
        max_total_pixels=5000,
        picture=ImageLimits(max_bytes=2000, max_side=60, max_pixels=2400, max_aspect=3),
    )
    with running(tiny, limits=limits) as server:

        def code(*pictures: bytes) -> str:
            response = server.ask(messages=[turn(*pictures, "hi")])
            return "" if response.status_code == 200 else str(response.json()["error"]["code"])

        assert code(picture(48, 48), picture(50, 40)) == ""
        assert code(picture(61, 30)) == "image_too_large"
        assert code(picture(50, 49)) == "image_too_large"
        assert code(picture(40, 13)) == "image_too_large"
        assert code(picture(48, 48) + b"\0" * 2000) == "image_too_large"
        assert code(picture(48, 48), picture(48, 48), picture(1, 1)) == "too_many_images"


def test_hundreds_of_pictures_are_refused_before_one_is_read(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    import llava.serve.pictures as room

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("read a picture of a request that had to be refused")

    monkeypatch.setattr(room, "read_data_url", fail)
    refused = server.ask(messages=[turn(*[picture()] * 500)])
    assert server.code(refused) == (400, "too_many_images")


def test_damaged_pictures_are_named_without_the_librarys_words(server: Running) -> None:
    good = picture(64, 64)
    for bad in (
        b"",
        b"not a picture",
        good[:40],
        good[: len(good) // 2],
        b"%!PS-Adobe",
        b"<svg/>",
        good[:-30] + b"\0" * 30,
    ):
        response = server.ask(messages=[turn("hi", good, bad)])
        if response.status_code == 200:
            continue  # a few bytes at its end are no part of the picture
        assert server.code(response) == (400, "invalid_image"), bad[:20]
        error = response.json()["error"]
        assert error["param"] == "messages[0].content[2]"
        assert "messages[0].content[2]" in error["message"]
        assert "0x" not in error["message"]
        assert "BytesIO" not in error["message"]


def test_a_picture_that_only_breaks_while_it_is_decoded_is_named_too(server: Running) -> None:
    import io
    import random

    import PIL.Image

    noise = PIL.Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
    file = io.BytesIO()
    noise.save(file, "PNG")
    cut = file.getvalue()[:4000]
    response = server.ask(messages=[turn("hi", cut)])
    assert server.code(response) == (400, "invalid_image")
    assert response.json()["error"]["param"] == "messages[0].content[1]"


def test_a_prompt_that_does_not_fit_says_so_in_numbers_before_pictures_are_decoded(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = server.worker.context_length
    short = server.ask(max_tokens=1).json()["usage"]["prompt_tokens"]  # with "hi"
    longest = "x" * (2 + context - 1 - short)
    fits = server.ask(messages=[turn(longest)], max_tokens=None)
    assert fits.status_code == 200
    assert fits.json()["usage"]["completion_tokens"] == 1
    import llava.prompt.processor as room

    monkeypatch.setattr(room, "decode_image", None)
    for message in (turn(longest + "x"), turn(longest, picture()), turn("x" * 100_000)):
        with pytest.raises(openai.BadRequestError) as refused:
            server.client.chat.completions.create(model=NAME, messages=[message])
        assert refused.value.code == "context_length_exceeded"
        assert str(context) in refused.value.message
    assert server.code(server.ask(messages=[turn("x" * 1_000_001)])) == (400, "context_length_exceeded")
    monkeypatch.setattr(server.worker.processor, "encode", None)
    assert server.code(server.ask(messages=[turn("x" * (64 * context + 1))])) == (400, "context_length_exceeded")


def test_errors_have_the_protocols_form_and_an_id_to_find_them_by(server: Running) -> None:
    response = server.ask(temperature=9)
    assert response.status_code == 400
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["param"] == "temperature"
    assert len(response.headers["x-request-id"]) == 32
    assert "server" not in response.headers


def test_a_bug_of_ours_tells_the_client_nothing(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("secret at 0x7f00")

    monkeypatch.setattr(server.worker, "prepare", fail)
    for stream in (False, True):
        response = server.ask(stream=stream)
        assert server.code(response) == (500, "internal_error")
        assert "secret" not in json.dumps(response.json())
    monkeypatch.undo()
    assert server.ask().status_code == 200
