"""Files of one JSON line an event: metrics, samples, bad steps. Cut back on resume, so that no step stands twice.

A full disk does not end a run here: lines wait in memory until they can be written, and `sync` says when they cannot.
Texts that are replaced as a whole go through `write_durably`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava.errors import TrainingError

_log = logging.getLogger(__name__)


class UnsavedError(TrainingError):
    """Something could not be written. What was saved before is whole, and the same command goes on from it."""


@contextmanager
def naming_unsaved(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an UnsavedError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UnsavedError(
            f"{path}: cannot be written ({error.strerror or error}); what was saved before is whole, so free some "
            "space or fix the folder, and run the same command again"
        ) from error


class Journal:
    """Appends JSON lines that have a whole number `step`. A resumed run first drops the lines behind its checkpoint."""

    def __init__(self, path: Path, *, resume_at: int = 0) -> None:
        self.path = path
        kept = [line for line in read_lines(path) if line["step"] <= resume_at] if resume_at else []
        if kept:
            # Replaced, never cut in place: a kill between emptying and writing would lose every earlier step.
            write_durably(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        else:
            path.unlink(missing_ok=True)
        self._size = path.stat().st_size if kept else 0
        self._waiting = b""
        self._warned = False

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line; on a full disk it waits for the next `write` or `sync`, with one warning."""
        self._waiting += (json.dumps(line, ensure_ascii=False) + "\n").encode()
        try:
            self._flush()
        except OSError as error:
            if not self._warned:
                _log.warning("%s: %s; its lines wait in memory until they can be written", self.path, error.strerror)
            self._warned = True

    def sync(self) -> None:
        """Put every line on the disk. Raises OSError when that cannot be done."""
        self._flush()
        if self._size:
            sync_path(self.path)

    def _flush(self) -> None:
        if not self._waiting:
            return
        with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as file:
            # What an earlier failure wrote in part is a beginning of what waits, and is written over.
            file.seek(self._size)
            done = 0
            while done < len(self._waiting):
                done += file.write(self._waiting[done:]) or 0
        self._size += done
        self._waiting = b""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; a last line that a kill cut short is left out. No file: no lines."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def write_durably(path: Path, text: str) -> None:
    """Write a text beside `path`, flush it and rename it over `path`: whole, or not there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync_path(partial)
    partial.replace(path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Put a file's bytes, or a folder's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
