"""A server's life: an address that may be listened on, the socket, uvicorn, and an end that loses no answer.

SIGTERM or Ctrl-C: no new connections, answers under way get `drain_seconds` to end, the rest is cut with an error
event, and the process leaves with 0. A second Ctrl-C cuts at once.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from llava.errors import UsageError
from llava.serve.app import make_app
from llava.serve.keys import Keys, check_binding
from llava.serve.logs import log_event
from llava.serve.worker import Worker

# After the last answers were cut, so long for them to reach their clients.
_GRACE_SECONDS = 10


class Server(uvicorn.Server):
    """uvicorn, with the model's own drain when it is told to end."""

    def __init__(
        self, worker: Worker, *, keys: Keys, drain_seconds: float = 30.0, on_ready: Callable[[], None] | None = None
    ) -> None:
        app = make_app(worker, keys=keys)
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(drain_seconds) + _GRACE_SECONDS,
            )
        )
        self._worker = worker
        self._drain_seconds = drain_seconds
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_ready is not None:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stats = self._worker.service.stats()
        log_event("draining", active=stats.active, waiting=stats.waiting, seconds=self._drain_seconds)
        # A daemon: a second Ctrl-C does not wait for it.
        drain = threading.Thread(target=self._worker.drain, args=(self._drain_seconds,), daemon=True)
        drain.start()
        await super().shutdown(sockets)
        # The answers' clients are gone; what still runs, nobody waits for.
        await asyncio.get_running_loop().run_in_executor(None, self._worker.close)
        log_event("stopped")


def bind(host: str, port: int, *, keys: Keys) -> socket.socket:
    """A socket at an address, not yet listening. Raises UsageError for one that may not or cannot be had."""
    check_binding(host, keys)
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError):
        raise UsageError(f"--host {host}: no such address on this machine") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise UsageError(f"--host {host} --port {port}: {(error.strerror or 'cannot be bound').lower()}") from None
    sock.set_inheritable(True)
    return sock


def serve(server: Server, sockets: Sequence[socket.socket]) -> None:
    """Run until SIGTERM or Ctrl-C, and return when everything has ended."""
    with _quiet_signals():
        server.run(sockets=list(sockets))


def address_of(sock: socket.socket) -> str:
    """http://HOST:PORT of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _quiet_signals() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more when it is done: it has been answered, and does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
