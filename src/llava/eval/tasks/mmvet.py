"""MM-Vet: open answers that a judge grades from 0 to 1, averaged over the capabilities that each question needs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.errors import DataError
from llava.eval.judge import JudgeRequest, replies_of
from llava.eval.matching import check_rows
from llava.eval.reading import check_keys, match_answers, read_json, row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

_ROWS = 218
_MOST_REPLIES = 6
GRADES = "grades"
# The head of MM-Vet's own prompt and its table of examples (Apache-2.0): grades compare only under the same words.
_ICELAND = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and"
    " Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland"
    " is mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of these"
    " countries do not accurately represent their landscapes. | The meme "
)
_HEAD = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in"
    " the ground truth means it is totally right only when all elements in the ground truth are present in the"
    " prediction, and <OR> means it is totally right when any one element in the ground truth is present in the"
    " prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0"
    " (totally right). Just complete the last space of the correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
    + "".join(
        f"What is x in the equation? | -1 <AND> -5 | {prediction} | {grade}\n"
        for prediction, grade in (
            ("x = 3", "0.0"),
            ("x = -1", "0.5"),
            ("x = -5", "0.5"),
            ("x = -5 or 5", "0.5"),
            ("x = -1 or x = -5", "1.0"),
        )
    )
    + _ICELAND
    + "talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very icy and"
    " Greenland isn't very green. | 0.4\n"
    + _ICELAND
    + "is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, despite its name,"
    " has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I have trust"
    " issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The humor in"
    " this meme is derived from the unexpected contrast between the names of the countries and their actual physical"
    " characteristics. | 1.0\n"
)
_AGAIN = "\nPredict the correctness of the answer (digit): "


class MMVet:
    """Questions v1_0 to v1_217; an answer's id may also be the number alone, as in LLaVA's own files."""

    name = "mmvet"

    def describe(self) -> TaskFacts:
        source = "https://github.com/yuweihao/MM-Vet (mm-vet.zip)"
        return TaskFacts(
            title="MM-Vet",
            files=[
                TaskFile("mm-vet/mm-vet.json", "questions, answers and capabilities", source, rows=_ROWS),
                TaskFile("mm-vet/images", "pictures", source),
            ],
            prompt="{question}",
            decoding={"temperature": 0.0, "max_new_tokens": 1024},
            published_metric="total",
            published={
                "llava-1.5-7b": 31.1,
                "llava-1.5-13b": 36.1,
                "llava-1.5-7b-lora": 30.2,
                "llava-1.5-13b-lora": 38.3,
            }
            | {"llava-1.6-vicuna-7b": 43.9, "llava-1.6-vicuna-13b": 48.4, "llava-1.6-mistral-7b": 47.3}
            | {"llava-1.6-34b": 57.4},
            needs=("judge",),
            traps=(
                "The judge was gpt-4-0613 with three tokens; its grades vary by some tenths of a point between runs.",
                "A reply that is no number is asked again up to five times, warmer each time; the last is not read.",
                "A question counts under every capability that it needs; the sets of capabilities have a table too.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        if split is not None:
            raise DataError(f"{self.name}: no split {split!r}; there is only one")
        root = root / "mm-vet"
        path, what = root / "mm-vet.json", "MM-Vet's questions: imagename, question, answer, capability by id"
        content = read_json(path, what=what)
        check_keys(content, (), origin=str(path), what=what)
        questions = []
        for key, row in content.items():
            check_keys(row, ("imagename", "question", "answer", "capability"), origin=f"{path}: {key}", what=what)
            meta = {"answer": row["answer"], "capability": tuple(row["capability"])}
            questions.append(Question(key, row["question"], (root / "images" / row["imagename"],), meta, 1024))
        if not questions:
            raise DataError(f"{path}: no questions; fetch it again")
        check_rows(len(questions), _ROWS, path=path)
        return questions

    def judge_requests(self, questions: Sequence[Question], answers: Sequence[AnswerRow]) -> list[JudgeRequest]:
        return [
            JudgeRequest(answer.question_id, _payload(_row(question, answer)))
            for question, answer in self._match(questions, answers)
        ]

    def ask_again(self, request: JudgeRequest, replies: Sequence[str]) -> JudgeRequest | None:
        if len(replies) >= _MOST_REPLIES or read_grade(replies[-1]) is not None:
            return None
        content = request.payload["messages"][0]["content"] + _AGAIN
        return JudgeRequest(request.question_id, _payload(content, temperature=0.5 * (len(replies) - 1)))

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        pairs = self._match(questions, answers)
        grades = np.array([_grades(answer, strict=strict) for _, answer in pairs])  # (questions, runs)
        totals = grades.mean(axis=0) * 100
        capabilities = Counter(name for question, _ in pairs for name in set(question.meta["capability"]))
        rows = [
            _row_of(name, [name in question.meta["capability"] for question, _ in pairs], grades)
            for name, _ in capabilities.most_common()
        ]
        sets = Counter("+".join(sorted(set(question.meta["capability"]))) for question, _ in pairs)
        set_rows = [
            _row_of(name, ["+".join(sorted(set(q.meta["capability"]))) == name for q, _ in pairs], grades)
            for name, _ in sets.most_common()
        ]
        spread, runs = np.round(totals.std(), 1), [float(value) for value in np.round(totals, 1)]
        names = [*(str(row["name"]) for row in rows), "total", "std", "runs"]
        values = [*(np.round(row["score"], 1) for row in rows), np.round(totals.mean(), 1), spread]
        unread = sum(_is_unread(answer) for _, answer in pairs)
        return Score(
            headline={"total": float(totals.mean()), "std": float(totals.std())},
            tables={"capabilities": rows, "capability sets": set_rows},
            notes=[
                f"{unread:,} answers whose judge gave no number count 0",
                f"{len(runs)} runs of the judge",
                *row_notes(len(pairs), _ROWS),
            ],
            printed=",".join(names) + "\n" + ",".join([*(str(float(value)) for value in values), f'"{runs}"']),
            correct={
                question.id: float(grade) for (question, _), grade in zip(pairs, grades.mean(axis=1), strict=True)
            },
        )

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        """The file that MM-Vet's online evaluator takes: texts by id."""
        path = path.with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = {question.id: answer.text for question, answer in self._match(questions, answers)}
        path.write_text(json.dumps(texts, indent=2), encoding="utf-8")
        return path

    def _match(self, questions: Sequence[Question], answers: Sequence[AnswerRow]) -> list[tuple[Question, AnswerRow]]:
        """In the questions' order; an answer keeps the id that it came with, so that replies find it."""
        own = {_with_prefix(answer.question_id): answer.question_id for answer in answers}
        prefixed = [AnswerRow(_with_prefix(answer.question_id), answer.text, answer.meta) for answer in answers]
        return [
            (question, AnswerRow(own[question.id], answer.text, answer.meta))
            for question, answer in match_answers(questions, prefixed, task=self.name)
        ]


