"""Who may ask: API keys, and which addresses a server without keys may listen on.

Only the keys' SHA-256 is kept, and every comparison takes the same time. A server without keys answers its own machine
alone; it also refuses requests that name another host, which is how a web page's script would come in.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Iterable
from pathlib import Path

from llava.errors import UsageError

_MIN_LENGTH = 8


class Keys:
    """A set of API keys; falsy without any."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Raises UsageError for a key that no header can carry or that is too short to be secret."""
        digests = []
        for number, key in enumerate(keys, start=1):
            if len(key) < _MIN_LENGTH or not (key.isascii() and key.isprintable()) or " " in key:
                raise UsageError(
                    f"API key {number}: must be at least {_MIN_LENGTH} printable ASCII characters without blanks"
                )
            digests.append(_digest(key.encode()))
        self._digests = tuple(digests)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, authorization: bytes | None) -> bool:
        """Whether an Authorization header (`Bearer KEY`) holds one of the keys. True for every one without keys."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or b"").partition(b" ")
        given = _digest(key.strip())
        known = [hmac.compare_digest(given, digest) for digest in self._digests]  # all of them, whichever it is
        return any(known) and scheme.lower() == b"bearer"


def read_key_file(path: Path) -> list[str]:
    """Keys of a file, one a line; blank lines and lines with # are left out. Raises UsageError without any."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or "cannot be read").lower() if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"{path}: {reason}; --api-key-file takes a file with one key a line") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise UsageError(f"{path}: no key in it; write one a line")
    return keys


def check_binding(host: str, keys: Keys) -> None:
    """Raise UsageError when a server without keys would listen where other machines can reach it."""
    if keys or is_loopback(host):
        return
    raise UsageError(
        f"--host {host or repr('')} can be reached from other machines; set a key with --api-key-file FILE, or listen "
        "on 127.0.0.1"
    )


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only; every address that a name has must be."""
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def names_this_machine(host_header: bytes | None) -> bool:
    """Whether a Host header is a loopback address or localhost. No name is looked up."""
    host = (host_header or b"").decode("latin-1").lower()
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
