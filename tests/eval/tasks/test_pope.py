"""POPE: questions met with labels, answers read and counted as LLaVA's eval_pope does."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.errors import DataError
from llava.eval.metrics.yes_no import binary_figures, read_mme, read_pope, read_strictly
from llava.eval.task import AnswerRow, Question
from llava.eval.tasks.pope import POPE

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"
RECORDED = json.loads((GOLDEN / "pope.json").read_text())
SUFFIX = "\nAnswer the question using a single word or phrase."


def write_folder(root: Path, *, categories: dict[str, list[str]] | None = None) -> Path:
    """A POPE folder in the files' real format; categories: labels by category, a question each."""
    categories = categories or {"adversarial": ["yes", "no"], "random": ["no", "yes", "no"]}
    (root / "pope" / "coco").mkdir(parents=True)
    questions = []
    for start, (category, labels) in enumerate(categories.items()):
        rows = []
        for number, label in enumerate(labels, start=1):
            row = {"image": f"COCO_val2014_{number:012}.jpg", "text": f"Is there a thing {number} in the image?"}
            rows.append({"question_id": number, **row, "label": label})
            asked = {"image": row["image"], "text": row["text"] + SUFFIX, "category": category}
            questions.append({"question_id": start * 10_000_000 + number, **asked})
        write_lines(root / "pope" / "coco" / f"coco_pope_{category}.json", rows)
    write_lines(root / "pope" / "llava_pope_test.jsonl", questions)
    return root


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def said(questions: list[Question], *texts: str) -> list[AnswerRow]:
    return [AnswerRow(question.id, text) for question, text in zip(questions, texts, strict=True)]


def test_questions_carry_their_labels_and_pictures(tmp_path: Path) -> None:
    questions = POPE().read(write_folder(tmp_path), split=None)
    assert [question.id for question in questions] == ["1", "2", "10000001", "10000002", "10000003"]
    assert [question.meta["label"] for question in questions] == ["yes", "no", "no", "yes", "no"]
    assert questions[0].prompt == "Is there a thing 1 in the image?" + SUFFIX
    assert questions[0].images == (tmp_path / "pope/val2014/COCO_val2014_000000000001.jpg",)
    assert questions[0].max_new_tokens == 128


def test_the_figure_is_the_mean_of_the_categories_f1(tmp_path: Path) -> None:
    questions = POPE().read(write_folder(tmp_path), split=None)
    score = POPE().score(questions, said(questions, "Yes", "Yes", "No", "Yes", "No"))
    assert score.headline["F1"] == pytest.approx(100 * (2 / 3 + 1.0) / 2, abs=1e-9)
    adversarial = score.tables["categories"][0]
    assert [adversarial[name] for name in ("TP", "FP", "TN", "FN")] == [1, 1, 0, 0]
    assert score.correct == {"1": 1.0, "2": 0.0, "10000001": 1.0, "10000002": 1.0, "10000003": 1.0}
    assert "5 questions; the published split has 5,910" in score.notes[0]


def test_a_recorded_run_prints_what_the_original_printed(tmp_path: Path) -> None:
    questions = POPE().read(write_folder(tmp_path, categories={"popular": RECORDED["labels"]}), split="popular")
    score = POPE().score(questions, said(questions, *RECORDED["answers"]))
    assert RECORDED["stdout"].strip() in score.printed
    assert score.printed.startswith("Category: popular, # samples: 13\n")


@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "pope_readings.json").read_text()), ids=lambda case: repr(case["raw"])
)
def test_an_answer_is_read_as_the_original_reads_it(case: dict[str, str]) -> None:
    assert read_pope(case["raw"]) == case["parsed"]


@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "mme_readings.json").read_text()), ids=lambda case: repr(case["raw"])
)
def test_mme_reads_an_answer_by_its_first_four_characters(case: dict[str, str]) -> None:
    assert read_mme(case["raw"]) == case["parsed"]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("NO", "no"), ("No!", "no"), ("None", "no"), ("No\nthere", "no"), (". no", "no"), ("There isn't", "no"),
        ("Yes, a snow plough.", "yes"), ("yes. no", "yes"), ("I know", "yes"), ("", ""), ("...", ""),
    ],
)  # fmt: skip
def test_strictly_an_answer_is_read_as_it_is_meant(text: str, meant: str) -> None:
    assert read_strictly(text) == meant


def test_an_answer_in_another_place_gets_anothers_label_unless_strict(tmp_path: Path) -> None:
    questions = POPE().read(write_folder(tmp_path, categories={"random": ["yes", "no", "no"]}), split=None)
    right = said(questions, "Yes", "No", "No")
    moved = [right[1], right[0], right[2]]
    official = POPE().score(questions, moved)
    assert official.tables["categories"][0]["accuracy"] == pytest.approx(1 / 3)
    assert any(note.startswith("2 answers are not in the questions' order") for note in official.notes)
    assert POPE().score(questions, moved, strict=True).headline["F1"] == 100.0


def test_strictly_an_empty_answer_is_wrong_both_ways(tmp_path: Path) -> None:
    questions = POPE().read(write_folder(tmp_path, categories={"random": ["yes", "no"]}), split=None)
    answers = said(questions, "", "")
    assert POPE().score(questions, answers).tables["categories"][0]["accuracy"] == 0.5
    assert POPE().score(questions, answers, strict=True).tables["categories"][0]["accuracy"] == 0.0
    assert any(note.startswith("2 answers are read otherwise") for note in POPE().score(questions, answers).notes)


def test_labels_of_another_revision_are_refused_with_the_address_of_the_right_one(tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / "pope/coco/coco_pope_random.json"
    path.write_text(path.read_text() + '{"question_id": 4, "label": "no"}\n')
    with pytest.raises(DataError, match=r"4 labels for 3 questions.*e3e39262"):
        POPE().read(tmp_path, split=None)


def test_labels_of_other_questions_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / "pope/coco/coco_pope_random.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[1], lines[0], lines[2]]))
    with pytest.raises(DataError, match=r"coco_pope_random.json:1: image .*but the question has"):
        POPE().read(tmp_path, split=None)


@pytest.mark.parametrize("kept", [4, 6])
def test_missing_and_double_answers_are_errors(tmp_path: Path, kept: int) -> None:
    questions = POPE().read(write_folder(tmp_path), split=None)
    answers = (said(questions, *["yes"] * 5) * 2)[:kept]
    with pytest.raises(DataError, match="pope: "):
        POPE().score(questions, answers)


def test_ratios_of_nothing_are_zero_where_the_original_stops() -> None:
    figures, _ = binary_figures(["no", "no"], ["yes", "no"])
    assert (figures["precision"], figures["recall"], figures["F1"]) == (0.0, 0.0, 0.0)


@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no"])), min_size=1))
def test_counts_and_ratios_are_those_of_a_table_made_by_hand(pairs: list[tuple[str, str]]) -> None:
    figures, hits = binary_figures([found for found, _ in pairs], [label for _, label in pairs])
    table = Counter(pairs)
    assert (figures["TP"], figures["FP"]) == (table["yes", "yes"], table["yes", "no"])
    assert (figures["TN"], figures["FN"]) == (table["no", "no"], table["no", "yes"])
    assert figures["accuracy"] == sum(hits) / len(pairs)
    if figures["TP"]:
        once, again = figures["FP"] / figures["TP"], figures["FN"] / figures["TP"]
        assert figures["F1"] == pytest.approx(2 / (2 + once + again), abs=1e-9)
    assert figures["yes ratio"] == sum(found == "yes" for found, _ in pairs) / len(pairs)
