"""Pictures from the web, for whoever names them by address: only public hosts, with limits, checked at each hop.

A stranger's data set or request must not make this machine ask its own network. So: http and https only, no user names
in the address, every address that the host name has must be public (loopback, private, link-local, shared, multicast,
and IPv6 forms that wrap them are refused), and the connection goes to the address that was checked, so that a name
that resolves differently the second time gains nothing. Redirects are followed by hand, three at most, each checked.
Not covered: the time that the system's resolver takes, and content that changes between epochs (download for that).
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from llava.errors import DataError

_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 1 << 16
_REMEMBERED_BYTES = 64 << 20
# Printable ASCII without blank, backslash, quotes and angle brackets: what parsers read differently is refused.
_PLAIN_URL = re.compile(r"https?://[!#$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~]+", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9.])?")
# `is_global` calls these global, but each leads to an IPv4 address of the sender's choice, or into a site.
_WRAPPING = tuple(
    ipaddress.ip_network(text)
    for text in ("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "fec0::/10", "192.88.99.0/24")
)

Address = tuple[str, int]
Resolve = Callable[[str, int], list[str]]
Connect = Callable[[Address, float], socket.socket]


@dataclass(frozen=True)
class FetchLimits:
    """What one picture may cost."""

    max_bytes: int = 20 * 1024 * 1024
    timeout_seconds: float = 10.0
    max_redirects: int = 3


class Fetcher:
    """Fetches pictures; the last ones are kept in memory (64 MB), since conversations on one picture come together.

    resolve: host and port to addresses; connect: opens a socket to one (both replaced in tests).
    """

    def __init__(
        self, limits: FetchLimits | None = None, *, resolve: Resolve | None = None, connect: Connect | None = None
    ) -> None:
        self.limits = limits or FetchLimits()
        self._resolve = resolve or _resolve
        self._connect = connect or _connect
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._failed: dict[str, str] = {}

    def fetch(self, url: str, *, origin: str = "") -> bytes:
        """The bytes behind an address. Raises DataError, led by `origin`, for whatever goes wrong."""
        with self._lock:
            if url in self._kept:
                self._kept.move_to_end(url)
                return self._kept[url]
            problem = self._failed.get(url, "")
        if not problem:
            try:
                data = self._follow(url)
            except _RefusedError as refused:
                problem = str(refused)
        if problem:
            # An address that failed stays failed: a dead host costs its ten seconds once, and a run sees it one way.
            self._failed[url] = problem
            raise DataError(f"{origin}: " * bool(origin) + f"picture {_shown(url)}: {problem}")
        self._keep(url, data)
        return data

    def _keep(self, url: str, data: bytes) -> None:
        with self._lock:
            self._kept_bytes += len(data) - len(self._kept.pop(url, b""))
            self._kept[url] = data
            while self._kept_bytes > _REMEMBERED_BYTES and len(self._kept) > 1:
                self._kept_bytes -= len(self._kept.popitem(last=False)[1])

    def _follow(self, url: str) -> bytes:
        deadline = time.monotonic() + self.limits.timeout_seconds
        for _ in range(self.limits.max_redirects + 1):
            answer = self._get(url, deadline)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise _RefusedError(f"more than {self.limits.max_redirects} redirects; give the last address")

    def _get(self, url: str, deadline: float) -> bytes | str:
        """The body, or where a redirect leads."""
        parts, host, port = _split(url)
        left = deadline - time.monotonic()
        if left <= 0:
            raise _RefusedError(f"took longer than {self.limits.timeout_seconds:g} s; download it instead")
        address = self._choose(host, port)
        # Once the time is up the socket is shut from outside: a server that sends a byte a second is cut off too.
        plain: socket.socket | None = None
        twin: socket.socket | None = None
        watch: threading.Timer | None = None
        try:
            plain = self._connect((address, port), left)
            twin = plain.dup()
            watch = threading.Timer(max(deadline - time.monotonic(), 0.01), _shut, (twin,))
            watch.daemon = True
            watch.start()
            if parts.scheme == "https":
                plain = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
            answer = self._exchange(plain, parts, host, port)
            if time.monotonic() >= deadline:  # a body that was cut off looks like one that ended
                raise TimeoutError
            return answer
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline:
                raise _RefusedError(
                    f"took longer than {self.limits.timeout_seconds:g} s; download it instead"
                ) from None
            raise _RefusedError(f"cannot be fetched ({type(error).__name__})") from None
        finally:
            if watch is not None:
                watch.cancel()
            for sock in (twin, plain):
                if sock is not None:
                    sock.close()

    def _choose(self, host: str, port: int) -> str:
        """One address of the host, when all of them are public."""
        try:
            addresses = self._resolve(host, port)
        except (OSError, UnicodeError):
            addresses = []
        if not addresses:
            raise _RefusedError(f"no host {host!r} is known here")
        for address in addresses:
            if not is_public(address):
                raise _RefusedError(f"{host!r} is at {address}, which is not a public address; download it instead")
        return addresses[0]

    def _exchange(self, sock: socket.socket, parts: SplitResult, host: str, port: int) -> bytes | str:
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        named = f"[{host}]" if ":" in host else host
        default_port = {"http": 80, "https": 443}[parts.scheme]
        headers = {
            "Host": named if port == default_port else f"{named}:{port}",
            "User-Agent": "llava",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
        if response.status in _REDIRECTS:
            place = response.getheader("Location")
            if not place:
                raise _RefusedError(f"answered {response.status} without an address to go to")
            return place
        if response.status != 200:
            raise _RefusedError(f"the server answered {response.status}")
        if response.getheader("Content-Encoding", "identity").lower() != "identity":
            raise _RefusedError("came compressed, which was not asked for")
        return self._read(response)

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        limit = self.limits.max_bytes
        length = response.length
        if length is not None and length > limit:
            raise _RefusedError(f"{length} bytes, over the limit of {limit}; make it smaller")
        chunks: list[bytes] = []
        size = 0
        while chunk := response.read(_CHUNK_BYTES):
            size += len(chunk)
            if size > limit:
                raise _RefusedError(f"more than the limit of {limit} bytes; make it smaller")
            chunks.append(chunk)
        if length is not None and size < length:
            raise _RefusedError(f"ended after {size} of {length} bytes")
        return b"".join(chunks)


class _RefusedError(Exception):
    """Why an address was not fetched, in words that name neither answers nor internals of the other side."""


def is_public(address: str) -> bool:
    """Whether an IP address is one that everybody can reach.

    Stricter than `ipaddress.is_global`, which passes multicast, 6to4, NAT64 and other forms that wrap an address.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        return is_public(str(found.ipv4_mapped))
    if any(found in network for network in _WRAPPING if network.version == found.version):
        return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


def _split(url: str) -> tuple[SplitResult, str, int]:
    """An address in parts, host and port. One parser decides and dials; what others may read differently is refused."""
    if len(url) > 4096 or not _PLAIN_URL.fullmatch(url):
        raise _RefusedError("not a plain http or https address (percent-encode what is unusual in it)")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise _RefusedError("not an address") from None
    if "@" in parts.netloc:
        raise _RefusedError("an address with a user name is not fetched")
    if "[" in parts.netloc:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise _RefusedError("not an address") from None
    elif not _HOST.fullmatch(host):
        raise _RefusedError("not a host name")
    if port == 0:
        raise _RefusedError("not a port")
    return parts, host, port or {"http": 80, "https": 443}[parts.scheme]


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _connect(address: Address, timeout: float) -> socket.socket:
    return socket.create_connection(address, timeout)


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        sock.shutdown(socket.SHUT_RDWR)


def _shown(url: str) -> str:
    return repr(url if len(url) <= 100 else f"{url[:97]}...")
