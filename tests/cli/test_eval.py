from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import llava
from llava.cli.main import main
from tests.eval.made_up import TARGET, MadeUp, write_benchmark
from tests.eval.models import draw_pictures

FIXED = ["--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_benchmark(tmp_path / "data", draw_pictures(tmp_path, 3))


def test_a_benchmark_runs_on_a_model_and_writes_its_report(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["eval", str(model), "--tasks", TARGET, "--data", str(data), "--out", str(out), *FIXED]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "made_up" in said
    assert f"report: {out / 'report.html'}" in said
    rows = [json.loads(line) for line in (out / "made_up/answers.jsonl").read_text().splitlines()]
    m = llava.load(model, dtype="float32", device="cpu")
    questions = MadeUp().read(data, split=None)
    assert [row["text"] for row in rows] == [m.chat(q.images[0], q.prompt, max_new_tokens=4) for q in questions]
    assert {row["model_id"] for row in rows} == {model.name}
    record = json.loads((out / "report.json").read_text())
    provenance = record["tasks"]["made_up"]["provenance"]
    assert provenance["weights"].startswith("sha256:")
    assert provenance["dtype"] == "float32"
    before = (out / "made_up/answers.jsonl").read_bytes()
    assert main(command) == 0
    assert "6 of 6 are answered already" in capsys.readouterr().err
    assert (out / "made_up/answers.jsonl").read_bytes() == before


def test_shards_are_merged_by_the_run_without_one(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(model), "--tasks", TARGET, "--data", str(data), *FIXED]
    for number in range(2):
        assert main([*command, "--out", str(tmp_path / "out"), "--shard", f"{number}/2"]) == 0
    assert not (tmp_path / "out/report.html").exists()
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "6 of 6 are answered already" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    texts = [(tmp_path / folder / "made_up/answers.jsonl").read_bytes() for folder in ("out", "whole")]
    assert texts[0] == texts[1]


def test_answers_of_any_system_are_scored_without_a_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = tmp_path / "a.jsonl"
    rows = [{"question_id": q.id, "text": "YES", "model_id": "theirs"} for q in MadeUp().read(data, split=None)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", "score", TARGET, "--answers", str(answers), "--data", str(data)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("Accuracy: 66.67\n")
    assert main([*command, "--strict"]) == 0
    assert capsys.readouterr().out == "Accuracy: 0.00\n"
    assert json.loads((tmp_path / "out/report.json").read_text())["model"] == "theirs"


def test_two_runs_are_compared(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, word in (("one", "yes"), ("two", "no")):
        answers = tmp_path / f"{name}.jsonl"
        rows = [{"question_id": q.id, "text": word} for q in MadeUp().read(data, split=None)]
        answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
        scored = ["--answers", str(answers), "--data", str(data), "--out", str(tmp_path / name)]
        assert main(["eval", "score", TARGET, *scored]) == 0
    capsys.readouterr()
    folders = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert main(["eval", "compare", *folders, "--out", str(tmp_path / "c")]) == 0
    said = capsys.readouterr().out
    assert "of 6 questions 6 answered differently, 2 better, 4 worse; not significant" in said
    assert (tmp_path / "c/comparison.html").exists()


def test_a_benchmark_is_described_before_it_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--describe", "pope"]) == 0
    said = capsys.readouterr().out
    for word in ("files", "rows", "prompt", "Answer the question using a single word or phrase.", "published", "traps"):
        assert word in said


def test_every_shipped_benchmark_is_listed_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    from llava.eval.tasks import TASKS

    assert main(["eval", "list"]) == 0
    said = capsys.readouterr().out
    for name in TASKS:
        assert name in said
        assert main(["eval", "--describe", name]) == 0
        assert capsys.readouterr().out.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "popee", "--data", "."], "no task 'popee'; did you mean 'pope'?"),
        (["--data", "."], "say which benchmarks with --tasks"),
        (["--tasks", "pope"], "say where the benchmarks are with --data"),
        (["--tasks", TARGET, "--data", "nowhere", "--out", "o"], "made_up.jsonl: not there"),
        (["--tasks", TARGET, "--data", "x", "--out", "o", "--shard", "2/2"], "--shard 2/2"),
        (["m", "--endpoint", "http://h/v1", "--tasks", TARGET, "--data", "x", "--out", "o"], "one of both"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_model_opens(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "run", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_judge_without_a_key_is_one_clear_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    where = ["--tasks", TARGET, "--data", str(data), "--out", str(tmp_path / "o"), "--judge", "openai"]
    assert main(["eval", "run", *where]) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_describing_needs_no_torch() -> None:
    code = (
        "import sys; from llava.cli.main import main; main(['eval', '--describe', 'pope']); "
        "main(['eval', 'list']); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
