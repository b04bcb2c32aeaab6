from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

import llava
from llava.cli.main import main

FIXED = ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", "6"]
COLOURS = ("red", "green", "blue", "white")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(COLOURS):
        PIL.Image.new("RGB", (60, 40 + 9 * number), colour).save(folder / f"{number}.png")
    return folder


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_is_captioned_as_python_does(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["caption", str(pictures), "--model", str(model), "--out", str(out), *FIXED]) == 0
    assert f"llava caption: 4 of 4 answered in {out}" in capsys.readouterr().err
    expected = llava.load(model, dtype="float32", device="cpu").caption(pictures, max_new_tokens=6)
    assert [record["text"] for record in records(out)] == expected
    assert [Path(record["image"]).name for record in records(out)] == [f"{number}.png" for number in range(4)]


def test_without_a_file_the_answers_are_printed(
    model: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", str(pictures / "0.png"), "--model", str(model), "--beams", "2", *FIXED]) == 0
    assert capsys.readouterr().out.startswith(f"{pictures / '0.png'}: ")


def test_a_broken_picture_is_one_line_with_an_error_and_a_count(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "1.png").write_bytes(b"broken")
    out, shown = tmp_path / "out.jsonl", tmp_path / "shown"
    arguments = ["caption", str(pictures), "--model", str(model), "--out", str(out), "--show-dir", str(shown), *FIXED]
    assert main(arguments) == 0
    assert "3 of 4 answered" in (said := capsys.readouterr().err)
    assert "1 failed" in said
    assert ["error" in record for record in records(out)] == [False, True, False, False]
    assert records(out)[1]["text"] == ""
    assert sorted(path.name for path in shown.iterdir()) == [f"{n + 1}-{n}.png" for n in range(4)]


def test_questions_are_answered_under_their_ids(model: Path, pictures: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    asked = [{"question_id": 10 + n, "image": f"{n}.png", "text": f"Question {n}?"} for n in (2, 0, 2)]
    asked.append({"question_id": 13, "image": "3.png", "text": "long " * 600})
    file.write_text("".join(json.dumps(one) + "\n" for one in asked))
    options = ["--images", str(pictures), "--model", str(model), "--out", str(out), *FIXED]
    assert main(["vqa", str(file), *options]) == 0
    m = llava.load(model, dtype="float32", device="cpu")
    for one, record in zip(asked[:3], records(out), strict=False):
        expected = m.chat(pictures / str(one["image"]), str(one["text"]), max_new_tokens=6)
        assert (record["question_id"], record["prompt"], record["text"]) == (one["question_id"], one["text"], expected)
    assert "context" in records(out)[3]["error"]


def test_a_finished_file_is_left_as_it_is_and_another_run_is_refused(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    run = ["vqa", str(pictures), "-q", "What?", "--model", str(model), "--out", str(out), *FIXED]
    assert main(run) == 0
    before = out.read_bytes()
    assert main(run) == 0
    assert "4 of 4 are in" in capsys.readouterr().err
    for change in (["--beams", "2"], ["-q", "Why?"], ["--template", "vicuna_v1"], ["--max-new-tokens", "5"]):
        assert main([*run, *change]) == 2
        said = capsys.readouterr().err
        assert "--force" in said
        assert said.count("\n") == 1
        assert out.read_bytes() == before
    assert main([*run, "--max-new-tokens", "5", "--force"]) == 0
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["caption", "gone.png"], "gone.png: no such file"),
        (["vqa", "PICTURES"], "nothing is asked"),
        (["vqa", "gone.jsonl"], "gone.jsonl"),
        (["caption", "https://pictures.example/a.png"], "--allow-urls"),
        (["caption", "PICTURES", "--load-in", "3bit"], "4bit or 8bit"),
        (["caption", "PICTURES", "--temperature", "-1"], "temperature"),
        (["caption", "PICTURES", "--beams", "0"], "beams"),
        (["caption", "PICTURES", "--out", "PICTURES"], "a folder"),
    ],
)
def test_a_wrong_call_is_one_line(
    arguments: list[str], says: str, model: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(pictures) if word == "PICTURES" else word for word in arguments]
    assert main([*arguments, "--model", str(model), *FIXED]) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.out == ""
    assert shown.err.count("\n") == 1


KILLED = """
import sys
from llava.inference.answers_file import AnswersFile
from llava.cli.main import main
import os, signal
write = AnswersFile.write
def stopping(self, number, text, error=None):
    write(self, number, text, error)
    if self.done == 2:
        self._file.write(b'{"image": "pict'); self._file.flush()
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
AnswersFile.write = stopping
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_run_that_was_ended_goes_on_to_the_same_file(
    how: str, model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run = ["caption", str(pictures), "--model", str(model), *FIXED]
    assert main([*run, "--out", str(whole)]) == 0
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, how, *run, "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == (130 if how == "SIGINT" else -signal.SIGKILL), ended.stderr
    if how == "SIGINT":
        assert re.search(r"[23] of 4 are in .*; the same command goes on\n.*stopped", ended.stderr)
    assert whole.read_bytes() != out.read_bytes()
    capsys.readouterr()
    assert main([*run, "--out", str(out)]) == 0
    assert "of 4 are in" in capsys.readouterr().err
    assert whole.read_bytes() == out.read_bytes()


def test_progress_is_said_by_lines_where_nobody_watches_a_bar(
    model: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llava.cli.answering._SAY_EVERY_SECONDS", 0.0)
    assert main(["caption", str(pictures), "--model", str(model), *FIXED]) == 0
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"2 of 4 answered, 0 failed, 0:\d\d:\d\d left", said[0])
    assert said[2].startswith("4 of 4 answered, 0 failed, 0:00:00 left")
