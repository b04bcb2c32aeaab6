"""ScienceQA: letters read as the original reads them, groups as the data set's own tool makes them, GPT-4's help."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.eval.answers import read_answers
from llava.eval.metrics.science_qa import breakdown, combine, index_of, read_letter, read_letter_strictly
from llava.eval.task import AnswerRow, Question
from llava.eval.tasks.scienceqa import ScienceQA

GOLDEN = Path(__file__).parents[2] / "golden"
LETTER = "Answer with the option's letter from the given choices directly."


def write_folder(root: Path) -> Path:
    """Five problems, of which 1 and 4 have pictures; the files as the original's converter wrote them."""
    (root / "scienceqa").mkdir()
    for name in ("problems.json", "pid_splits.json", "llava_test_CQM-A.json"):
        shutil.copy(GOLDEN / "scienceqa" / name, root / "scienceqa" / name)
    return root


def recorded() -> list[AnswerRow]:
    """The recorded run's four answers, and what the original takes for the fifth, which it has not."""
    return [
        *read_answers(GOLDEN / "eval" / "scienceqa_answers.jsonl"),
        AnswerRow("5", "FAILED", {"prompt": "Unknown"}),
    ]


def problem(answer: int, **more: Any) -> dict[str, Any]:
    return {"choices": ["a", "b", "c"], "answer": answer, **more}


def test_questions_are_asked_with_the_letter_line_and_without_the_mark_of_the_picture(tmp_path: Path) -> None:
    questions = ScienceQA().read(write_folder(tmp_path), split=None)
    assert questions[0].prompt == (
        f"Context: Look at it.\nQuestion: Which is red?\nOptions: (A) bowl (B) sky\n{LETTER}"
    )
    assert questions[0].images == (tmp_path / "scienceqa/images/test/1/image.png",)
    assert questions[1].images == ()
    assert questions[0].max_new_tokens == 1024


def test_the_recorded_run_prints_what_the_original_printed(tmp_path: Path) -> None:
    questions = ScienceQA().read(write_folder(tmp_path), split=None)
    score = ScienceQA().score(questions, recorded())
    assert score.printed == "Total: 5, Correct: 3, Accuracy: 60.00%, IMG-Accuracy: 50.00%"
    assert score.correct == {"1": 1.0, "2": 1.0, "3": 1.0, "4": 0.0, "5": 0.0}
    assert "2 answers name no choice" in score.notes[1]


def test_a_missing_answer_is_an_error_and_not_a_wrong_one(tmp_path: Path) -> None:
    questions = ScienceQA().read(write_folder(tmp_path), split=None)
    with pytest.raises(DataError, match="1 of 5 questions have no answer, such as 5"):
        ScienceQA().score(questions, recorded()[:4])


def test_prompts_without_the_mark_count_pictures_by_what_was_shown(tmp_path: Path) -> None:
    questions = ScienceQA().read(write_folder(tmp_path), split=None)
    answers = [AnswerRow(row.question_id, row.text) for row in recorded()]
    assert ScienceQA().score(questions, answers).headline["IMG accuracy"] == 50.0


def test_a_mark_without_a_picture_is_said_and_strictly_ignored(tmp_path: Path) -> None:
    questions = ScienceQA().read(write_folder(tmp_path), split=None)
    answers = [AnswerRow(row.question_id, row.text, {"prompt": "<image>"}) for row in recorded()]
    official = ScienceQA().score(questions, answers)
    assert official.headline["IMG accuracy"] == 60.0
    assert official.notes[-1].startswith("3 prompts have an <image> without a picture")
    assert ScienceQA().score(questions, answers, strict=True).headline["IMG accuracy"] == 50.0


@pytest.mark.parametrize(
    "case",
    json.loads((GOLDEN / "eval" / "scienceqa_readings.json").read_text()),
    ids=lambda case: f"{case['raw']!r} of {case['num_choices']}",
)
def test_a_letter_is_read_as_the_original_reads_it(case: dict[str, Any]) -> None:
    letter = read_letter(case["raw"])
    assert (letter, index_of(letter, case["num_choices"])) == (case["parsed_letter"], case["pred_index"])


