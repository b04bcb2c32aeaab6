"""Pictures from the web: public hosts only, whatever the address looks like, within limits, at the checked address.

Real sockets on this machine play the hosts: the resolver under test hands out public addresses, and the connector leads
them to a local server. A guard server counts connections that must never come.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llava.errors import DataError
from llava.prompt.fetch import Address, Fetcher, FetchLimits, is_public

PUBLIC = "93.184.215.14"
Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """A local server whose answer each test chooses; counts what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: Answer = lambda request: send(request, b"picture")
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(f"{self.headers['Host']}{self.path}")
                with suppress(OSError):  # the client has hung up, as it should
                    outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.http.server_address[1])


def send(request: BaseHTTPRequestHandler, body: bytes, *, status: int = 200, **headers: str) -> None:
    request.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    request.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def make_fetcher(server: Server, *, hosts: dict[str, list[str]] | None = None, **limits: float) -> Fetcher:
    """Public addresses lead to the server; a connection to any other fails the test."""

    def connect(address: Address, timeout: float) -> socket.socket:
        assert is_public(address[0]), f"dialled {address}"
        return socket.create_connection(("127.0.0.1", server.port), timeout)

    def resolve(host: str, port: int) -> list[str]:
        if hosts is not None:
            return hosts.get(host, [])
        if host == "public.org" or host.endswith(".public.org"):
            return [PUBLIC]
        # What the system makes of odd spellings; names are not looked up, tests are offline.
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return [str(entry[4][0]) for entry in found]

    return Fetcher(FetchLimits(**limits), resolve=resolve, connect=connect)  # type: ignore[arg-type]


def test_a_picture_is_fetched_once_and_kept(server: Server) -> None:
    fetcher = make_fetcher(server)
    assert fetcher.fetch("http://public.org/a.png?x=1") == b"picture"
    assert fetcher.fetch("http://public.org/a.png?x=1") == b"picture"
    assert server.asked == ["public.org/a.png?x=1"]
    assert fetcher.fetch("http://public.org:8080") == b"picture"
    assert server.asked[-1] == "public.org:8080/"


NOT_FETCHED = [
    "http://127.0.0.1/a.png", "http://localhost/a.png", "http://127.1/", "http://2130706433/", "http://0x7f000001/",
    "http://0177.0.0.1/", "http://0/", "http://0.0.0.0/", "http://10.0.0.1/", "http://172.16.0.1/",
    "http://192.168.1.1/", "http://169.254.169.254/latest/meta-data/", "http://100.64.0.1/", "http://192.0.0.1/",
    "http://198.18.0.1/", "http://224.0.0.1/", "http://240.0.0.1/", "http://255.255.255.255/", "http://192.88.99.1/",
    "http://[::1]/", "http://[::]/", "http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/", "http://[::127.0.0.1]/",
    "http://[fe80::1]/", "http://[fe80::1%25eth0]/", "http://[fc00::1]/", "http://[fec0::1]/", "http://[ff02::1]/",
    "http://[64:ff9b::7f00:1]/", "http://[64:ff9b:1::1]/", "http://[2002:7f00:1::]/", "http://[2001::1]/",
    "http://[2001:db8::1]/", "http://public.org@127.0.0.1/", "http://user:word@public.org/", "http://a\\@public.org/",
    "http://127.0.0.1\\@public.org/", "http://public.org#@127.0.0.1/ x", "http://\u2460\u2461.org/", "http:///a.png",
    "http://public.org:0/", "http://public.org:99999/", "http://public.org:port/", "http://[::1/", "http://.public.org/",
    "http://public.org/a b", "http://public.org/\r\nX: y", "https://", "http://unknown.example/",
    "http://public.org/" + "a" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("url", NOT_FETCHED)
def test_an_address_that_is_not_plainly_public_is_never_dialled(server: Server, url: str) -> None:
    with pytest.raises(DataError, match=r"mix.json:3: picture "):
        make_fetcher(server).fetch(url, origin="mix.json:3")
    assert server.asked == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://public.org/a", "gopher://public.org/", "//public.org/a"])
def test_other_schemes_are_refused(server: Server, url: str) -> None:
    with pytest.raises(DataError, match="not a plain http or https address"):
        make_fetcher(server).fetch(url)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "place", ["http://127.0.0.1/", "http://[::1]/", "//169.254.169.254/x", "file:///etc/passwd", "http://10.1.1.1/", ""]
)
def test_a_redirect_is_checked_like_an_address(server: Server, status: int, place: str) -> None:
    server.answer = lambda request: send(request, b"", status=status, Location=place)
    with pytest.raises(DataError):
        make_fetcher(server).fetch("http://public.org/a.png")
    assert server.asked == ["public.org/a.png"]


