"""TextVQA: annotations met by picture and words, scored by m4c's soft accuracy."""

import json
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.eval.task import AnswerRow
from llava.eval.tasks.textvqa import TextVQA, question_in

SUFFIX = "\nAnswer the question using a single word or phrase."
# The first two are recorded from the original: "stop" eight times of ten, and a number that is not written as one.
ANNOTATIONS = [
    {"image_id": "a1", "question": "What does it say?", "answers": ["stop"] * 8 + ["exit"] * 2},
    {"image_id": "a2", "question": "What Number?", "answers": ["12"] * 10},
    {"image_id": "a2", "question": "Whose car?", "answers": ["Ann's"] * 3 + ["ann"] * 7},
]
PROMPTS = [
    "What does it say?\nReference OCR token: STOP" + SUFFIX,
    "what number?" + SUFFIX,
    "Whose car?\nReference OCR token: " + SUFFIX,
]


def write_folder(root: Path, *, annotations: object = None) -> Path:
    folder = root / "textvqa"
    folder.mkdir()
    rows = [
        {"question_id": note["image_id"], "image": f"{note['image_id']}.jpg", "text": prompt, "category": "default"}
        for note, prompt in zip(ANNOTATIONS, PROMPTS, strict=True)
    ]
    (folder / "llava_textvqa_val_v051_ocr.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": annotations or ANNOTATIONS}))
    return root


def answer(place: int, text: str) -> AnswerRow:
    return AnswerRow(str(ANNOTATIONS[place]["image_id"]), text, {"prompt": PROMPTS[place]})


def test_questions_keep_the_blank_of_an_empty_ocr_line_and_get_ids_of_their_own(tmp_path: Path) -> None:
    questions = TextVQA().read(write_folder(tmp_path), split=None)
    assert [question.id for question in questions] == ["a1", "a2", "a2#2"]
    assert questions[2].prompt == "Whose car?\nReference OCR token: " + SUFFIX
    assert questions[1].meta["answers"] == ["12"] * 10
    assert questions[0].images == (tmp_path / "textvqa/train_images/a1.jpg",)


def test_the_recorded_case_scores_half(tmp_path: Path) -> None:
    questions = TextVQA().read(write_folder(tmp_path), split=None)[:2]
    score = TextVQA().score(questions, [answer(0, "Stop"), answer(1, "twelve")])
    assert score.printed == "Samples: 2\nAccuracy: 50.00%\n"
    assert score.headline == {"accuracy": 50.0}


def test_answers_in_any_order_meet_the_question_with_their_words(tmp_path: Path) -> None:
    questions = TextVQA().read(write_folder(tmp_path), split=None)
    score = TextVQA().score(questions, [answer(2, "Ann's"), answer(1, "12."), answer(0, "The exit")])
    assert score.correct == pytest.approx({"a1": 0.6, "a2": 1.0, "a2#2": 0.9}, abs=1e-12)
    assert score.headline["accuracy"] == pytest.approx(100 * 2.5 / 3, abs=1e-9)


def test_an_answer_beyond_the_dot_limit_is_counted_and_strictly_repaired(tmp_path: Path) -> None:
    questions = TextVQA().read(write_folder(tmp_path), split=None)[1:2]
    answers = [answer(1, "12" + "." * 40)]
    official = TextVQA().score(questions, answers)
    assert official.headline["accuracy"] == 0.0
    assert official.notes[-1].startswith("1 answers have more dots")
    assert TextVQA().score(questions, answers, strict=True).headline["accuracy"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        (PROMPTS[0], "What does it say?"),
        (PROMPTS[1], "what number?"),
        ("Reference OCR token: A, B\nWhat?" + SUFFIX, "What?"),
        ("OCR tokens: A, B. Question: What is it? Short answer:", "What is it?"),
    ],
)
def test_the_question_is_found_in_every_form_of_prompt(prompt: str, question: str) -> None:
    assert question_in(prompt) == question


@pytest.mark.parametrize("prompt", ["What?", "a\nb\nc", "Reference OCR token: A\nWhat?"])
def test_another_form_of_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(DataError, match="no question in the prompt"):
        question_in(prompt)


def test_a_question_without_annotation_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path, annotations=ANNOTATIONS[:2])
    with pytest.raises(
        DataError, match=r"llava_textvqa_val_v051_ocr.jsonl:3: no annotation for \('a2', 'whose car\?'\)"
    ):
        TextVQA().read(tmp_path, split=None)


def test_nine_human_answers_are_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path, annotations=[{**ANNOTATIONS[0], "answers": ["stop"] * 9}])
    with pytest.raises(DataError, match="row 0: 9 answers; the rule is made for ten"):
        TextVQA().read(tmp_path, split=None)


def test_a_missing_answer_is_an_error_where_the_original_leaves_it_out_of_the_mean(tmp_path: Path) -> None:
    questions = TextVQA().read(write_folder(tmp_path), split=None)
    with pytest.raises(DataError, match="1 of 3 questions have no answer, such as a2#2"):
        TextVQA().score(questions, [answer(0, "stop"), answer(1, "12")])