@pytest.mark.parametrize(
    ("text", "letter"),
    [("A.", "A"), ("(B)", "B"), (" c", "C"), ("B) x", "B"), ("The answer is D", "D"), ("So the answer is A.", "A"),
     ("Answer: A", "A"), ("F", "FAILED"), ("", "FAILED"), ("a dog", "FAILED"), ("Because.", "FAILED"),
     ("The answer is C. The answer is C.", "C"), ("The answer is A. The answer is B.", "FAILED")],
)  # fmt: skip
def test_strictly_a_letter_is_read_in_any_usual_form(text: str, letter: str) -> None:
    assert read_letter_strictly(text) == letter


def test_the_breakdown_has_a_row_for_every_group_and_minus_one_for_an_empty_one() -> None:
    problems = [
        problem(0, subject="natural science", hint="h", image=None, grade="grade6", topic="physics"),
        problem(1, subject="natural science", hint="", image="i.png", grade="grade7", topic="physics"),
        problem(2, subject="social science", hint="", image=None, grade="grade12", topic="civics"),
    ]
    rows = {row["group"]: row for row in breakdown(problems, [0, 0, 2])}
    printed = {group: row["printed"] for group, row in rows.items()}
    assert list(printed)[:9] == ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Average"]
    assert list(printed.values())[:9] == [
        "50.00",
        "100.00",
        "-1",
        "100.00",
        "0.00",
        "100.00",
        "100.00",
        "50.00",
        "66.67",
    ]
    assert (printed["physics"], printed["civics"], printed["verbs"]) == ("50.00", "100.00", "-1")
    assert len(rows) == 9 + 26 and rows["Average"]["accuracy"] == pytest.approx(200 / 3, abs=1e-9)


def test_gpt4s_answer_counts_and_ours_where_it_names_none() -> None:
    problems = {key: problem(0) for key in "12345"}
    ours = dict.fromkeys("123", "The answer is A.") | {"4": "The answer is B.", "5": "A"}
    gpt4 = {"1": "The answer is B.", "2": "no idea", "3": "The answer is A.", "4": "The answer is A.", "5": "?"}
    found = combine(problems, ours, gpt4)
    assert (found.total, found.correct, found.upper, found.gpt4_failed, found.unlucky) == (5, 3, 4, 2, 1)
    assert found.printed.splitlines() == [
        "Total: 5, Correct: 3, Accuracy: 60.00%",
        "Total: 5, Correct (upper): 4, Accuracy: 80.00%",
        "Total: 5, GPT-4 NO-ANS (RANDOM): 2, Percentage: 40.00%",
    ]


def test_gpt4s_file_beside_the_data_adds_the_combination(tmp_path: Path) -> None:
    write_folder(tmp_path)
    outputs = {"1": "The answer is A.", "2": "The answer is B.", "3": "?"}
    (tmp_path / "scienceqa/gpt4_result.json").write_text(json.dumps({"outputs": outputs}))
    score = ScienceQA().score(ScienceQA().read(tmp_path, split=None), recorded())
    assert score.headline["with GPT-4"] == 100.0
    assert score.printed.splitlines()[1] == "Total: 3, Correct: 3, Accuracy: 100.00%"


def test_a_cut_question_file_is_refused_by_the_split(tmp_path: Path) -> None:
    path = write_folder(tmp_path) / "scienceqa/llava_test_CQM-A.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:4]))
    with pytest.raises(DataError, match=r"1 problems differ from pid_splits\.json, such as 5"):
        ScienceQA().read(tmp_path, split=None)


def test_a_problem_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write_folder(tmp_path) / "scienceqa/problems.json"
    path.write_text(json.dumps({key: row for key, row in json.loads(path.read_text()).items() if key != "3"}))
    with pytest.raises(DataError, match="problem 3"):
        ScienceQA().read(tmp_path, split=None)


def test_a_problem_of_the_breakdown_stands_in_the_report() -> None:
    questions = [Question("1", "q", (), {"problem": problem(0, subject="x"), "split": "test"}, 8)]
    score = ScienceQA().score(questions, [AnswerRow("1", "A")])
    assert score.tables["breakdown"][8] == {"group": "Average", "accuracy": 100.0, "rows": 1, "printed": "100.00"}
