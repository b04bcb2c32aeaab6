"""HallusionBench: yes-or-no questions on original and altered figures, judged against an answer in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.judge import JudgeRequest, replies_of
from llava.eval.matching import check_rows
from llava.eval.reading import check_keys, match_answers, read_json, row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

_ROWS = 1129
_COLUMNS = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "question")
# The judge's words are those of HallusionBench's evaluation (BSD-3-Clause); verdicts compare only under the same.
_TASK = (
    "Imagine you are an intelligent teacher. Thoroughly read the question, reference answer and the prediction answer"
    " to ensure a clear understanding of the information provided. Assess the correctness of the predictions. If the"
    " prediction answer does not conflict with the reference answer, please generate “correct”. If the prediction"
    " answer conflict with the reference answer, please generate “incorrect”. If the prediction answer is unclear about"
    ' the answer, please generate "unclear". \n\n Question:'
)
WRONG, RIGHT, UNCLEAR = 0, 1, 2


class HallusionBench:
    """id: category_subcategory_set_figure_question. Categories: VD, the figure is needed; VS, it supplements."""

    name = "hallusionbench"

    def describe(self) -> TaskFacts:
        source = "https://github.com/tianyi-lab/HallusionBench"
        return TaskFacts(
            title="HallusionBench",
            files=[
                TaskFile("HallusionBench/HallusionBench.json", "questions", source, rows=_ROWS),
                TaskFile("HallusionBench/hallusion_bench", "pictures: category/subcategory/set_figure.png", source),
            ],
            prompt="{question}",
            decoding={"temperature": 0.0, "max_new_tokens": 1024},
            published_metric="aAcc",
            published={},
            needs=("judge",),
            traps=(
                "'incorrect' is looked for before 'correct'; a verdict with neither is unclear.",
                "Unclear is right where a VS question has no figure, and wrong elsewhere.",
                "178 questions have no picture; VLMEvalKit leaves them out, and compares Yes and No.",
                "Easy means figure 0, hard any other; a figure 0 of VS is none and does not count among figures.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        if split is not None:
            raise DataError(f"{self.name}: no split {split!r}; there is only one")
        root = root / "HallusionBench"
        path, what = root / "HallusionBench.json", "HallusionBench's list of questions"
        questions = []
        for index, row in enumerate(read_json(path, what=what)):
            check_keys(row, (*_COLUMNS, "gt_answer_details"), origin=f"{path}: row {index}", what=what)
            if row["category"] not in ("VD", "VS"):
                raise DataError(f"{path}: row {index}: category {row['category']!r}; it is VD or VS")
            meta = {name: str(row[name]) for name in (*_COLUMNS, "gt_answer_details")}
            images: tuple[Path, ...] = ()
            if int(row["visual_input"]) != 0:
                name = f"{row['set_id']}_{row['figure_id']}.png"
                images = (root / "hallusion_bench" / row["category"] / row["subcategory"] / name,)
            key = _key(meta, "set_id", "figure_id", "question_id")
            questions.append(Question(key, row["question"], images, meta, 1024))
        if not questions:
            raise DataError(f"{path}: no questions; fetch it again")
        check_rows(len(questions), _ROWS, path=path)
        return questions

    def judge_requests(self, questions: Sequence[Question], answers: Sequence[AnswerRow]) -> list[JudgeRequest]:
        requests = []
        for question, answer in match_answers(questions, answers, task=self.name):
            content = (
                f"{_TASK}{question.meta['question']}\nReference answer: {question.meta['gt_answer_details']}"
                f"\nPrediction answer:{answer.text}\nOutput:"
            )
            payload = {"model": "gpt-4", "messages": [{"role": "user", "content": content}]}
            requests.append(JudgeRequest(question.id, payload))
        return requests

    def ask_again(self, request: JudgeRequest, replies: Sequence[str]) -> JudgeRequest | None:
        return None

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        """The figures of the leaderboard. strict changes nothing: the rule has no known bug."""
        pairs = match_answers(questions, answers, task=self.name)
        verdicts = {q.id: read_verdict(replies_of(answer, task=self.name)[-1]) for q, answer in pairs}
        right = {question.id: _is_right(question, verdicts[question.id]) for question, _ in pairs}
        rows = [_row(name, _of(questions, category), right) for name, category in _PARTS.items()]
        overall = rows[-1]
        diagnosis = [
            {"name": name, **_diagnose(_of(questions, category), verdicts)} for name, category in _PARTS.items()
        ]
        unclear = sum(verdict == UNCLEAR for verdict in verdicts.values())
        named = ("qAcc", "fAcc", "easy aAcc", "hard aAcc", "aAcc")
        return Score(
            headline={name: overall[name] for name in named if overall[name] is not None},
            tables={"accuracy": rows, "diagnosis of wrong answers": diagnosis},
            notes=[f"{unclear:,} verdicts are unclear", *row_notes(len(pairs), _ROWS)],
            printed="\n".join(
                f"{title}: {'-' if overall[name] is None else round(overall[name], 4)}"
                for title, name in zip(_TITLES, named, strict=True)
            ),
            correct={key: float(value) for key, value in right.items()},
        )

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        return None


_PARTS: dict[str, str | None] = {"VD": "VD", "VS": "VS", "Overall": None}
_TITLES = (
    "Acc per question pair",
    "Acc per figure",
    "Acc per easy question",
    "Acc per hard question",
    "Acc per question",
)


def read_verdict(reply: str) -> int:
    """WRONG for "incorrect" anywhere, else RIGHT for "correct", else UNCLEAR."""
    lowered = reply.lower()
    return WRONG if "incorrect" in lowered else RIGHT if "correct" in lowered else UNCLEAR


def _is_right(question: Question, verdict: int) -> bool:
    without_figure = question.meta["category"] == "VS" and question.meta["figure_id"] == "0"
    return verdict == RIGHT or (without_figure and verdict == UNCLEAR)


def _key(meta: Any, *columns: str) -> str:
    return "_".join(str(meta[column]) for column in ("category", "subcategory", *columns))


def _of(questions: Sequence[Question], category: str | None) -> list[Question]:
    return [question for question in questions if category in (None, question.meta["category"])]


def _row(name: str, questions: Sequence[Question], right: dict[str, bool]) -> dict[str, Any]:
    """Shares in percent; None where there is nothing to count."""
    figures = [q for q in questions if not (q.meta["category"] == "VS" and q.meta["figure_id"] == "0")]
    easy = [question for question in questions if question.meta["figure_id"] == "0"]
    hard = [question for question in questions if question.meta["figure_id"] != "0"]
    return {
        "name": name,
        "questions": len(questions),
        "qAcc": _share(questions, right, _pair),
        "fAcc": _share(figures, right, lambda question: _key(question.meta, "set_id", "figure_id")),
        "easy aAcc": _share(easy, right, _pair),
        "hard aAcc": _share(hard, right, _pair),
        "aAcc": _share(questions, right, lambda question: question.id),
    }


def _pair(question: Question) -> str:
    return _key(question.meta, "set_id", "question_id")


def _share(questions: Sequence[Question], right: dict[str, bool], key: Callable[[Question], str]) -> float | None:
    """Of the groups that `key` makes, those whose questions are all right."""
    groups: dict[str, bool] = {}
    for question in questions:
        groups[key(question)] = groups.get(key(question), True) and right[question.id]
    return 100 * sum(groups.values()) / len(groups) if groups else None


def _diagnose(questions: Sequence[Question], verdicts: dict[str, int]) -> dict[str, int]:
    """Wrong answers by what the official tool blames: language (LH), vision (VI), or either (Mix)."""
    counts = {"LH": 0, "VI": 0, "Mix": 0}
    for question in questions:
        verdict = verdicts[question.id]
        if verdict == RIGHT:
            continue
        if question.meta["category"] == "VD" and question.meta["figure_id"] == "0":
            counts["VI"] += 1
        elif question.meta["category"] == "VS" and question.meta["visual_input"] == "0":
            counts["LH"] += verdict == WRONG
        else:
            counts["Mix" if verdict == WRONG else "VI"] += 1
    return counts
