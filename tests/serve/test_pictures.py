"""The pictures of a request, from the web too: what is counted, and that nothing here ever calls a private address."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from llava.checkpoint.load import Loaded
from llava.errors import DataError
from llava.prompt.conversation import Conversation, Image, Text
from llava.prompt.fetch import Fetcher
from llava.prompt.images import ImageSettings
from llava.serve.limits import ServeLimits
from llava.serve.pictures import read_conversation
from llava.serve.problems import ApiError
from llava.serve.protocol import read_request
from tests.serve.servers import WAIT, Listener, Running, data_url, picture, running, turn


def read(
    *messages: dict[str, Any], mode: Any = "crop", limits: ServeLimits | None = None, fetcher: Any = None
) -> Conversation:
    limits = limits or ServeLimits()
    with ThreadPoolExecutor(2) as pool:
        return read_conversation(
            read_request({"model": "m", "messages": list(messages)}, limits),
            limits=limits,
            settings=ImageSettings(mode=mode),
            new_fetcher=None if fetcher is None else lambda: fetcher,
            fetch_pool=pool,
        )


def refusal(*messages: dict[str, Any], **options: Any) -> ApiError:
    with pytest.raises(ApiError) as refused:
        read(*messages, **options)
    return refused.value


def web(*urls: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}} for url in urls]}


class FakeWeb:
    """Plays `Fetcher`."""

    def __init__(self, pages: dict[str, bytes]) -> None:
        self.pages = pages
        self.asked: list[str] = []

    def fetch(self, url: str, *, origin: str = "") -> bytes:
        self.asked.append(url)
        if url not in self.pages:
            raise DataError("'db.internal' is at 10.0.0.5, which is not a public address")
        return self.pages[url]


def test_parts_keep_their_order() -> None:
    red, blue = picture(), picture(colour="blue")
    found = read(turn("a", red, "b", blue)).messages[0].parts
    assert found == (Text("a"), Image(red), Text("b"), Image(blue))


def test_a_strip_counts_as_the_square_that_it_is_padded_to() -> None:
    strip, limits = picture(200, 2), ServeLimits(max_total_pixels=100 * 200)
    assert read(turn(strip), mode="crop", limits=limits)
    assert refusal(turn(strip), mode="pad", limits=limits).code == "image_too_large"
    assert refusal(turn(strip, strip, strip), mode="crop", limits=replace(limits, max_total_pixels=1199)).param == (
        "messages[0].content[2]"
    )


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,@@@", "invalid_image"),
        ("data:image/png;base64,iVBORw0KGgo", "invalid_image"),
        ("data:image/png;base64,", "invalid_image"),
        ("data:image/png,%89PNG", "invalid_image_url"),
        ("data:", "invalid_image_url"),
        ("", "invalid_image_url"),
        ("/etc/passwd", "invalid_image_url"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("ftp://example.org/a.png", "invalid_image_url"),
        ("https://example.org/a.png", "image_url_not_allowed"),
        ("HTTP://example.org/a.png", "image_url_not_allowed"),
        ("data:image/png;base64," + "A" * 40_000_000, "image_too_large"),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_no_picture_is_said_by_its_kind(url: str, code: str) -> None:
    error = refusal(turn("hi"), {"role": "assistant", "content": "yes"}, web(url))
    assert (error.status, error.code, error.param) == (400, code, "messages[2].content[0]")
    assert len(error.message) < 300


def test_pictures_of_the_web_are_fetched_where_the_server_does_that() -> None:
    data = picture()
    fake = FakeWeb({"https://a.org/x.png": data, "http://b.org/y": picture(colour="blue")})
    found = read(web("https://a.org/x.png", data_url(data), "http://b.org/y"), fetcher=fake)
    assert [image.source for image in found.images] == [data, data, picture(colour="blue")]


def test_why_a_picture_was_not_fetched_is_not_told() -> None:
    error = refusal(web("http://db.internal/x.png"), fetcher=FakeWeb({}))
    assert error.code == "image_not_fetched"
    assert "10.0.0.5" not in error.message
    assert "internal" not in error.message


def test_nothing_is_fetched_for_a_request_that_is_refused_anyway() -> None:
    fake = FakeWeb({"https://a.org/x.png": picture()})
    assert refusal(web("https://a.org/x.png", "file:///x"), fetcher=fake).code == "invalid_image_url"
    assert fake.asked == []


def test_pictures_of_the_web_together_are_bounded_in_bytes() -> None:
    fake = FakeWeb({"https://a.org/x.png": picture() + b"\0" * 600})
    limits = ServeLimits(max_body_bytes=1500)
    assert refusal(web(*["https://a.org/x.png"] * 3), fetcher=fake, limits=limits).code == "image_too_large"


def url_forms(port: int) -> list[str]:
    """A hundred ways to write an address of this machine or of its network, and some that are no address."""
    hosts = [
        "127.0.0.1", "localhost", "LOCALHOST", "localhost.", "127.1", "127.0.1", "127.000.000.001", "0.0.0.0", "0",
        "2130706433", "0x7f000001", "0x7f.1", "0x7f.0.0.1", "017700000001", "0177.0.0.1", "0177.1", "127.0.0.1.",
        "127.127.127.127", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
        "[::127.0.0.1]", "[0:0:0:0:0:ffff:7f00:0001]", "[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]",
        "[2001:0:7f00:1::]", "[fec0::1]", "[fe80::1]", "[fe80::1%25lo]", "[fc00::1]", "[fd00::1]", "[ff02::1]",
        "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "198.18.0.1", "192.0.2.1",
        "224.0.0.1", "255.255.255.255", "metadata.google.internal", "①②⑦.⓪.⓪.①", "127。0。0。1", "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
        "user@127.0.0.1", "example.org@127.0.0.1", "127.0.0.1@example.org", "a\\@127.0.0.1", "example.org\\@127.0.0.1",
        "127.0.0.1%00.example.org", "127.0.0.1%2eexample.org", "127.0.0.1\t", "127.0.0.1\r\nHost: x", " 127.0.0.1",
        "[127.0.0.1]", "[::1", "::1", "127.0.0.1#example.org", "127.0.0.1?example.org", "127.0.0.1/example.org",
        "", ".", "..", "-", "256.256.256.256", "1.2.3", "0x", "[v1.x]", "%31%32%37.0.0.1", "xn--", "a" * 300,
    ]  # fmt: skip
    forms = [f"http://{host}:{port}/a.png" for host in hosts]
    forms += [f"https://{host}:{port}/a.png" for host in hosts[:20]]
    forms += [
        f"http:/127.0.0.1:{port}/", f"http:127.0.0.1:{port}", f"http:///127.0.0.1:{port}/",
        f"http:\\\\127.0.0.1:{port}\\",
        f"//127.0.0.1:{port}/", f"HtTp://127.0.0.1:{port}/", f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}/",
        f"gopher://127.0.0.1:{port}/_x", f"dict://127.0.0.1:{port}/", "file:///etc/passwd", "file://127.0.0.1/etc/passwd",
        f"jar:http://127.0.0.1:{port}/!/", f"http://127.0.0.1:{port:05d}/", f"http://127.0.0.1:{port + 65536}/",
        f"http://127.0.0.1:+{port}/", "http://", "https://", "javascript:alert(1)", f"http://127.0.0.1:{port}/\ud83d",
    ]  # fmt: skip
    return forms


def test_no_form_of_an_address_makes_the_server_call_its_own_network(tiny: Loaded, listener: Listener) -> None:
    """With the switch on and the real fetcher; a name that is looked up does not exist."""
    urls = url_forms(listener.port)
    assert len(urls) >= 100

    def new_fetcher() -> Fetcher:
        return Fetcher(resolve=resolve)

    def resolve(host: str, port: int) -> list[str]:
        import socket

        # Numbers in every spelling go the system's way; names would ask a name server.
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            return ["127.0.0.1"] if host.rstrip(".").lower() == "localhost" else []
        return [str(entry[4][0]) for entry in found]

    with running(tiny, allow_urls=True, new_fetcher=new_fetcher) as server:
        for url in urls:
            response = server.ask(messages=[web(url)])
            assert response.status_code == 400, url
            assert response.json()["error"]["code"] in ("image_not_fetched", "invalid_image_url", "invalid_value"), url
            message = response.json()["error"]["message"]
            assert "127.0.0.1" not in message and str(listener.port) not in message
        assert server.ask().status_code == 200
    assert listener.calls == 0


def test_a_server_without_the_switch_calls_nobody(server: Running, listener: Listener) -> None:
    url = f"http://127.0.0.1:{listener.port}/a.png"
    assert server.code(server.ask(messages=[web(url)])) == (400, "image_url_not_allowed")
    assert listener.calls == 0


def test_hosts_that_take_their_time_keep_nobody_else_waiting(tiny: Loaded) -> None:
    asked, answer = threading.Semaphore(0), threading.Event()

    class SlowWeb(FakeWeb):
        def fetch(self, url: str, *, origin: str = "") -> bytes:
            asked.release()
            assert answer.wait(WAIT)
            return super().fetch(url)

    pages = {"https://a.org/x.png": picture()}
    with running(tiny, allow_urls=True, new_fetcher=lambda: SlowWeb(pages)) as server:  # type: ignore[arg-type, return-value]
        results: list[int] = []
        slow = [
            threading.Thread(target=lambda: results.append(server.ask(messages=[web(*pages)]).status_code))
            for _ in range(6)
        ]
        for thread in slow:
            thread.start()
        for _ in range(server.worker.limits.prepare_threads):
            assert asked.acquire(timeout=WAIT)
        assert server.ask(messages=[turn(picture(), "hi")]).status_code == 200
        answer.set()
        for thread in slow:
            thread.join(WAIT)
        assert results == [200] * 6


def test_the_listener_would_notice_a_call(listener: Listener) -> None:
    import socket

    socket.create_connection(("127.0.0.1", listener.port)).close()
    assert listener.calls == 1