def test_public_redirects_are_followed_but_not_for_ever(server: Server) -> None:
    def lead(request: BaseHTTPRequestHandler) -> None:
        left = int(request.path[1:])
        send(request, b"there") if not left else send(request, b"", status=302, Location=f"/{left - 1}")

    server.answer = lead
    assert make_fetcher(server).fetch("http://public.org/3") == b"there"
    with pytest.raises(DataError, match="more than 3 redirects"):
        make_fetcher(server).fetch("http://public.org/4")


def test_a_name_with_one_private_address_among_public_ones_is_refused(server: Server) -> None:
    fetcher = make_fetcher(server, hosts={"mixed.org": [PUBLIC, "127.0.0.1"], "six.org": [PUBLIC, "::ffff:10.0.0.1"]})
    for host in ("mixed.org", "six.org"):
        with pytest.raises(DataError, match="not a public address"):
            fetcher.fetch(f"http://{host}/")
    assert server.asked == []


def test_a_name_that_changes_between_check_and_connection_gains_nothing(server: Server) -> None:
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    dialled: list[str] = []

    def connect(address: Address, timeout: float) -> socket.socket:
        dialled.append(address[0])
        return socket.create_connection(("127.0.0.1", server.port), timeout)

    fetcher = Fetcher(resolve=lambda host, port: next(answers), connect=connect)
    assert fetcher.fetch("http://rebinding.org/") == b"picture"
    assert dialled == [PUBLIC]
    assert server.asked == ["rebinding.org/"]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda request: send(request, b"", status=404), "answered 404"),
        (lambda request: send(request, b"x" * 2000), "2000 bytes, over the limit of 1000"),
        (lambda request: send(request, b"x", Content_Length="999999999999"), "over the limit"),
        (lambda request: send(request, b"short", Content_Length="900"), "cannot be fetched|ended after 5 of 900"),
        (lambda request: send(request, b"x", Content_Encoding="gzip"), "came compressed"),
        (lambda request: send(request, b"x", X="y" * 70_000), "cannot be fetched"),
        (lambda request: request.wfile.write(b"SSH-2.0-server\r\n"), "cannot be fetched"),
        (lambda request: request.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 5000), "more than the limit of 1000"),
        (lambda request: None, "cannot be fetched"),
    ],
)
def test_a_hostile_answer_ends_in_one_line(server: Server, answer: Answer, says: str) -> None:
    server.answer = answer
    with pytest.raises(DataError, match=says):
        make_fetcher(server, max_bytes=1000).fetch("http://public.org/a.png")


def test_an_address_that_failed_is_not_asked_again(server: Server) -> None:
    server.answer = lambda request: send(request, b"", status=404)
    fetcher = make_fetcher(server)
    for _ in range(3):
        with pytest.raises(DataError, match="answered 404"):
            fetcher.fetch("http://public.org/a.png")
    assert len(server.asked) == 1


def slowly(piece: bytes) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        for _ in range(400):
            request.wfile.write(piece)
            request.wfile.flush()
            time.sleep(0.02)

    return answer


@pytest.mark.parametrize(
    "answer", [slowly(b"H"), slowly(b"HTTP/1.1 200 OK\r\nX: y\r\n"), slowly(b"HTTP/1.1 200 OK\r\n\r\n")]
)
def test_the_time_limit_holds_for_a_server_that_sends_a_byte_at_a_time(server: Server, answer: Answer) -> None:
    server.answer = answer
    with pytest.raises(DataError, match=r"took longer than 0.3 s"):
        make_fetcher(server, timeout_seconds=0.3).fetch("http://public.org/a.png")


def test_a_server_without_a_certificate_is_refused(server: Server) -> None:
    with pytest.raises(DataError, match=r"cannot be fetched"):
        make_fetcher(server, timeout_seconds=2.0).fetch("https://public.org/a.png")
    assert server.asked == []


def test_public_addresses_are_public() -> None:
    for address in (PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"):
        assert is_public(address), address
    assert not is_public("no address")