def with_grades(answers: Sequence[AnswerRow], path: Path) -> list[AnswerRow]:
    """Answers with the grades of the official tool's file (`*-grade-Nruns.json`), which another run paid for."""
    content = read_json(path, what="MM-Vet's file of grades: score by id")
    found = {}
    for answer in answers:
        row = content.get(_with_prefix(answer.question_id))
        if row is None or not row.get("score"):
            raise DataError(f"{path}: no grade of question {answer.question_id}")
        found[answer.question_id] = tuple(row["score"])
    if len({len(grades) for grades in found.values()}) > 1:
        raise DataError(f"{path}: some questions have grades of fewer runs than others; let the official tool finish")
    return [AnswerRow(a.question_id, a.text, {**a.meta, GRADES: found[a.question_id]}) for a in answers]


def read_grade(reply: str) -> float | None:
    """What stands before the first space, if it is a number from 0 to 1."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None


def _grades(answer: AnswerRow, *, strict: bool) -> tuple[float, ...]:
    if GRADES in answer.meta:
        return tuple(answer.meta[GRADES])
    replies = replies_of(answer, task=MMVet.name)
    if len(replies) >= _MOST_REPLIES and not strict:
        return (0.0,)
    return (read_grade(replies[-1]) or 0.0,)


def _is_unread(answer: AnswerRow) -> bool:
    if GRADES in answer.meta:
        return False
    replies = replies_of(answer, task=MMVet.name)
    return len(replies) >= _MOST_REPLIES or read_grade(replies[-1]) is None


def _row(question: Question, answer: AnswerRow) -> str:
    truth = question.meta["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{_HEAD}\n" + " | ".join([question.prompt, truth, answer.text, ""])


def _payload(content: str, *, temperature: float = 0.0) -> Mapping[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": "gpt-4-0613", "max_tokens": 3, "temperature": temperature, "messages": messages}


def _row_of(name: str, chosen: Sequence[bool], grades: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "questions": sum(chosen),
        "score": float((grades[np.array(chosen)].mean(axis=0) * 100).mean()),
    }


def _with_prefix(key: str) -> str:
    return f"v1_{key}" if key.isdigit() else key
