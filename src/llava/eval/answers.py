"""Files of answers: read in every format that the family's tools write, and written line by line while a run goes on.

The original's format, one JSON object a line:

    {"question_id": 7, "prompt": "How many?", "text": "Two", "answer_id": "Hn4m...", "model_id": "llava-1.5-7b",
     "metadata": {}}

Answers come in any order, so lines do too while a run is under way; what is there is found again by question after a
kill, and `AnswerLog.finish` puts the lines into the questions' order. Not covered: two programs writing one file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from llava.errors import DataError, UsageError
from llava.eval.task import AnswerRow, Question

_IDS = ("question_id", "questionId", "id")
_TEXTS = ("text", "answer", "prediction", "response", "output")
_DIGITS = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def read_answers(path: Path) -> list[AnswerRow]:
    """The answers of a file, in its order, or of all `*.jsonl` shards of a folder, one after the other by name.

    A file is JSONL, a JSON list, a JSON object of texts by question id (MM-Vet's), or objects one after the other
    without a break (Q-Bench's). `question_id` becomes text; all other columns stand in `meta`. Raises DataError, naming
    file and line, for what is none of these or was cut off.
    """
    if path.is_dir():
        shards = sorted(path.glob("*.jsonl"), key=_shard_order)
        if not shards:
            raise DataError(f"{path}: no *.jsonl in this folder; name the file of answers")
        return [row for shard in shards for row in read_answers(shard)]
    return [_row(record, where) for where, record in _records(path)]


def write_answers(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSONL through a temporary file, so that a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    with draft.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


class AnswerLog:
    """Answers to `questions` in `path`, appended as they come; `done` says which questions have one.

    run: "model_id" and "metadata" of every line; a file of another run is refused, or begun anew with `force`. A line
    that was cut off by a kill is dropped. Answers with an error count as not given: they are asked again.
    """

    def __init__(
        self, path: Path, questions: Sequence[Question], *, run: Mapping[str, Any], force: bool = False
    ) -> None:
        self.path = path
        self._questions = {question.id: question for question in questions}
        if len(self._questions) != len(questions):
            raise DataError(f"{path.name}: two questions of this task have one id; the task has to tell them apart")
        self._run = dict(run)
        self._records: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not force:
            self._continue()
        self._file: IO[str] = path.open("w" if force else "a", encoding="utf-8")

    @property
    def done(self) -> frozenset[str]:
        """Ids of the questions that are answered."""
        return frozenset(self._records)

    def write(self, question: Question, text: str, *, error: str | None = None) -> None:
        """One answer, on its way to the disk when this returns. error: why there is none (text is then empty)."""
        record = answer_record(question, text, **self._run)
        if error is not None:
            record["error"] = " ".join(error.split())
        else:
            self._records[question.id] = record
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()  # to the system: a killed program loses nothing of it

    def finish(self) -> list[AnswerRow]:
        """Put the file into the questions' order and return its answers; for each question that has one."""
        self._file.close()
        records = [self._records[key] for key in self._questions if key in self._records]
        write_answers(self.path, records)
        return [_row(record, f"{self.path}:{number}") for number, record in enumerate(records, start=1)]

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def take_over(self, shard: Path) -> int:
        """Copy the answers of another file of the same run that are not here yet; returns how many there were."""
        taken = 0
        for _, record in _records(shard, cut_is_fine=True):
            question = self._questions.get(_key(record))
            if question is not None and "error" not in record and question.id not in self._records:
                self._compare(record, question, f"{shard}")
                self._records[question.id] = record
                self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
                taken += 1
        self._file.flush()
        return taken

    def _continue(self) -> None:
        kept = []
        for where, record in _records(self.path, cut_is_fine=True):
            question = self._questions.get(_key(record))
            if question is None:
                raise UsageError(
                    f"{where}: answers question {_key(record)!r}, which is not asked; name another --out, "
                    "or begin anew with --force"
                )
            self._compare(record, question, where)
            if "error" not in record and question.id not in self._records:
                self._records[question.id] = record
                kept.append(record)
        write_answers(self.path, kept)

    def _compare(self, record: Mapping[str, Any], question: Question, where: str) -> None:
        wanted = answer_record(question, "", **self._run)
        for name in ("prompt", "model_id", "metadata"):
            there, now = record.get(name), wanted.get(name)
            if there != now:
                raise UsageError(
                    f"{where}: answered in another run ({name} {str(there)[:80]!r} there, {str(now)[:80]!r} now); "
                    "name another --out, or begin anew with --force"
                )


def answer_record(
    question: Question, text: str, *, model_id: str = "", metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A line in the original's columns and their order. answer_id is drawn from what was answered, not at random.

    A question whose id the benchmark itself does not have says in meta["question_id"] what stands in the file; its own
    id then goes along in `metadata`.
    """
    shown = question.meta.get("question_id", question.id)
    own = {} if str(shown) == question.id else {"id": question.id}
    return {
        "question_id": shown,
        "prompt": question.prompt,
        "text": text,
        "answer_id": _short_id(f"{model_id}\0{question.id}\0{question.prompt}\0{text}"),
        "model_id": model_id,
        "metadata": {**(metadata or {}), **own},
    }


def _short_id(text: str) -> str:
    """22 letters and digits, as shortuuid writes them."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
    letters = []
    for _ in range(22):
        number, digit = divmod(number, len(_DIGITS))
        letters.append(_DIGITS[digit])
    return "".join(letters)


def _key(record: Mapping[str, Any]) -> str:
    metadata = record.get("metadata")
    own = metadata.get("id") if isinstance(metadata, Mapping) else None
    return str(record.get("question_id") if own is None else own)


def _shard_order(path: Path) -> tuple[str, int, str]:
    """The original names shards `8_0.jsonl` to `8_7.jsonl`; `16_10` comes after `16_9`."""
    head, _, tail = path.stem.rpartition("_")
    return (head, int(tail), "") if tail.isdigit() else (path.stem, -1, "")


def _row(record: Mapping[str, Any], where: str) -> AnswerRow:
    for name in _IDS:
        if isinstance(record.get(name), (str, int)):
            break
    else:
        raise DataError(f'{where}: no "question_id"; an answer names its question')
    texts = [text for text in _TEXTS if isinstance(record.get(text), str)]
    if not texts:
        raise DataError(f'{where}: no "text"; an answer has its words in "text"')
    meta = {key: value for key, value in record.items() if key not in (name, texts[0])}
    return AnswerRow(str(record[name]), record[texts[0]], meta)


def _records(path: Path, *, cut_is_fine: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig", errors="strict" if not cut_is_fine else "replace")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name a file of answers") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    if text.lstrip().startswith("["):
        yield from _listed(_load(text, str(path)), path)
        return
    decoder = json.JSONDecoder()
    place = line = 0
    first = True
    while True:
        begin = place
        while begin < len(text) and text[begin].isspace():
            begin += 1
        if begin == len(text):
            return
        line += text.count("\n", place, begin)
        where = f"{path}:{line + 1}"
        try:
            record, place = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            if "\n" in text[begin:]:
                raise DataError(f'{where}: not JSON; one answer a line: {{"question_id": 1, "text": "yes"}}') from None
            if cut_is_fine:
                return
            raise DataError(
                f"{where}: the last line is cut off; let the run that writes it finish, or take the line out"
            ) from None
        line += text.count("\n", begin, place)
        if first and _is_by_id(record) and not text[place:].strip():
            yield from ((f"{path}: {key}", {"question_id": key, "text": value}) for key, value in record.items())
            return
        first = False
        if not isinstance(record, dict):
            raise DataError(f"{where}: an answer is an object, not {type(record).__name__}")
        yield where, record


def _is_by_id(record: Any) -> bool:
    """MM-Vet's form: {"v1_0": "an answer", ...}."""
    if not isinstance(record, dict) or any(name in record for name in _IDS):
        return False
    return all(isinstance(value, str) for value in record.values())


def _load(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); was it cut off? Copy the whole file") from None


def _listed(records: Any, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{path}:[{number}]: an answer is an object, not {type(record).__name__}")
        yield f"{path}:[{number}]", record
