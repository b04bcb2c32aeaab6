"""`llava data`: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest
from PIL import Image

from llava.cli.main import main


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_data(folder: Path, *answers: str) -> Path:
    Image.new("RGB", (80, 60), (200, 0, 0)).save(folder / "a.png")
    records = [
        {
            "id": str(number),
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": answer}],
        }
        for number, answer in enumerate(answers)
    ]
    path = folder / "mix.json"
    path.write_text(json.dumps(records))
    return path


def test_check_says_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(write_data(tmp_path, "Red.")), "--images", str(tmp_path)]) == 0
    assert "no problems" in capsys.readouterr().out


def test_check_exits_with_2_and_says_what_a_run_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(write_data(tmp_path, "", "", "Red."))]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "mix.json:1 (record 0): turn 2: an answer is empty" in printed
    assert "samples without loss in the place of 2 of 3 conversations (66.67%)" in printed
    assert "so it would stop" in printed
    assert json.loads((tmp_path / "data-check" / "check.json").read_text())["findings"][0]["kind"] == "empty answer"


def test_check_with_a_model_counts_tokens_and_what_sharing_saves(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path, "Red.", "It is red.", "Crimson.")
    assert main(["data", "check", str(data), "--model", str(model), "--out", "seen"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    written = json.loads((tmp_path / "seen" / "check.json").read_text())
    sharing = written["sharing"]
    assert (sharing["pictures_alone"], sharing["pictures_shared"]) == (3, 1)
    assert f"{sharing['tokens_alone']:,} tokens alone, {sharing['tokens_shared']:,} shared" in printed
    assert sharing["tokens_alone"] == written["tokens"]["all"] > sharing["tokens_shared"]
