"""Pictures that a benchmark keeps inside its tables, put beside them as files, each once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from llava.errors import DataError


class PictureStore:
    """A folder of pictures named by their bytes, so that equal ones are one file and later reads write nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, content: bytes) -> Path:
        """The file of a picture's bytes. Raises DataError when it cannot be written."""
        path = self.folder / f"{hashlib.sha256(content).hexdigest()[:24]}.{_ending(content)}"
        if path.is_file():
            return path
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written ({error.strerror}); pictures are taken out of their table into this "
                "folder: make it writable, or copy the benchmark to where you may write"
            ) from None
        return path


def _ending(content: bytes) -> str:
    return "png" if content.startswith(b"\x89PNG") else "jpg"
