"""A file of answers, one JSON line each, that a broken run can be continued into.

Lines stand in the order of the questions, whatever order the answers come in, so the file is always the beginning of
what an unbroken run writes: continuing is counting its lines. Each line says what was asked of which model:

    {"question_id": 7, "image": "cat.jpg", "prompt": "How many?", "text": "Two.", "model_id": "llava-1.5-7b",
     "metadata": {"weights": "sha256:1f...", "max_new_tokens": 64}}

which is the original's format of answers (`answer_id` left out, being random). A question that could not be answered
has an empty text and "error". Not covered: two programs writing one file at the same time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from llava.errors import UsageError
from llava.inference.questions import Question


class AnswersFile:
    """Answers to `questions`, appended to `path`; `done` of them are there already, `failed` of those with an error.

    run: what every line says of the run, "model_id" and "metadata". Raises UsageError, naming the line, for a file that
    holds answers to other questions or of another run; with `force` it is written anew.
    """

    def __init__(
        self, path: Path, questions: Sequence[Question], *, run: Mapping[str, Any], force: bool = False
    ) -> None:
        self.path = path
        self._questions = questions
        self._run = dict(run)
        self._waiting: dict[int, dict[str, Any]] = {}
        self.done = 0
        self.failed = 0
        end = 0
        if path.exists() and not force:
            end = self._continue(path.read_bytes())
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("r+b" if path.exists() else "wb")
        self._file.truncate(end)
        self._file.seek(end)

    def write(self, number: int, text: str | None, error: Exception | None = None) -> None:
        """The answer to question `number`, or why there is none. It is on the disk once those before it are there."""
        self._waiting[number] = self._record(number, text, error)
        written = False
        while self.done in self._waiting:
            record = self._waiting.pop(self.done)
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self.failed += "error" in record
            self.done += 1
            written = True
        if written:
            self._file.flush()  # to the system: a killed program loses nothing of it

    def read(self) -> Iterator[dict[str, Any]]:
        """The records written so far."""
        self._file.flush()
        for line in self.path.read_bytes().splitlines():
            yield json.loads(line)

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _record(self, number: int, text: str | None, error: Exception | None) -> dict[str, Any]:
        record: dict[str, Any] = {**self._asked(number), "text": text or "", **self._run}
        if error is not None:
            record["error"] = " ".join(str(error).split())
        return record

    def _asked(self, number: int) -> dict[str, Any]:
        question = self._questions[number]
        named = {} if question.id is None else {"question_id": question.id}
        return {**named, "image": question.image, "prompt": question.text}

    def _continue(self, data: bytes) -> int:
        """Check the lines that are there; returns where the last whole one ends."""
        end = 0
        lines = data.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not line.endswith(b"\n") or not isinstance(record, dict):
                if number == len(lines):
                    break  # cut off while it was written
                raise UsageError(f"{self.path}:{number}: not an answer; name another file, or start anew with --force")
            self._compare(record, number)
            self.done += 1
            self.failed += "error" in record
            end += len(line)
        return end

    def _compare(self, record: Mapping[str, Any], number: int) -> None:
        if number > len(self._questions):
            raise UsageError(
                f"{self.path}:{number}: the file holds more answers than the {len(self._questions)} asked for; "
                "name another file, or start anew with --force"
            )
        wanted = {**self._asked(number - 1), **self._run}
        for name, value in wanted.items():
            there = record.get(name)
            if there == value:
                continue
            if isinstance(value, dict) and isinstance(there, dict):
                name, there, value = _first_difference(there, value)
            raise UsageError(
                f"{self.path}:{number}: answers of another run ({name} {_short(there)} there, {_short(value)} now); "
                "name another file, or start anew with --force"
            )


def _first_difference(there: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any]:
    name = next(name for name in sorted({*there, *now}) if there.get(name) != now.get(name))
    return name, there.get(name), now.get(name)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
