"""A judge for tests: a server on this machine that replies from a list and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answering = Callable[[dict[str, Any], int], tuple[int, str]]


@contextmanager
def judging(answer: Answering) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address and the bodies that it was sent. answer: (body, how many came before) -> status and reply."""
    asked: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                status, text = answer(body, len(asked))
                asked.append({**body, "key": self.headers["Authorization"], "path": self.path})
            usage = {"prompt_tokens": 1000, "completion_tokens": 100}
            reply = {"model": "judge-1", "choices": [{"message": {"content": text}}], "usage": usage}
            content = json.dumps(reply if status == 200 else {"error": text}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
