"""MME: two yes-or-no questions a picture, fourteen tasks; accuracy and accuracy of both, as its calculation.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from llava.errors import DataError
from llava.eval.matching import benchmark_folder, first_there, in_question_order, match_by_words
from llava.eval.metrics.mme import by_picture, figures_of, is_right
from llava.eval.metrics.yes_no import read_mme, read_strictly
from llava.eval.published import published
from llava.eval.question_files import GREEDY_128, SHORT_ANSWER, read_original_questions
from llava.eval.reading import read_text, row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

ROWS = 2374
GROUPS = {
    "Perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork",
                   "OCR"),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
_ASK = " Please answer yes or no."
_RELEASE = "MME_Benchmark_release_version"


class MME:
    """LLaVA's questions and the release's answers."""

    name: ClassVar[str] = "mme"

    def describe(self) -> TaskFacts:
        source = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
        return TaskFacts(
            title="MME",
            files=(
                TaskFile("MME/llava_mme.jsonl", "questions", "eval.zip of LLaVA", rows=ROWS),
                TaskFile(f"MME/{_RELEASE}/", "pictures, and questions with answers (TASK/*.txt)", source),
            ),
            prompt=f"{{question}}\n{SHORT_ANSWER}",
            decoding=GREEDY_128,
            published_metric="perception",
            published=published(self.name),
            traps=(
                "Two questions share an id; consecutive lines are taken for one picture, whatever is in them.",
                "Only the first four characters count, so 'not' and 'know' are no and 'the answer is yes' is neither.",
                "A task's score is accuracy plus the share of pictures with both right, at most 200.",
                "lmms-eval drops full stops and takes y and n: other figures.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        """split: one of the fourteen tasks, None for all."""
        known = [name for names in GROUPS.values() for name in names]
        if split is not None and split not in known:
            raise DataError(f"mme: no split {split!r}; there are {', '.join(known)}")
        folder = benchmark_folder(root, "MME", "mme")
        release = first_there(folder / _RELEASE, folder / _RELEASE / _RELEASE)
        path = folder / "llava_mme.jsonl"
        truths: dict[str, dict[tuple[str, str], str]] = {}
        found = []
        for question in read_original_questions(
            path, images=release, what="MME's questions from LLaVA's eval.zip", published=ROWS
        ):
            category, _, rest = str(question.meta["question_id"]).partition("/")
            if category not in known:
                raise DataError(f"{path}: {question.id}: task {category!r} is none of MME's")
            if split not in (None, category):
                continue
            stem = rest.rpartition("/")[2].split(".")[0]
            if category not in truths:
                truths[category] = _truths(release / category)
            asked = _asked(question.prompt)
            keys = ((stem, asked + _ASK), (stem, f"{asked} {_ASK}"))  # some of the release have two blanks
            label = next((truths[category][key] for key in keys if key in truths[category]), None)
            if label not in ("yes", "no"):
                raise DataError(
                    f"{release / category}/{stem}.txt: no yes or no to {asked!r}; download the release again"
                )
            image = first_there(question.images[0], release / category / "images" / Path(rest).name)
            meta = {**question.meta, "category": category, "picture": stem, "answers": [label]}
            found.append(replace(question, images=(image,), meta=meta))
        return found

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        """strict: a picture's answers belong together wherever they stand, and yes or no is found in any place."""
        told = match_by_words(questions, answers, task=self.name)
        pairs = in_question_order(told, questions) if strict else told
        correct: dict[str, float] = {}
        tables, totals, printed = [], {}, []
        apart = alone = 0
        for group, names in GROUPS.items():
            rows = []
            for name in names:
                asked = [pair for pair in pairs if pair[0].meta["category"] == name]
                if not asked:
                    continue
                twos = by_picture(asked) if strict else [asked[at : at + 2] for at in range(0, len(asked), 2)]
                alone += sum(len(two) == 1 for two in twos)
                twos = [two for two in twos if len(two) == 2]
                apart += sum(two[0][0].meta["picture"] != two[1][0].meta["picture"] for two in twos)
                hits = {question.id: is_right(question, answer, strict=strict) for question, answer in asked}
                correct |= {key: float(hit) for key, hit in hits.items()}
                rows.append({"group": group, "task": name, **figures_of(asked, twos, hits, strict=strict)})
            if rows:
                totals[group.lower()] = sum(row["score"] for row in rows)
                printed.append(f"=========== {group} ===========\ntotal score: {totals[group.lower()]} \n")
                printed += [*(f"\t {row['task']}  score: {row['score']}" for row in rows), "\n"]
                tables += rows
        if not tables:
            raise DataError("mme: no question of a task of MME's; is the folder MME's?")
        breaks = sum(any(mark in answer.text for mark in "\t\n") for _, answer in pairs)
        late = sum(read_mme(answer.text) == "other" != (read_strictly(answer.text) or "other") for _, answer in pairs)
        notes = [
            *row_notes(len(pairs), ROWS),
            f"{apart:,} pairs of lines hold answers on two pictures; the official rule goes by position",
            *([f"{alone:,} answers are without a second one, so not in accuracy+"] if alone else ()),
            f"{late:,} answers are neither yes nor no in their first four characters, but say something",
            f"{breaks:,} answers have a tab or line end, on which the official tool stops; a blank is read instead",
        ]
        return Score(totals, {"tasks": tables}, notes, "\n".join(printed), correct)

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        return None


def _asked(prompt: str) -> str:
    """The question as the release has it, without what is asked of the answer."""
    return prompt.replace(SHORT_ANSWER, "").strip().removesuffix(_ASK.strip()).strip()


def _truths(folder: Path) -> dict[tuple[str, str], str]:
    """yes or no by (file without its ending, question), of a task's text files in either layout of the release."""
    files = sorted((first_there(folder / "questions_answers_YN", folder)).glob("*.txt"))
    if not files:
        raise DataError(f"{folder}: no *.txt with questions and answers; download {_RELEASE}")
    truths = {}
    for path in files:
        for number, line in enumerate(read_text(path, what="MME's questions and answers").splitlines(), start=1):
            question, tab, answer = line.strip().partition("\t")
            if line.strip() and not tab:
                raise DataError(f"{path}:{number}: no tab between question and answer")
            truths[path.stem.split(".")[0], question] = answer.strip().lower()
    return truths
