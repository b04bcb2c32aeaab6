"""MMBench and CCBench: tables read, options asked in every order, letters found, the upload's cells."""

from __future__ import annotations

import base64
from pathlib import Path

import openpyxl
import pytest

from llava.errors import DataError
from llava.eval.metrics.choices import find_option, find_option_anywhere, first_capitals
from llava.eval.task import AnswerRow
from llava.eval.tasks.mmbench import CCBENCH, MMBENCH, MMBENCH_CN

PICTURE = base64.b64encode(b"\x89PNG a made-up picture, long enough not to be a number").decode()
HEADER = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
HEADER += ["comment", "split"]
ROWS = [
    ["0", 'Which "one"?', "Look.", "cat", "dog", "", "", "A", "animals", PICTURE, "s", "coarse_perception", "c", "dev"],
    ["1", "How many?", "nan", "2", "3", "None", "5", "B", "counts", PICTURE, "s", "logic_reasoning", "c", "dev"],
    ["1000000", "Which?", "", "dog", "cat", "", "", "B", "animals", "0", "s", "coarse_perception", "c", "dev"],
    ["1000001", "How many?", "", "3", "2", "", "", "A", "counts", "0", "s", "logic_reasoning", "c", "dev"],
]
OPTIONS = {"A": "dog", "B": "cat", "C": "bird", "D": "a very long fish name"}


def _folder(
    root: Path, *, name: str = "mmbench_dev_20230712.tsv", header: list[str] = HEADER, of: str = "mmbench"
) -> Path:
    places = [HEADER.index(column) for column in header]
    quoted = [[f'"{cell.replace(chr(34), 2 * chr(34))}"' if '"' in cell else cell for cell in row] for row in ROWS]
    lines = [header, *([row[place] for place in places] for row in quoted)]
    (root / of).mkdir(exist_ok=True)
    (root / of / name).write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    return root


def test_hint_question_and_options_up_to_the_first_empty_one_are_asked(tmp_path: Path) -> None:
    questions = MMBENCH.read(_folder(tmp_path), split=None)
    suffix = "Answer with the option's letter from the given choices directly."
    assert questions[0].prompt == f'Look.\nWhich "one"?\nA. cat\nB. dog\n{suffix}'
    assert questions[1].prompt == f"How many?\nA. 2\nB. 3\n{suffix}"  # "None" ends the options, as it does for pandas
    assert [question.id for question in questions] == ["0", "1", "1000000", "1000001"]
    assert questions[0].max_new_tokens == 1024


def test_equal_pictures_and_references_to_them_are_one_file(tmp_path: Path) -> None:
    questions = MMBENCH.read(_folder(tmp_path), split="dev")
    assert len({question.images for question in questions}) == 1
    assert questions[0].images[0].read_bytes() == base64.b64decode(PICTURE)
    stamp = questions[0].images[0].stat().st_mtime_ns
    assert MMBENCH.read(tmp_path, split="dev")[0].images[0].stat().st_mtime_ns == stamp


def test_the_chinese_tables_ask_in_chinese(tmp_path: Path) -> None:
    _folder(tmp_path, name="mmbench_dev_cn_20231003.tsv", of="mmbench_cn")
    assert MMBENCH_CN.read(tmp_path, split=None)[0].prompt.endswith("B. dog\n请直接回答选项字母。")
    _folder(tmp_path, name="CCBench.tsv", of="ccbench")
    assert CCBENCH.read(tmp_path, split=None)[0].prompt.endswith("\n请直接回答选项字母。")


def test_a_question_counts_only_when_every_order_is_right(tmp_path: Path) -> None:
    questions = MMBENCH.read(_folder(tmp_path), split="dev")
    answers = [
        AnswerRow("0", "A. cat"),
        AnswerRow("1000000", "The answer is B"),
        AnswerRow("1", "B"),
        AnswerRow("1000001", "B"),
    ]
    score = MMBENCH.score(questions, answers)
    # XTuner's first capital of "The answer is B" is B, and of "A. cat" A: no difference here
    assert score.headline == {"overall": 50.0, "overall (XTuner)": 50.0, "vanilla": 100.0, "vanilla, all orders": 75.0}
    assert score.tables["l2-category"] == [
        {"name": "coarse_perception", "questions": 1, "right": 1, "accuracy": 1.0},
        {"name": "logic_reasoning", "questions": 1, "right": 0, "accuracy": 0.0},
    ]
    assert score.printed.splitlines()[:2] == ["Overall: 0.5000", "CP: 1.0000"]
    assert score.correct["1000001"] == 0.0


