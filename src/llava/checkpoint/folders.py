"""Folders: found here or on the hub, their config.json read, and replaced as a whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError

# What is downloaded of a hub repository: no code but XTuner's settings, which are searched for words, never run.
WANTED = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "*.pth", "*.pdparams", "xtuner_config.py"]


def find_folder(path: str | Path) -> Path:
    """The folder of a path, or of a hub id ("org/name") after its download. Raises CheckpointError for neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    text = str(path)
    if folder.exists():
        raise CheckpointError(f"{text}: is a file, not a model folder")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{text}: no such folder; a hub id looks like llava-hf/llava-1.5-7b-hf")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{text}: no such folder here, and the hub could not give it ({reason})") from error


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, {} when it has none. Raises CheckpointError when it is not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); restore it from the model's page") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object; restore it from the model's page")
    return data


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and is removed otherwise.

    An existing folder keeps its other files: each new file replaces its namesake, old weight files go, config.json
    comes last. Raises CheckpointError when the place is a file or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; name a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{folder.name}.{os.getpid()}-", suffix=".partial", dir=folder.parent)
        )
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write there ({error.strerror}); choose another folder") from error
    try:
        temporary.chmod(0o755)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        _sync(temporary)
        if folder.exists() and any(folder.iterdir()):
            _replace_files(temporary, folder)
        else:
            temporary.replace(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_files(temporary: Path, folder: Path) -> None:
    fresh = {path.name for path in temporary.iterdir()}
    for old in [*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")]:
        if old.name not in fresh:
            old.unlink()
    for path in sorted(temporary.iterdir(), key=lambda p: (p.name == "config.json", p.name)):
        if path.is_dir() and (folder / path.name).is_dir():
            shutil.rmtree(folder / path.name)
        path.replace(folder / path.name)
    _sync(folder)


def _sync(path: Path) -> None:
    """Put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
