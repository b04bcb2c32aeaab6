"""Logs as JSON lines: what was asked of the server and how it went, never what was said.

No prompt, picture, answer, key or address is written: a request's line holds its route, status, code, times and counts.
A failure's holds the exception's type and the code's place, not its text, which may quote a request.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from types import TracebackType
from typing import Any, TextIO

_log = logging.getLogger("llava.serve.requests")


class JsonLines(logging.Formatter):
    """One JSON object a record; control characters are escaped, so that no value forges a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
        }
        fields = getattr(record, "fields", None)
        if fields is None:
            line["logger"] = record.name
            line["message"] = record.getMessage()
        else:
            line.update(fields)
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            line["at"] = _places(record.exc_info[2])
        return json.dumps(line, ensure_ascii=True, default=str)


def log_event(event: str, **fields: Any) -> None:
    """Write a line of a server's own doings. fields: numbers, names and codes only."""
    _log.info(event, extra={"fields": {"event": event, **fields}})


def log_failure(request_id: str) -> None:
    """Write the exception at hand without its text."""
    _log.error("failure", exc_info=True, extra={"fields": {"event": "failure", "request_id": request_id}})


def configure(stream: TextIO | None = None) -> None:
    """Send every log of this process as JSON lines to `stream` (stderr unless given). For the command, not for tests
    of other rooms: the root logger's handlers are replaced.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("llava").setLevel(logging.INFO)
    logging.captureWarnings(True)  # PIL's about damaged pictures, each once


def _places(trace: TracebackType | None) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)[-12:]]
