"""ScienceQA, test: choices by letter, read as LLaVA's eval_science_qa; breakdown as the data set's own tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import DataError, name_nearest
from llava.eval.matching import benchmark_folder, check_rows, first_there, in_question_order, match_by_words
from llava.eval.metrics.science_qa import FAILED, breakdown, combine, index_of, read_letter, read_letter_strictly
from llava.eval.published import published
from llava.eval.question_files import LETTER
from llava.eval.reading import check_keys, read_json, row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

ROWS = 4241
GPT4_FILE = "gpt4_result.json"
_QUESTIONS = "ScienceQA's questions from LLaVA's eval.zip, a list of id, conversations"
_PROBLEMS = "ScienceQA's problems, an object by number"


class ScienceQA:
    """Questions of LLaVA's file, answers and groups of ScienceQA's own."""

    name: ClassVar[str] = "scienceqa"

    def describe(self) -> TaskFacts:
        own = "https://github.com/lupantech/ScienceQA (data/scienceqa)"
        return TaskFacts(
            title="ScienceQA",
            files=(
                TaskFile("scienceqa/llava_test_CQM-A.json", "questions", "eval.zip of LLaVA", rows=ROWS),
                TaskFile("scienceqa/problems.json", "answers, choices, subjects", own, rows=21208),
                TaskFile("scienceqa/pid_splits.json", "numbers by split", own),
                TaskFile("scienceqa/images/test/", "pictures", own),
                TaskFile(
                    f"scienceqa/{GPT4_FILE}", "GPT-4's answers (`outputs`), for the combination", "may be missing"
                ),
            ),
            prompt=f"Context: {{hint}}\n{{question}}\nA. {{choice}}\n{LETTER}",
            decoding={"temperature": 0.0, "max_new_tokens": 1024},
            published_metric="IMG accuracy",
            published=published(self.name),
            traps=(
                "'A.' alone and 'The answer is A' at the end name nothing; two such sentences name nothing either.",
                "A picture's question is one whose stored prompt holds <image>, not one that has a picture.",
                "A letter beyond the choices is wrong today; a guess was drawn when LLaVA v0's results were made.",
                "lmms-eval scores the pictures' questions only, by its own prompt.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        split = split or "test"
        folder = benchmark_folder(root, "scienceqa", "ScienceQA")
        splits = read_json(folder / "pid_splits.json", what="ScienceQA's numbers by split")
        if split not in splits:
            raise DataError(f"scienceqa: no split {split!r}; {name_nearest(split, splits)}")
        problems = read_json(folder / "problems.json", what=_PROBLEMS)
        path = folder / f"llava_{split}_CQM-A.json"
        rows = read_json(path, what=_QUESTIONS)
        if split == "test":
            check_rows(len(rows), ROWS, path=path)
        gpt4 = _gpt4(folder / GPT4_FILE)
        found = []
        for number, row in enumerate(rows):
            check_keys(row, ("id", "conversations"), origin=f"{path}: row {number}", what=_QUESTIONS)
            key = str(row["id"])
            origin = f"{folder / 'problems.json'}: problem {key}"
            check_keys(problems.get(key), ("choices", "answer"), origin=origin, what=_PROBLEMS)
            text = row["conversations"][0]["value"].replace("<image>", "").strip()
            meta = {
                "problem": problems[key],
                "answers": ["ABCDE"[problems[key]["answer"]]],
                "split": split,
                **({"gpt4": gpt4[key]} if key in gpt4 else {}),
            }
            image = (first_there(folder / "images" / split, folder / split) / row["image"],) if "image" in row else ()
            found.append(Question(key, f"{text}\n{LETTER}", image, meta, 1024))
        if differing := {question.id for question in found} ^ set(map(str, splits[split])):
            raise DataError(
                f"{path}: {len(differing):,} problems differ from pid_splits.json, such as {min(differing)}"
            )
        return found

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        """strict: letters in brackets, with a dot or at the end of a sentence are read; pictures are those shown."""
        pairs = in_question_order(match_by_words(questions, answers, task=self.name), questions)
        read = read_letter_strictly if strict else read_letter
        letters = {question.id: read(answer.text) for question, answer in pairs}
        results = {q.id: index_of(letters[q.id], len(q.meta["problem"]["choices"])) for q, _ in pairs}
        correct = {q.id: float(results[q.id] == q.meta["problem"]["answer"]) for q, _ in pairs}
        marked = {question.id for question, answer in pairs if "<image>" in str(answer.meta.get("prompt", ""))}
        shown = {question.id for question, _ in pairs if question.images}
        pictured = shown if strict or not marked else marked
        accuracy = 100 * sum(correct.values()) / len(correct)
        headline = {"accuracy": accuracy}
        printed = f"Total: {len(correct)}, Correct: {sum(correct.values()):.0f}, Accuracy: {accuracy:.2f}%"
        if pictured:
            headline["IMG accuracy"] = 100 * sum(correct[key] for key in pictured) / len(pictured)
            printed += f", IMG-Accuracy: {headline['IMG accuracy']:.2f}%"
        other = sum(read_letter(answer.text) != read_letter_strictly(answer.text) for _, answer in pairs)
        notes = [
            *(row_notes(len(pairs), ROWS) if questions[0].meta["split"] == "test" else ()),
            f"{sum(letter == FAILED for letter in letters.values()):,} answers name no choice by the rule; "
            f"{other:,} name one in a form that the official rule does not read",
            f"{sum(letters[key] != FAILED and at < 0 for key, at in results.items()):,} name one beyond the choices",
        ]
        if marked and marked != shown:
            notes.append(f"{len(marked ^ shown):,} prompts have an <image> without a picture, or none with one")
        tables: dict[str, list[dict[str, Any]]] = {}
        if all("subject" in question.meta["problem"] for question, _ in pairs):
            tables["breakdown"] = breakdown([q.meta["problem"] for q, _ in pairs], [results[q.id] for q, _ in pairs])
        if helped := {q.id: q.meta["gpt4"] for q, _ in pairs if "gpt4" in q.meta}:
            both = combine({q.id: q.meta["problem"] for q, _ in pairs}, {q.id: a.text for q, a in pairs}, helped)
            headline["with GPT-4"] = 100 * both.correct / both.total
            headline["with GPT-4, upper bound"] = 100 * both.upper / both.total
            printed += f"\n{both.printed}"
            notes.append(f"{both.unlucky:,} problems with GPT-4 are wrong here, and drawn by chance by the original")
        return Score(headline, tables, notes, printed, correct)

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        return None


def _gpt4(path: Path) -> Mapping[str, str]:
    if not path.exists():
        return {}
    value = read_json(path, what="GPT-4's answers")
    check_keys(value, ("outputs",), origin=str(path), what="an object with `outputs`, texts by problem")
    outputs: Mapping[str, str] = value["outputs"]
    return outputs
