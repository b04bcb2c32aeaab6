from __future__ import annotations

import base64
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import LlavaForConditionalGeneration

import llava
from llava.cli.main import main
from llava.inference.answer import AnswerStream
from tests.cli.tiny_model import IMAGE_TOKEN_ID, NUM_FEATURES

FIXED = ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", "12"]


@pytest.fixture
def nothing_on_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["chat", *map(str, arguments), "--json", *FIXED]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    record: dict[str, Any] = json.loads(out)
    return record


def write_messages(folder: Path, picture: str) -> Path:
    path = folder / "messages.json"
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What is it?"}]
    path.write_text(json.dumps([{"role": "user", "content": content}]))
    return path


def test_a_file_of_messages_gives_one_json_line_equal_to_transformers(
    model: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = ask(capsys, model, "--messages", write_messages(picture.parent, picture.name))
    ids = record["prompt_token_ids"]
    assert ids.count(record["image_token_id"]) == NUM_FEATURES
    assert record["image_token_id"] == IMAGE_TOKEN_ID
    from llava.prompt.conversation import Image
    from llava.prompt.processor import Processor

    pixels = torch.tensor(Processor.load(model).prepare_image(Image(picture)).pixel_values)
    stock = LlavaForConditionalGeneration.from_pretrained(model)
    expected = stock.generate(
        input_ids=torch.tensor([ids]), pixel_values=pixels, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert record["token_ids"] == expected[0, len(ids) :].tolist()
    assert record["finish_reason"] in ("stop", "length")
    assert record["seconds"] > 0
    assert isinstance(record["text"], str)


def test_a_picture_may_be_a_path_or_a_data_url(model: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    answers = [
        ask(capsys, model, "--messages", write_messages(picture.parent, form))["token_ids"]
        for form in (picture.name, str(picture), f"file://{picture}", url)
    ]
    assert answers.count(answers[0]) == 4


def test_a_question_may_come_from_the_command_line_or_from_stdin(
    model: Path, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ask(capsys, model, "-p", "What is it?", "--image", picture)
    for extra in ([], ["-p", "-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n"))
        piped = ask(capsys, model, "--image", picture, *extra)
        assert piped["prompt_token_ids"] == given["prompt_token_ids"]
        assert piped["token_ids"] == given["token_ids"]


def test_without_json_the_text_alone_is_printed(model: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ask(capsys, model, "-p", "What is it?", "--image", picture)["text"]
    assert main(["chat", str(model), "-p", "What is it?", "--image", str(picture), *FIXED]) == 0
    assert capsys.readouterr().out.strip() == text


def test_the_template_and_the_system_text_can_be_chosen(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ask(capsys, model, "-p", "Hello")
    vicuna = ask(capsys, model, "-p", "Hello", "--template", "vicuna_v1")
    terse = ask(capsys, model, "-p", "Hello", "--template", "vicuna_v1", "--system", "Be terse.")
    lengths = [len(record["prompt_token_ids"]) for record in (plain, terse, vicuna)]
    assert lengths == sorted(set(lengths))
    assert vicuna["template"] == "vicuna_v1"


def test_without_a_model_the_newest_quickstart_is_opened(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from llava.quickstart.latest import remember

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["chat", "-p", "Hello"]) == 2
    assert "llava quickstart" in capsys.readouterr().err
    remember(model)
    assert ask(capsys, "-p", "Hello")["model"] == str(model.resolve())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "no messages"),
        ('[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "missing.png"}}]}]', "missing.png"),
        ('[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}]', "web address"),
        ('[{"role": "assistant", "content": "Hello"}]', "last message"),
        ('[{"role": "boss", "content": "Hello"}]', "boss"),
        ('[{"role": "user", "content": "' + 600 * "long " + '"}]', "context"),
    ],
)
def test_bad_messages_are_one_line_that_names_the_file_and_exit_code_2(
    content: str | None, says: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.json"
    if content is not None:
        path.write_text(content)
    assert main(["chat", str(model), "--messages", str(path), "--json", *FIXED]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert says in shown.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-p", "a", "--messages", "b"], "give one of them"),
        (["--messages", "b", "--image", "c.png"], "drop --image"),
        ([], "nothing to answer on stdin"),
        (["-p", "a", "--image", "missing.png"], "missing.png"),
        (["-p", "a", "--template", "vicuna_v9"], "vicuna_v9"),
        (["-p", "a", "--temperature", "nan"], "temperature"),
        (["-p", "a", "--top-p", "9"], "top_p"),
        (["-p", "a", "--max-new-tokens", "0"], "max_new_tokens"),
        (["-p", "a", "--device", "abacus"], "abacus"),
        (["-p", "a", "--dtype", "float7"], "float7"),
        (["-p", "a", "--load-in", "3bit"], "4bit or 8bit"),
        (["-p", "a", "--image", "https://pictures.example/a.png"], "--allow-urls"),
        (["-p", "a", "--image", "http://127.0.0.1/a.png", "--allow-urls"], "not a public address"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], says: str, model: Path, capsys: pytest.CaptureFixture[str], nothing_on_stdin: None
) -> None:
    assert main(["chat", str(model), *arguments]) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(tmp_path), "-p", "Hello"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def says(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let every answer have this text."""
    whole = AnswerStream.answer
    monkeypatch.setattr(AnswerStream, "answer", lambda stream: replace(whole(stream), text=text))


def test_the_boxes_of_one_answer_are_drawn_where_the_config_counts_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In hundredths of the original picture, which this model's config says, and not of the part that it sees."""
    folder, picture, out = tmp_path / "model", tmp_path / "wide.png", tmp_path / "boxes.png"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    loaded = llava.load(model, device="cpu")
    block = loaded.model.config.to_dict()["llava"] | {"boxes": {"scale": 100, "frame": "picture"}}
    (folder / "config.json").write_text(json.dumps({**config, "llava": block}))
    PIL.Image.new("RGB", (200, 100), "white").save(picture)
    says(monkeypatch, "[25, 20, 75, 80]")
    asked = ["chat", str(folder), "-p", "Where?", "--image", str(picture), "--save-boxes", str(out), *FIXED]
    assert main(asked) == 0
    assert capsys.readouterr().err == f"1 box drawn: {out}\n"
    inked = np.nonzero((np.asarray(PIL.Image.open(out)) != 255).any(axis=2))
    assert (inked[1].min(), inked[0].min(), inked[1].max(), inked[0].max()) == (50, 20, 149, 79)


def test_an_answer_without_a_box_is_printed_and_said(
    model: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    nothing_on_stdin: None,
) -> None:
    says(monkeypatch, "I see none.")
    out = tmp_path / "boxes.png"
    asked = ["chat", str(model), "-p", "Where?", "--image", str(picture), "--save-boxes", str(out), "--json", *FIXED]
    assert main(asked) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["text"] == "I see none."
    assert "holds no box" in shown.err
    assert not out.exists()


def test_a_picture_from_the_web_is_answered_as_its_file(
    model: Path, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.cli.chat_pictures._FETCHER.fetch", lambda address: picture.read_bytes())
    address = "https://pictures.example/a.png"
    by_path = ask(capsys, model, "-p", "What is it?", "--image", picture)
    by_address = ask(capsys, model, "-p", "What is it?", "--image", address, "--allow-urls")
    in_messages = ask(capsys, model, "--messages", write_messages(picture.parent, address), "--allow-urls")
    assert by_path["token_ids"] == by_address["token_ids"] == in_messages["token_ids"]
