"""One benchmark from its files to its figures: read, ask, score, write the upload, keep what made the figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.errors import DataError, LlavaError
from llava.eval.answers import AnswerLog, write_answers
from llava.eval.judge import Judge, JudgedTask, ReplyStore, judge_answers
from llava.eval.result import ANSWERS, Result, make_result, make_rows, save_result
from llava.eval.runner import Answerer, Shard, ask_all, check_pictures
from llava.eval.task import AnswerRow, Question, Score, Task

_WHOLE = Shard()


@dataclass(frozen=True)
class Asking:
    """How a benchmark is to be run.

    limit: only the first so many questions, for a try. greedy: the likeliest word where the task is published with
    beams. strict: the repaired rule. skip_errors: leave out what cannot be asked, and say so in the notes.
    """

    split: str | None = None
    shard: Shard = _WHOLE
    limit: int | None = None
    greedy: bool = False
    strict: bool = False
    force: bool = False
    skip_errors: bool = False


@dataclass(frozen=True)
class Judging:
    """Who grades where a task needs a judge: nobody (stored replies only) or an endpoint. say: hears the cost."""

    judge_by: Judge | None = None
    say: Callable[[str], None] = lambda line: None

    def judge(
        self, task: JudgedTask, questions: Sequence[Question], answers: Sequence[AnswerRow], folder: Path
    ) -> list[AnswerRow]:
        """Answers with their judge's replies, which are kept in FOLDER/judge.jsonl."""
        store = ReplyStore(folder / "judge.jsonl")
        return judge_answers(task, questions, answers, store=store, judge=self.judge_by, say=self.say)


class Progress:
    """Hears how far a benchmark is."""

    def begin(self, task: str, total: int, done: int) -> None:
        """A benchmark of `total` questions begins, of which `done` are answered."""

    def answered(self, error: LlavaError | None) -> None:
        """One more question is answered, or could not be."""

    def end(self) -> None:
        """All that can be answered is answered."""


def read_questions(task: Task, root: Path, asking: Asking) -> list[Question]:
    """What is to be asked; also looks whether the pictures are there. Raises DataError."""
    questions = task.read(root, split=asking.split)[: asking.limit]
    check_pictures(questions)
    return questions


def run_task(
    task: Task,
    answerer: Answerer,
    *,
    root: Path,
    out: Path,
    asking: Asking,
    questions: Sequence[Question] | None = None,
    judging: Judging | None = None,
    progress: Progress | None = None,
) -> Result | None:
    """Run a benchmark into OUT/<task>; None for a shard, whose answers wait for the others'.

    questions: what `read_questions` gave, where it has been called already. Raises DataError for wrong files,
    UsageError where the folder holds another run, or a judge's replies are wanting and `judging` has no judge.
    """
    facts = task.describe()
    questions = read_questions(task, root, asking) if questions is None else questions
    decoding = dict(facts.decoding)
    if asking.greedy:
        decoding = {"temperature": 0.0, "max_new_tokens": decoding.get("max_new_tokens")}
    told = {name: value for name, value in decoding.items() if name != "max_new_tokens"}
    folder = out / task.name
    described = answerer.describe()
    metadata = {
        name: described[name] for name in ("weights", "template", "dtype", "endpoint") if described.get(name)
    } | told
    mine = asking.shard.of(questions)
    heard = progress or Progress()
    began = time.monotonic()
    run = {"model_id": answerer.model_id, "metadata": metadata}
    with AnswerLog(folder / asking.shard.file_name, mine, run=run, force=asking.force) as log:
        if asking.shard.count == 1:
            for shard in sorted(folder.glob("answers-of-*.jsonl")):
                log.take_over(shard)
        heard.begin(task.name, len(mine), len(log.done))
        answered_before = len(log.done)
        answers = ask_all(
            answerer,
            mine,
            told,
            log,
            on_answer=lambda question, error: heard.answered(error),
            skip_errors=asking.skip_errors,
        )
        heard.end()
    seconds = time.monotonic() - began
    if asking.shard.count > 1:
        return None
    notes: list[str] = []
    made_by = {
        **described,
        "decoding": decoding,
        "split": asking.split,
        "limit": asking.limit,
        "seconds": round(seconds, 1),
        "answered_in_this_run": len(answers) - answered_before,
    }
    answered = questions
    if len(answers) < len(questions):  # skip_errors: anything else has raised
        answered = [question for question in questions if question.id in log.done]
        left_out = f"{len(questions) - len(answers):,} questions could not be asked and are left out"
        made_by["left_out"] = len(questions) - len(answers)
        notes = [f"{left_out} (--skip-errors): the figures do not compare"]
    if isinstance(task, JudgedTask):
        answers = (judging or Judging()).judge(task, answered, answers, folder)
    return score_answers(
        task, answered, answers, root=root, folder=folder, strict=asking.strict, made_by=made_by, notes=notes
    )


def score_answers(
    task: Task,
    questions: Sequence[Question],
    answers: Sequence[AnswerRow],
    *,
    root: Path,
    folder: Path | None,
    strict: bool = False,
    made_by: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """Score answers, and keep result, rows and upload in `folder` where one is given."""
    if not questions:
        raise DataError(f"{task.name}: no questions; is the folder the benchmark's?")
    score: Score = task.score(questions, answers, strict=strict)
    score = replace(score, notes=[*notes, *score.notes])
    result = make_result(task, task.describe(), questions, score, root=root, strict=strict, made_by=made_by or {})
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ANSWERS).exists():
            write_answers(folder / ANSWERS, (_as_record(answer) for answer in answers))
        save_result(folder, result, make_rows(questions, answers, score))
        (folder / "upload").mkdir(exist_ok=True)
        if task.write_upload(questions, answers, folder / "upload" / f"{task.name}.json") is None:
            _remove_if_empty(folder / "upload")
    return result


def _as_record(answer: AnswerRow) -> dict[str, Any]:
    return {"question_id": answer.question_id, "text": answer.text, **answer.meta}


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
