"""The readers of data sets that are not conversations yet, by name; each takes options of its own as texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llava.data.caption_readers import read_coco_captions, read_csv, read_picture_folder
from llava.data.referring import read_referring
from llava.data.science_qa import read_science_qa
from llava.errors import UsageError

#: (origin, LLaVA record) after (origin, LLaVA record).
SourceReader = Callable[..., Iterator[tuple[str, Any]]]

SOURCE_READERS: dict[str, SourceReader] = {
    "scienceqa": read_science_qa,
    "refcoco": read_referring,
    "coco-captions": read_coco_captions,
    "csv": read_csv,
    "folder": read_picture_folder,
}


def read_source(name: str, path: Path, options: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Run a reader. Raises UsageError for an option that it does not have."""
    reader = SOURCE_READERS[name]
    known = inspect.signature(reader).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    options_of = [key for key, parameter in known.items() if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in options_of and not takes_any:
            raise UsageError(f"{option}: {name} has no such option; it has {', '.join(options_of)}")
    return reader(path, **options)


def detect_reader(path: Path) -> str | None:
    """The reader that a folder or table asks for; None: a file of conversations."""
    if path.is_dir():
        if (path / "problems.json").is_file() and (path / "pid_splits.json").is_file():
            return "scienceqa"
        if any(path.glob("refs(*).p")):
            return "refcoco"
        return None if packed_files(path) else "folder"
    return "csv" if path.suffix.lower() in (".csv", ".tsv") else None


def packed_files(folder: Path) -> str | None:
    """The pattern of a folder's tar shards or parquet files; None when it has none."""
    endings = (ending for ending in ("tar", "parquet") if any(folder.glob(f"*.{ending}")))
    return next((str(folder / f"*.{ending}") for ending in endings), None)
