"""A benchmark asked of `llava serve` over a real socket gives the answers of the same model here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.cli.main import main
from llava.eval.answers import AnswerLog
from llava.eval.runner import LocalModel, ask_all
from llava.inference.talk import Model
from tests.eval.made_up import TARGET, MadeUp, write_benchmark
from tests.eval.models import draw_pictures
from tests.serve.servers import load_tiny, running


def test_a_server_gives_the_models_own_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_tiny(tmp_path / "model")
    data = write_benchmark(tmp_path / "data", draw_pictures(tmp_path, 3))
    questions = MadeUp().read(data, split=None)
    local = LocalModel(Model(loaded.model, loaded.processor, loaded.report, loaded.opened))
    with AnswerLog(tmp_path / "local.jsonl", questions, run={}) as log:
        expected = [row.text for row in ask_all(local, questions, {"temperature": 0.0}, log)]
    monkeypatch.setenv("OPENAI_API_KEY", "a-test-key")
    out = tmp_path / "out"
    with running(loaded, key="a-test-key") as server:
        command = ["eval", "--endpoint", f"{server.url}/v1", "--tasks", TARGET, "--data", str(data)]
        assert main([*command, "--out", str(out), "--concurrency", "3"]) == 0
    answers = [json.loads(line) for line in (out / "made_up/answers.jsonl").read_text().splitlines()]
    assert [answer["text"] for answer in answers] == expected
    assert all(expected)
    provenance = json.loads((out / "report.json").read_text())["tasks"]["made_up"]["provenance"]
    assert provenance["endpoint"] == f"{server.url}/v1"
    assert "a-test-key" not in "".join(path.read_text() for path in out.rglob("*.json*"))


def test_nobody_at_the_address_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_benchmark(tmp_path / "data", draw_pictures(tmp_path, 1))
    where = [
        "--endpoint",
        "http://127.0.0.1:9/v1",
        "--tasks",
        TARGET,
        "--data",
        str(data),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(["eval", *where]) == 2
    assert "is the server running?" in capsys.readouterr().err
