"""docs/chat.md and docs/python.md: every command, session line and snippet runs as it stands."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import PIL.Image
import pytest

import llava
from llava.cli.chat_session import COMMANDS, Session
from llava.cli.main import main
from llava.errors import LlavaError
from llava.inference.answer import AnswerStream
from llava.inference.sampling import SamplingParams
from llava.prompt.boxes import BoxFormat
from tests.cli.tiny_model import write_model

DOCS = Path(__file__).parent.parent.parent / "docs"
CHAT = (DOCS / "chat.md").read_text(encoding="utf-8")
PYTHON = (DOCS / "python.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


SHELL = [line for block in blocks(CHAT, "sh") for line in block.splitlines()]


@pytest.fixture
def here(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the pages suppose it."""
    shutil.copytree(model, tmp_path / "llava-quickstart" / "model")
    for name in ("cat.png", "my pictures/dog.png", "holiday/a.png", "holiday/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (60, 40), "red").save(tmp_path / name)
    (tmp_path / "questions.jsonl").write_text(blocks(CHAT, "json")[1])
    (tmp_path / "talk.json").write_text('[{"role": "user", "content": "Hello"}]')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("line", SHELL)
def test_a_command_runs(
    line: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(line)
    piped = "/quit\n"
    if words[0] == "echo":
        piped, words = words[1] + "\n", words[3:]
    assert words[0] == "llava"
    words += ["--device", "cpu", "--max-new-tokens", "4"]
    monkeypatch.setattr("sys.stdin", io.StringIO(piped))
    if "--save-boxes" in words:
        text = AnswerStream.answer
        monkeypatch.setattr(
            AnswerStream, "answer", lambda stream: type(text(stream))("[0, 0, 1, 1]", (), (), "stop", 0.0)
        )
    assert main(words[1:]) == 0, capsys.readouterr().err
    for option in ("--out", "--save-boxes", "--show-dir"):
        if option in words:
            assert (here / words[words.index(option) + 1]).exists()


def test_the_commands_of_the_page_are_all_kinds_there_are() -> None:
    assert {word for line in SHELL for word in shlex.split(line)} >= {"chat", "caption", "vqa", "--json", "--beams"}


def test_a_session_goes_as_the_page_says(here: Path) -> None:
    session = Session(
        llava.load("llava-quickstart/model", device="cpu"),
        SamplingParams(max_new_tokens=4),
        open_model=lambda name: llava.load(name, device="cpu"),
    )
    (script,) = blocks(CHAT, "text")
    for typed in script.splitlines():
        line = typed.removeprefix("> ")
        "".join(session.run_command(line) if line.startswith("/") else session.answer(line))


def test_the_page_names_every_command() -> None:
    assert not [name for name in COMMANDS if f"{name}" not in CHAT.replace("Ctrl-D", "/quit")]


def test_the_json_on_the_page_is_what_it_says(here: Path) -> None:
    config, question, answer = (json.loads(text) for text in blocks(CHAT, "json"))
    assert BoxFormat.of(config["llava"]) == BoxFormat()
    command = ["vqa", "questions.jsonl", "--images", "holiday", "--out", "a.jsonl", "--device", "cpu"]
    assert main(command) == 0
    (record,) = map(json.loads, Path("a.jsonl").read_text().splitlines())
    assert record.keys() == answer.keys()
    assert {**record, "text": "", "metadata": {}} == {**answer, "text": "", "metadata": {}}
    assert record["metadata"].keys() == answer["metadata"].keys()
    assert record["prompt"] == question["text"]


def test_the_snippets_run_one_after_the_other(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("llava-quickstart/model")
    write_model(Path("llava-quickstart/model"), context=8192)  # its answers do not end by themselves
    names: dict[str, object] = {}
    for snippet in blocks(PYTHON, "python"):
        exec(snippet.replace('model")', 'model", device="cpu")', 1), names)
    assert "holds no box" in capsys.readouterr().out
    assert isinstance(llava.errors.UsageError("x"), LlavaError)
