"""What a whole folder or file of pictures is to be asked: read from folders, picture files, JSONL and JSON lists.

A record has `image` (a path) and, where it asks its own question, `text`, `question` or `prompt`; `question_id` or `id`
comes back in the answers. That is the original's format of questions, so its benchmarks' files are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import DataError, UsageError
from llava.inference.pictures_in import list_pictures
from llava.prompt.conversation import Image
from llava.prompt.fetch import Fetcher

RECORD_SUFFIXES = (".jsonl", ".json")
_WORDS = ("text", "question", "prompt")
_IDS = ("question_id", "id")


@dataclass(frozen=True)
class Question:
    """One thing to ask. image: the picture as it was named; path: where that is, or its address."""

    image: str
    path: str
    text: str
    id: str | int | None = None


def read_questions(
    given: Sequence[str], *, ask: Sequence[str] = (), images: Path | None = None, allow_urls: bool = False
) -> list[Question]:
    """The questions of folders, picture files, web addresses and files of records, in order.

    ask: what is asked of each picture, one question after the other; without it every record brings its own. images:
    the folder that records' paths start from, their file's own when None. Raises UsageError for what cannot be asked,
    DataError, naming file and line, for a record that is none.
    """
    found: list[Question] = []
    for name in given:
        if Path(name).suffix.lower() in RECORD_SUFFIXES and not is_address(name):
            found += _from_records(Path(name), ask, images)
        elif not ask:
            raise UsageError(f"{name}: nothing is asked; say what with -q, or give a JSONL file of questions")
        else:
            found += [Question(picture, picture, text) for picture in _pictures(name) for text in ask]
    if not allow_urls:
        for question in found:
            if is_address(question.path):
                raise UsageError(f"{question.path}: a web address; add --allow-urls, or download it and give its path")
    return found


def is_address(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


class Pairs(Sequence[tuple[Image, str]]):
    """(picture, question) pairs for `Model.answer_all`; web addresses are fetched when their turn comes."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = questions
        self._fetcher = Fetcher()

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Pairs(self._questions[place])
        question = self._questions[place]
        return open_picture(question.path, self._fetcher), question.text


def open_picture(path: str, fetcher: Fetcher) -> Image:
    """The picture of a path (not opened yet) or of a web address (fetched). Raises DataError."""
    return Image(fetcher.fetch(path) if is_address(path) else Path(path))


def _pictures(name: str) -> list[str]:
    path = Path(name).expanduser()
    if is_address(name):
        return [name]
    if path.is_dir():
        return [str(picture) for picture in list_pictures(path)]
    if not path.exists():
        raise UsageError(f"{name}: no such file or folder")
    return [str(path)]


def _from_records(file: Path, ask: Sequence[str], images: Path | None) -> Iterator[Question]:
    folder = file.parent if images is None else images
    for where, record in _records(file):
        if not isinstance(record, Mapping):
            raise DataError(f"{where}: a record must be an object, not {type(record).__name__}")
        image = record.get("image")
        if not isinstance(image, str) or not image:
            raise DataError(f'{where}: no "image"; a record names its picture: {{"image": "cat.jpg", "text": "..."}}')
        texts = list(ask) or [_text(record, where)]
        key = next((record[name] for name in _IDS if isinstance(record.get(name), (str, int))), None)
        path = image if is_address(image) else str(folder / image)
        for text in texts:
            yield Question(image, path, text, key)


def _text(record: Mapping[str, Any], where: str) -> str:
    for name in _WORDS:
        text = record.get(name)
        if isinstance(text, str) and text.strip():
            # The original's files hold the mark of the picture in some benchmarks; where it stands is the template's.
            return text.replace("<image>", "").strip()
    raise DataError(f'{where}: no question; write it as "text", or ask all with -q')


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; name a folder, a picture or a file of questions") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: not UTF-8 text; save it as UTF-8") from None
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: not JSON ({error}); a list of records, or one record a line") from None
        yield from ((f"{file}:[{number}]", record) for number, record in enumerate(records))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield f"{file}:{number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}:{number}: not JSON ({error}); write one record a line") from None
