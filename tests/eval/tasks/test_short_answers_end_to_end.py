"""VQAv2, VizWiz, GQA, TextVQA, POPE, MME and ScienceQA from their files to a report's figures, by a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.eval.answers import read_answers
from llava.eval.matching import match_by_words
from llava.eval.published import published
from llava.eval.result import load_rows
from llava.eval.run import Asking, run_task, score_answers
from llava.eval.runner import LocalModel
from llava.eval.tasks import open_task
from tests.eval.models import draw_pictures, speaking_model
from tests.eval.tasks import test_gqa, test_mme, test_pope, test_scienceqa, test_textvqa, test_vqav2_and_vizwiz

CASES: list[tuple[str, Callable[[Path], Path], str | None, int]] = [
    ("vqav2", test_vqav2_and_vizwiz.write_val, "val", 3),
    ("vqav2", test_vqav2_and_vizwiz.write_test, None, 2),
    ("vizwiz", test_vqav2_and_vizwiz.write_vizwiz, None, 5),
    ("gqa", test_gqa.write_folder, None, 4),
    ("textvqa", test_textvqa.write_folder, None, 3),
    ("pope", test_pope.write_folder, None, 5),
    ("mme", test_mme.write_folder, None, 6),
    ("scienceqa", test_scienceqa.write_folder, None, 5),
]
SERVED = [("vqav2", None), ("vizwiz", None)]  # their answers are not public


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return LocalModel(speaking_model(tmp_path_factory.mktemp("model")), name="tiny")


@pytest.mark.parametrize(("name", "write", "split", "rows"), CASES, ids=lambda value: str(value)[:12])
def test_a_tiny_model_is_measured_from_the_real_files(
    tmp_path: Path, answerer: LocalModel, name: str, write: Callable[[Path], Path], split: str | None, rows: int
) -> None:
    root, task = write(tmp_path), open_task(name)
    questions = task.read(root, split=split)
    picture = draw_pictures(tmp_path, 1)[0]
    for path in {path for question in questions for path in question.images}:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.read_bytes())
    out = tmp_path / "out"
    result = run_task(task, answerer, root=root, out=out, asking=Asking(split=split))
    assert result is not None
    assert result.provenance["rows"] == rows
    assert all(0 <= figure <= 800 for figure in result.headline.values())
    assert len(load_rows(out / name)) == rows
    # what was written is answers in the original's format: scored again, it gives the same figures
    answers = read_answers(out / name / "answers.jsonl")
    assert [question.id for question, _ in match_by_words(questions, answers, task=name)] == [q.id for q in questions]
    again = score_answers(task, questions, answers, root=root, folder=None)
    assert again.headline == result.headline
    upload = out / name / "upload" / f"{name}.json"
    assert upload.exists() == (name in ("vizwiz", "gqa") or (name == "vqav2" and split is None))


@pytest.mark.parametrize(("name", "write", "split"), [case[:3] for case in CASES if case[:3:2] not in SERVED])
def test_the_commonest_of_a_questions_answers_is_right(
    tmp_path: Path, name: str, write: Callable[[Path], Path], split: str | None
) -> None:
    task = open_task(name)
    questions = task.read(write(tmp_path), split=split)
    lines = []
    for question in questions:
        truths = question.meta["answers"]
        row = {"question_id": question.meta.get("question_id", question.id), "prompt": question.prompt}
        lines.append(json.dumps(row | {"text": max(truths, key=truths.count)}))
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(lines))
    score = task.score(questions, read_answers(path))
    assert score.correct == pytest.approx(dict.fromkeys((q.id for q in questions), 1.0))


def test_published_figures_stand_beside_a_figure_of_the_same_name() -> None:
    assert published("pope")["LLaVA-1.5-7B"] == 85.9
    assert published("mmmu")["LLaVA-1.6-Hermes-Yi-34B"] == 51.1
    assert len(published("mmmu")) == 4 and len(published("mme")) == 8
    assert published("refcoco") == {}
    for name in {case[0] for case in CASES}:
        facts = open_task(name).describe()
        assert facts.published["LLaVA-1.5-13B"] == published(name)["LLaVA-1.5-13B"]
        assert facts.decoding["temperature"] == 0.0 and facts.files and facts.traps
