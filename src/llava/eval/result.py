"""What one benchmark made of one model, in a folder, so that reports and comparisons need no model.

OUT/<task>/answers.jsonl     the answers, in the original's format
OUT/<task>/result.json       figures, tables, notes, interval, and all that made them
OUT/<task>/rows.jsonl        question, answer, reference, score and pictures of every row
OUT/<task>/upload/...        the file for the benchmark's server, where there is one
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llava import __version__
from llava.errors import DataError
from llava.eval.answers import read_answers, write_answers
from llava.eval.intervals import bootstrap
from llava.eval.task import AnswerRow, Question, Score, Task, TaskFacts

RESULT, ROWS, ANSWERS = "result.json", "rows.jsonl", "answers.jsonl"
# Where a question's meta keeps what the answer is compared with, by the names that benchmarks use.
_REFERENCES = ("reference", "references", "answer", "answers", "label", "gt", "gt_answer", "ground_truth",
               "correct_ans", "box")  # fmt: skip
_MANY_BYTES = 2**31


@dataclass(frozen=True)
class Row:
    """One question with what was said. correct: 0 to 1, None where the rule does not judge answers one by one."""

    id: str
    prompt: str
    images: tuple[str, ...]
    text: str
    reference: str
    correct: float | None


@dataclass(frozen=True)
class Result:
    """A benchmark's figures with all that made them. interval: of `published_metric`, in its unit, 95 %."""

    task: str
    title: str
    headline: Mapping[str, float]
    published_metric: str
    published: Mapping[str, float]
    interval: tuple[float, float] | None
    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    notes: Sequence[str]
    printed: str
    provenance: Mapping[str, Any]

    @property
    def figure(self) -> float | None:
        """The headline figure that has a published one beside it."""
        return self.headline.get(self.published_metric)


def make_result(
    task: Task,
    facts: TaskFacts,
    questions: Sequence[Question],
    score: Score,
    *,
    root: Path,
    strict: bool,
    made_by: Mapping[str, Any],
) -> Result:
    """Put a score together with what made it. made_by: `Answerer.describe()` and the run's own settings."""
    interval, share = _intervals(score, questions, facts.published_metric)
    return Result(
        task=task.name,
        title=facts.title,
        headline=dict(score.headline),
        published_metric=facts.published_metric,
        published=dict(facts.published),
        interval=interval,
        tables={name: [dict(row) for row in rows] for name, rows in score.tables.items()},
        notes=[*score.notes, *share],
        printed=score.printed,
        provenance={
            "rows": len(questions),
            "pictures": len({question.images for question in questions}),
            "split_hash": split_hash(questions, root),
            "files": [_file_facts(root, file.path, file.sha256) for file in facts.files],
            "prompt": facts.prompt,
            "example": questions[0].prompt if questions else "",
            "decoding": dict(facts.decoding),
            "rule": "strict" if strict else "official",
            **made_by,
            "llava": __version__,
            "python": platform.python_version(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def make_rows(questions: Sequence[Question], answers: Sequence[AnswerRow], score: Score) -> list[Row]:
    """Every question with its answer; an answer whose question cannot be told is left out here, not in the score."""
    texts: dict[str, str] = {}
    by_prompt: dict[tuple[str, str], str] = {}
    for answer in answers:
        metadata = answer.meta.get("metadata")
        own = metadata.get("id") if isinstance(metadata, Mapping) else None
        texts.setdefault(str(own or answer.question_id), answer.text)
        by_prompt.setdefault((answer.question_id, str(answer.meta.get("prompt"))), answer.text)
    rows = []
    for question in questions:
        shown = str(question.meta.get("question_id", question.id))
        text = by_prompt.get((shown, question.prompt), texts.get(question.id, texts.get(shown, "")))
        images = tuple(str(image) for image in question.images)
        rows.append(
            Row(question.id, question.prompt, images, text, _reference(question.meta), score.correct.get(question.id))
        )
    return rows


def save_result(folder: Path, result: Result, rows: Sequence[Row]) -> None:
    """Write result.json and rows.jsonl."""
    write_answers(folder / ROWS, (asdict(row) for row in rows))
    draft = folder / (RESULT + ".part")
    draft.write_text(json.dumps(asdict(result), ensure_ascii=False, indent=1), encoding="utf-8")
    draft.replace(folder / RESULT)


def load_results(out: Path) -> list[tuple[Result, Path]]:
    """All results under a folder, each with its own folder. Raises DataError when there is none."""
    found = []
    for path in sorted(out.glob(f"*/{RESULT}")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["interval"] is not None:
                record["interval"] = tuple(record["interval"])
            found.append((Result(**record), path.parent))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a result ({error}); run that benchmark again") from None
    if not found:
        raise DataError(f"{out}: no results here; name the --out folder of a `llava eval` run")
    return found


def load_rows(folder: Path) -> list[Row]:
    """The rows of a result's folder."""
    path = folder / ROWS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: an answer may hold U+2028
        records = [json.loads(line) for line in lines if line]
        return [Row(**(record | {"images": tuple(record["images"])})) for record in records]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; run that benchmark again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the rows of a result ({error}); run that benchmark again") from None


def load_answers(folder: Path) -> list[AnswerRow]:
    """The answers of a result's folder."""
    return read_answers(folder / ANSWERS)


def split_hash(questions: Sequence[Question], root: Path) -> str:
    """`sha256:` and 64 digits of what is asked: ids, prompts, picture names within `root`, lengths, in order."""
    digest = hashlib.sha256()
    for question in questions:
        images = [
            str(image.relative_to(root)) if image.is_relative_to(root) else image.name for image in question.images
        ]
        asked = [question.id, question.prompt, images, question.max_new_tokens]
        digest.update(json.dumps(asked, ensure_ascii=False).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def _intervals(
    score: Score, questions: Sequence[Question], metric: str
) -> tuple[tuple[float, float] | None, list[str]]:
    """The interval of the published metric where that is the mean of the answers' scores; else a note with theirs."""
    judged = [question for question in questions if question.id in score.correct]
    if not judged:
        return None, []
    values = [score.correct[question.id] for question in judged]
    mean = sum(values) / len(values)
    figure = score.headline.get(metric, math.nan)
    found = bootstrap(values, [question.images or question.id for question in judged])
    scale = next((scale for scale in (1.0, 100.0) if _is_rounded(figure, scale * mean)), None)
    if scale is None:
        said = f"answers right: {mean:.1%}, 95 % interval {found.low:.1%} to {found.high:.1%}"
        return None, [said]
    return (scale * found.low, scale * found.high), []


def _is_rounded(figure: float, mean: float) -> bool:
    """Whether a figure is this mean, or this mean rounded, as some official tools do."""
    return math.isclose(figure, mean, rel_tol=1e-9) or any(figure == round(mean, digits) for digits in range(1, 5))


def _reference(meta: Mapping[str, Any]) -> str:
    value = next((meta[name] for name in _REFERENCES if name in meta), "")
    if isinstance(value, Sequence) and not isinstance(value, str):
        distinct = list(dict.fromkeys(_text(item) for item in value))
        return ", ".join(distinct)
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("answer", value))
    return str(value)


def _file_facts(root: Path, name: str, expected: str | None) -> dict[str, Any]:
    path = root / name
    facts: dict[str, Any] = {"path": name}
    if path.is_file() and path.stat().st_size <= _MANY_BYTES:
        with path.open("rb") as file:
            facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        if expected is not None:
            facts["as_published"] = facts["sha256"] == expected.removeprefix("sha256:")
    return facts
