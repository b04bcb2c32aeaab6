"""MME: pairs of yes and no, in both layouts of the release."""

import json
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.eval.task import AnswerRow, Question
from llava.eval.tasks.mme import MME

SUFFIX = "\nAnswer the question using a single word or phrase."


def write_folder(root: Path) -> Path:
    """Two pictures of `count`, files flat; one of `posters`, in folders, one question with two blanks before Please."""
    release = root / "MME" / "MME_Benchmark_release_version"
    flat, nested = release / "count", release / "posters"
    flat.mkdir(parents=True)
    (nested / "questions_answers_YN").mkdir(parents=True)
    (nested / "images").mkdir()
    (nested / "images" / "tt1.jpg").write_bytes(b"")
    for name in ("1", "2"):
        lines = [f"Is there {number} in {name}? Please answer yes or no.\t{label}" for number, label in
                 (("one", "Yes"), ("two", "No"))]  # fmt: skip
        (flat / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (nested / "questions_answers_YN" / "tt1.txt").write_text(
        "Is it A?  Please answer yes or no.\tYes\nIs it B? Please answer yes or no.\tNo\n"
    )
    rows = [("count/1.png", f"Is there {n} in 1?") for n in ("one", "two")]
    rows += [("count/2.png", f"Is there {n} in 2?") for n in ("one", "two")]
    rows += [("posters/tt1.jpg", f"Is it {n}?") for n in "AB"]
    lines = [
        json.dumps({"question_id": key, "image": key, "text": text + SUFFIX, "category": "x"}) for key, text in rows
    ]
    (root / "MME" / "llava_mme.jsonl").write_text("\n".join(lines))
    return root


def said(questions: list[Question], *texts: str) -> list[AnswerRow]:
    return [
        AnswerRow(str(question.meta["question_id"]), text, {"prompt": question.prompt})
        for question, text in zip(questions, texts, strict=True)
    ]


def test_the_releases_answers_are_found_in_both_layouts_and_with_two_blanks(tmp_path: Path) -> None:
    questions = MME().read(write_folder(tmp_path), split=None)
    assert [question.id for question in questions[:3]] == ["count/1.png", "count/1.png#2", "count/2.png"]
    assert [question.meta["answers"] for question in questions] == [["yes"], ["no"]] * 3
    release = tmp_path / "MME/MME_Benchmark_release_version"
    assert questions[0].images == (release / "count/1.png",)
    assert questions[4].images == (release / "posters/images/tt1.jpg",)


def test_a_task_scores_accuracy_and_the_share_of_pictures_with_both_right(tmp_path: Path) -> None:
    questions = MME().read(write_folder(tmp_path), split=None)
    score = MME().score(questions, said(questions, "Yes", "No", "yes, one", "the answer is no", "no", "no"))
    count, posters = score.tables["tasks"]
    assert count["score"] == pytest.approx(75 + 50) and count["other"] == 1
    assert posters["score"] == pytest.approx(50 + 0)
    assert score.headline == {"perception": pytest.approx(175.0)}
    assert score.correct["count/2.png#2"] == 0.0


def test_it_prints_as_the_official_tool_does(tmp_path: Path) -> None:
    questions = MME().read(write_folder(tmp_path), split="count")
    printed = MME().score(questions, said(questions, "yes", "no", "yes", "no")).printed
    assert printed == "=========== Perception ===========\ntotal score: 200.0 \n\n\t count  score: 200.0\n\n"


def test_lines_are_paired_as_they_come_unless_strict(tmp_path: Path) -> None:
    questions = MME().read(write_folder(tmp_path), split="count")
    answers = said(questions, "yes", "no", "no", "yes")  # the first picture right, the second wrong
    shuffled = [answers[0], answers[2], answers[1], answers[3]]
    official, strict = MME().score(questions, shuffled), MME().score(questions, shuffled, strict=True)
    assert official.tables["tasks"][0]["accuracy+"] == 0.0
    assert official.notes[1].startswith("2 pairs of lines hold answers on two pictures")
    assert strict.tables["tasks"][0]["accuracy+"] == 0.5


def test_strictly_yes_is_found_late_in_an_answer(tmp_path: Path) -> None:
    questions = MME().read(write_folder(tmp_path), split="posters")
    answers = said(questions, "The answer is yes.", "It is not")
    assert MME().score(questions, answers).headline["perception"] == 0.0
    assert MME().score(questions, answers, strict=True).headline["perception"] == 200.0
    assert any(note.startswith("2 answers are neither") for note in MME().score(questions, answers).notes)


def test_an_answer_with_a_tab_is_counted_not_lost(tmp_path: Path) -> None:
    questions = MME().read(write_folder(tmp_path), split="posters")
    score = MME().score(questions, said(questions, "Yes\tindeed", "no\nno"))
    assert score.headline["perception"] == 200.0
    assert score.notes[-1].startswith("2 answers have a tab")


def test_a_question_that_the_release_has_not_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "MME/MME_Benchmark_release_version/count/2.txt").unlink()
    with pytest.raises(DataError, match=r"2.txt: no yes or no to 'Is there one in 2\?'"):
        MME().read(tmp_path, split=None)


def test_the_same_answer_twice_is_an_error_and_so_is_a_missing_one(tmp_path: Path) -> None:
    questions = MME().read(write_folder(tmp_path), split="posters")
    answers = said(questions, "yes", "no")
    with pytest.raises(DataError, match=r"two answers to question posters/tt1\.jpg"):
        MME().score(questions, [answers[0], answers[0]])
    with pytest.raises(DataError, match="1 of 2 questions have no answer"):
        MME().score(questions, answers[:1])


@pytest.mark.parametrize("strict", [False, True])
def test_a_trial_with_an_odd_number_of_questions_says_so(tmp_path: Path, strict: bool) -> None:
    questions = MME().read(write_folder(tmp_path), split="count")[:3]
    score = MME().score(questions, said(questions, "yes", "no", "no"), strict=strict)
    assert score.tables["tasks"][0]["score"] == pytest.approx(100 * 2 / 3 + 100)
    assert any(note.startswith("1 answers are without a second") for note in score.notes)
