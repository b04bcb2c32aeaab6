"""Captions and tables as conversations: COCO captions, CSV files with named columns, folders of pictures."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import DataError, UsageError

#: What LLaVA-1.5's mix asks of a short caption.
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
_DESCRIBE = "Describe the picture."
# Columns that are taken when none is named, the first that is there.
_COLUMNS = {
    "image": ("image", "image_path", "path", "file", "file_name", "filename", "picture"),
    "question": ("question", "prompt", "instruction", "query"),
    "answer": ("answer", "caption", "text", "response", "output", "label"),
    "id": ("id", "question_id"),
}
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def read_coco_captions(path: Path, *, prompt: str = CAPTION_PROMPT, captions: str = "all") -> Iterator[tuple[str, Any]]:
    """(origin, LLaVA record) of each caption of a captions_*.json; captions: "all", or "first" for one a picture.

    The whole file is read at once (90 MB and some 500 MB of memory for COCO 2017's training captions).
    """
    if captions not in ("all", "first"):
        raise UsageError(f"captions={captions}: all, or first")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise DataError(f"{path}: no 'images' and 'annotations'; a COCO captions file has both")
    files = {picture["id"]: picture["file_name"] for picture in content["images"]}
    seen: set[object] = set()
    for number, annotation in enumerate(content["annotations"]):
        origin = f"{path} (annotation {number})"
        image, caption = annotation.get("image_id"), annotation.get("caption")
        if image not in files:
            raise DataError(f"{origin}: image_id {image!r} is not among the file's images")
        if not isinstance(caption, str):
            raise DataError(f"{origin}: no caption; is this a file of boxes?")
        if captions == "first" and image in seen:
            continue
        seen.add(image)
        identity = str(annotation.get("id", number))
        yield origin, _record(identity, files[image], prompt, caption.strip())


def read_csv(path: Path, *, prompt: str = _DESCRIBE, delimiter: str = "", **columns: str) -> Iterator[tuple[str, Any]]:
    """(origin, LLaVA record) of each row; columns: which column holds the image, question, answer and id.

    `image=file answer=label`; usual names are found by themselves. Without a question column every row asks `prompt`;
    a row with an empty image cell is text only. delimiter: "," unless the name ends in .tsv.
    """
    unknown = set(columns) - set(_COLUMNS)
    if unknown:
        raise UsageError(f"{', '.join(sorted(unknown))}: options are {', '.join(_COLUMNS)}, prompt and delimiter")
    separator = {"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter) or ("\t" if path.suffix == ".tsv" else ",")
    if len(separator) != 1:
        raise UsageError(f"delimiter={delimiter}: one character, or tab")
    before = csv.field_size_limit(1 << 30)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            header = next(reader, None)
            if not header:
                raise DataError(f"{path}: empty; the first row must name the columns")
            places = _find_columns(header, columns, path)
            line = reader.line_num
            for number, row in enumerate(reader):
                origin, line = f"{path}:{line + 1}", reader.line_num
                if row:
                    yield origin, _row_record(row, places, len(header), prompt, number, origin)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.object[error.start]:#04x} is not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    finally:
        csv.field_size_limit(before)


def read_picture_folder(path: Path, *, prompt: str = _DESCRIBE, answer: str = "txt") -> Iterator[tuple[str, Any]]:
    """(origin, LLaVA record) of each picture below a folder, in the order of their names.

    answer: "txt": the text of the .txt file beside it (cat.jpg, cat.txt); "folder": the name of its folder. Raises
    DataError for a picture without one.
    """
    if answer not in ("txt", "folder"):
        raise UsageError(f"answer={answer}: txt (a .txt file beside each picture), or folder (its folder's name)")
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    for file in _pictures(path):
        name = file.relative_to(path).as_posix()
        if answer == "folder":
            if file.parent == path:
                raise DataError(f"{file}: not in a folder of its own, whose name would be the answer")
            text = file.parent.name.replace("_", " ")
        else:
            beside = file.with_suffix(".txt")
            try:
                text = beside.read_text(encoding="utf-8").strip()
            except FileNotFoundError:
                raise DataError(f"{file}: no {beside.name} beside it; write one, or give answer=folder") from None
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{beside}: cannot be read as UTF-8 text ({error})") from error
        yield str(file), _record(name, name, prompt, text)


def _pictures(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(here, name) for name in sorted(files) if Path(name).suffix.lower() in _PICTURES)


def _find_columns(header: Sequence[str], wanted: Mapping[str, str], path: Path) -> dict[str, int]:
    """Which column holds what. Raises DataError for one that is not there, or when there is none with answers."""
    places: dict[str, int] = {}
    for role, names in _COLUMNS.items():
        if role in wanted:
            if wanted[role] not in header:
                raise DataError(f"{path}:1: no column {wanted[role]!r}; found {', '.join(header)}")
            places[role] = header.index(wanted[role])
            continue
        found = next((name for name in names if name in header), None)
        if found is not None:
            places[role] = header.index(found)
    if "answer" not in places:
        raise DataError(f"{path}:1: which column is the answer? Give answer=NAME; found {', '.join(header)}")
    return places


def _row_record(
    row: Sequence[str], places: Mapping[str, int], width: int, prompt: str, number: int, origin: str
) -> dict[str, Any]:
    if len(row) != width:
        raise DataError(f"{origin}: {len(row)} cells in a table of {width} columns; put quotes around commas")
    cell = {role: row[place] for role, place in places.items()}
    return _record(cell.get("id", str(number)), cell.get("image", ""), cell.get("question", prompt), cell["answer"])


def _record(identity: str, image: str, question: str, answer: str) -> dict[str, Any]:
    if image and "<image>" not in question:
        question = f"<image>\n{question}"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": identity, **({"image": image} if image else {}), "conversations": turns}