@pytest.mark.parametrize(
    ("answer", "matched", "capitals"),
    [
        ("A", "A", "A"),
        ("(B)", "B", "B"),
        ("Answer: D", "D", "A"),
        ("a", None, ""),
        ("It is a cat", "B", ""),
        ("A cat and a dog", None, "A"),
        ("AB", None, "AB"),
        ("B or C", None, "B"),
        ("", None, ""),
        ("A is the answer because of many reasons that are long", None, "A"),
        ("**D**", "D", "D"),
        ("答案是A", None, "A"),
        ("Cannot determine the answer", "Z", "C"),
        ("The correct answer is **B**. Here is why it is so: A is wrong", "B", "B"),
        ("E", None, ""),
    ],
)
def test_letters_are_found_as_vlmevalkit_and_xtuner_find_them(answer: str, matched: str | None, capitals: str) -> None:
    assert find_option(answer, OPTIONS) == matched
    assert first_capitals(answer) == capitals


def test_strict_sees_a_letter_beside_chinese_words(tmp_path: Path) -> None:
    assert find_option_anywhere("答案是A。", OPTIONS) == "A"
    assert find_option_anywhere("A or B", OPTIONS) is None
    questions = MMBENCH.read(_folder(tmp_path), split="dev")
    answers = [AnswerRow(question.id, f"选{question.meta['answer']}") for question in questions]
    assert MMBENCH.score(questions, answers).headline["overall"] == 0.0
    assert MMBENCH.score(questions, answers, strict=True).headline["overall"] == 100.0


def test_the_upload_is_the_table_with_predictions_in_the_seventh_column(tmp_path: Path) -> None:
    questions = MMBENCH.read(_folder(tmp_path), split="dev")
    answers = [
        AnswerRow(question.id, text) for question, text in zip(questions, ["A", "=1+1", "b\x07", ""], strict=True)
    ]
    path = MMBENCH.write_upload(questions, answers, tmp_path / "up/exp")
    assert path == tmp_path / "up/exp.xlsx"
    header, *rows = openpyxl.load_workbook(path).active.iter_rows(values_only=True)
    assert header == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[0] == (0, 'Which "one"?', "cat", "dog", None, None, "A", "A", "dev")
    assert [row[6] for row in rows] == ["A", "=1+1", "b", None]
    assert openpyxl.load_workbook(path).active.cell(3, 7).data_type == "s"


def test_a_table_without_answers_is_for_upload_only(tmp_path: Path) -> None:
    header = ["index", "question", "A", "B", "C", "D", "image"]
    questions = MMBENCH.read(_folder(tmp_path, name="mmbench_test_20230712.tsv", header=header), split="test")
    answers = [AnswerRow(question.id, "A") for question in questions]
    with pytest.raises(DataError, match="holds no answers; write the upload file"):
        MMBENCH.score(questions, answers)
    path = MMBENCH.write_upload(questions, answers, tmp_path / "up.xlsx")
    assert path is not None
    first = next(iter(openpyxl.load_workbook(path).active.iter_rows(values_only=True)))
    assert first == ("index", "question", "A", "B", "C", "D", "prediction")


def test_missing_cut_and_foreign_tables_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of mmbench_dev_20230712\.tsv"):
        MMBENCH.read(tmp_path, split="dev")
    path = _folder(tmp_path) / "mmbench/mmbench_dev_20230712.tsv"
    whole = path.read_text()
    path.write_text(whole[: whole.rindex(PICTURE[:4]) + 20])
    with pytest.raises(DataError, match="it was cut, fetch it again"):
        MMBENCH.read(tmp_path, split="dev")
    path.write_text("index\tquestion\n0\twhat\n")
    with pytest.raises(DataError, match="no column A, B, image"):
        MMBENCH.read(tmp_path, split="dev")
    path.write_text(whole.replace("\t0\ts\t", "\t99\ts\t"))
    with pytest.raises(DataError, match="should be that of row 99"):
        MMBENCH.read(tmp_path, split="dev")
