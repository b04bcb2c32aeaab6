from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import llava
from llava.cli.chat_session import COMMANDS, Session
from llava.cli.chat_terminal import CommandCompleter, respond, talk
from llava.errors import LlavaError
from llava.inference.sampling import SamplingParams
from llava.inference.talk import Model
from llava.prompt.conversation import Message, Text
from tests.cli.tiny_model import write_model


@pytest.fixture(scope="module")
def opened(model: Path) -> Model:
    return llava.load(model, dtype="float32", device="cpu")


@pytest.fixture
def session(opened: Model) -> Session:
    return Session(opened, SamplingParams(max_new_tokens=8), name="first")


def run(session: Session, line: str) -> str:
    return "".join(session.run_command(line) if line.startswith("/") else session.answer(line))


def test_a_talk_of_several_turns_remembers_them(session: Session) -> None:
    run(session, "Hello")
    run(session, "Again")
    assert [message.role for message in session.chat.messages] == ["user", "assistant"] * 2
    assert session.chat.messages[2].text == "Again"


def test_a_picture_goes_with_the_next_question(session: Session, picture: Path) -> None:
    run(session, f"/image {picture}")
    run(session, "What is it?")
    run(session, "And now?")
    assert [len(message.images) for message in session.chat.messages] == [1, 0, 0, 0]


def test_several_pictures_and_quoted_paths(session: Session, picture: Path) -> None:
    assert run(session, f"/image '{picture}' \"{picture}\"") == "2 pictures for your next question"


def test_a_missing_picture_is_reported_where_it_is_named(session: Session) -> None:
    with pytest.raises(LlavaError, match=r"missing\.png"):
        run(session, "/image missing.png")
    assert session.pending == []


def test_undo_takes_back_a_question_with_its_answer(session: Session) -> None:
    run(session, "Hello")
    before = list(session.chat.messages)
    run(session, "Again")
    assert run(session, "/undo") == "took back: Again"
    assert session.chat.messages == before
    run(session, "/undo")
    with pytest.raises(LlavaError, match="nothing was said"):
        run(session, "/undo")


def test_retry_answers_the_same_question_again(session: Session, picture: Path) -> None:
    run(session, f"/image {picture}")
    first = run(session, "What is it?")
    assert run(session, "/retry") == first
    assert len(session.chat.messages) == 2
    assert len(session.chat.messages[0].images) == 1


def test_clear_forgets_everything(session: Session, picture: Path) -> None:
    run(session, "Hello")
    run(session, f"/image {picture}")
    run(session, "/clear")
    assert session.chat.messages == session.pending == []


def test_settings_are_shown_and_changed(session: Session) -> None:
    run(session, "/set max_new_tokens 3")
    run(session, "/set temperature=0.5")
    run(session, "/set seed 7")
    assert session.chat.params == SamplingParams(max_new_tokens=3, temperature=0.5, seed=7)
    assert "top_p 1.0" in run(session, "/set")
    run(session, "/set seed none")
    assert session.chat.params.seed is None


@pytest.mark.parametrize(
    "line", ["/set warmth 1", "/set top_p 9", "/set top_p much", "/set seed", "/image", "/boxes", "/imag", "/"]
)
def test_a_wrong_command_changes_nothing(session: Session, line: str) -> None:
    before = session.chat.params
    with pytest.raises(LlavaError):
        run(session, line)
    assert session.chat.params == before


def test_a_saved_talk_can_be_continued(session: Session, opened: Model, picture: Path, tmp_path: Path) -> None:
    run(session, "/system Be kind.")
    run(session, f"/image {picture}")
    run(session, "What is it?")
    path = tmp_path / "talk.json"
    run(session, f"/save {path}")
    assert json.loads(path.read_text())[0] == {"role": "system", "content": "Be kind."}
    other = Session(opened, session.chat.params)
    run(other, f"/load {path}")
    assert other.chat.messages == session.chat.messages
    assert other.chat.system == "Be kind."
    assert run(other, "And now?") == run(session, "And now?")


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_file_that_cannot_be_loaded_leaves_the_talk(session: Session, content: str | None, tmp_path: Path) -> None:
    run(session, "Hello")
    before = list(session.chat.messages)
    path = tmp_path / "talk.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LlavaError, match=r"talk\.json"):
        run(session, f"/load {path}")
    assert session.chat.messages == before


def test_saving_where_nothing_can_be_written_is_an_error(session: Session, tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match="no folder"):
        run(session, f"/save {tmp_path / 'no folder' / 'talk.json'}")


def test_help_names_every_command(session: Session) -> None:
    shown = run(session, "/help")
    assert all(name in shown for name in COMMANDS)


def test_a_talk_too_long_is_refused_and_kept(session: Session) -> None:
    run(session, "Hello")
    before = list(session.chat.messages)
    with pytest.raises(LlavaError, match="context"):
        run(session, "long " * 300)
    assert session.chat.messages == before


def test_ctrl_c_stops_the_answer_and_not_the_talk(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    run(session, "/set max_new_tokens 300")
    whole = session.answer

    def interrupted(question: str) -> Iterator[str]:
        for number, piece in enumerate(whole(question)):
            yield piece
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)

    session.answer = interrupted  # type: ignore[method-assign]
    handler = signal.getsignal(signal.SIGINT)
    respond(session, "Hello")
    assert signal.getsignal(signal.SIGINT) is handler
    said = session.chat.messages[1].text
    assert 0 < len(said) < 60
    assert capsys.readouterr().out.strip() == said
    session.answer = whole  # type: ignore[method-assign]
    run(session, "/set max_new_tokens 4")
    assert run(session, "Go on") or len(session.chat.messages) == 4


def test_an_error_in_the_terminal_is_one_line(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    respond(session, "/image missing.png")
    shown = capsys.readouterr().out
    assert "missing.png" in shown
    assert shown.count("\n") == 1


def test_the_terminal_runs_lines_until_it_is_left(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("Hello\r\x03/undo\r/quit\r")
        talk(session)
    assert "took back: Hello" in capsys.readouterr().out
    assert session.ended


def complete(text: str) -> list[str]:
    document = Document(text, len(text))
    return [found.text for found in CommandCompleter().get_completions(document, CompleteEvent())]


def test_the_tab_key_completes_commands_and_paths(picture: Path) -> None:
    assert complete("/im") == ["/image"]
    assert complete("what") == []
    assert complete(f"/image {picture.parent}/a pic") == ["ture.png"]
    assert complete(f"/set {picture.parent}/a") == []


@pytest.mark.parametrize("quote", ["'", '"'])
def test_the_tab_key_completes_quoted_names_with_blanks(picture: Path, quote: str, session: Session) -> None:
    for before in ("", f"{quote}{picture}{quote} ", "other.png "):
        typed = f"/image {before}{quote}{picture.parent}/a pic"
        assert complete(typed) == [f"ture.png{quote}"]
    assert complete(f"/image {quote}{picture.parent.parent}/{picture.parent.name}") == [""]  # a folder: go on inside
    assert complete(f"/image other.png {picture.parent}/a") == [f"'{picture}'"]
    run(session, f"/image {quote}{picture.parent}/a picture.png{quote} '{picture}'")
    assert len(session.pending) == 2


def test_a_web_address_is_fetched_only_when_allowed(session: Session, picture: Path) -> None:
    asked: list[str] = []

    def fetch(address: str) -> bytes:
        asked.append(address)
        return picture.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava.cli.chat_pictures._FETCHER.fetch", fetch)
        with pytest.raises(LlavaError, match="/set allow_urls on"):
            run(session, "/image https://pictures.example/a.png")
        assert asked == []
        assert "allow_urls off" in run(session, "/set")
        run(session, "/set allow_urls on")
        run(session, "/image https://pictures.example/a.png")
    assert asked == ["https://pictures.example/a.png"]
    by_path = Session(session.model, session.chat.params, images=[str(picture)])
    assert run(session, "What is it?") == run(by_path, "What is it?")
    with pytest.raises(LlavaError, match="on or off"):
        run(session, "/set allow_urls maybe")


def test_an_address_inside_the_network_is_refused_even_when_allowed(session: Session) -> None:
    run(session, "/set allow_urls on")
    with pytest.raises(LlavaError, match="not a public address"):
        run(session, "/image http://127.0.0.1/a.png")


def test_the_clipboard_gives_a_picture_or_files(
    session: Session, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: object = PIL.Image.new("RGB", (60, 40), "red")
    monkeypatch.setattr("PIL.ImageGrab.grabclipboard", lambda: copied)
    assert run(session, "/paste") == "1 picture for your next question"
    copied = [str(picture)]
    assert run(session, "/image clip") == "2 pictures for your next question"
    copied = None
    with pytest.raises(LlavaError, match="no picture on the clipboard"):
        run(session, "/paste")


@pytest.mark.parametrize(
    ("problem", "says"),
    [(NotImplementedError("x"), "wl-paste .* or xclip"), (ChildProcessError("xclip error: no display"), "no display")],
)
def test_a_machine_without_clipboard_says_so(
    session: Session, monkeypatch: pytest.MonkeyPatch, problem: Exception, says: str
) -> None:
    def grab() -> None:
        raise problem

    monkeypatch.setattr("PIL.ImageGrab.grabclipboard", grab)
    with pytest.raises(LlavaError, match=says):
        run(session, "/paste")


def test_another_model_goes_on_with_the_conversation(session: Session, picture: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other model", seed=1)
    session._open_model = lambda name: llava.load(name, dtype="float32", device="cpu", template="vicuna_v1")
    run(session, f"/image {picture}")
    run(session, "What is it?")
    assert run(session, "/model") == "first"
    assert run(session, f"/model '{other}'") == f"{other} goes on (template vicuna_v1)"
    assert len(session.chat.messages) == 2
    assert run(session, "And now?") == session.chat.messages[-1].text
    alone = llava.load(other, dtype="float32", device="cpu", template="vicuna_v1").start_chat(max_new_tokens=8)
    alone.messages = session.chat.messages[:2]
    assert alone.ask("And now?") == session.chat.messages[-1].text


def test_a_model_that_does_not_open_leaves_the_one_at_work(session: Session, tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match="was given its model"):
        run(session, "/model elsewhere")
    session._open_model = lambda name: llava.load(name, device="cpu")
    with pytest.raises(LlavaError, match="no known layout"):
        run(session, f"/model {tmp_path}")
    assert session.name == "first"
    run(session, "Hello")


def test_boxes_of_the_last_answer_are_drawn_on_its_picture(session: Session, tmp_path: Path) -> None:
    path, out = tmp_path / "wide.png", tmp_path / "boxes out.png"
    PIL.Image.new("RGB", (200, 100), "white").save(path)
    with pytest.raises(LlavaError, match="show one and ask"):
        run(session, f"/boxes {out}")
    run(session, f"/image {path}")
    run(session, "Where is it?")
    session.chat.messages[-1] = Message("assistant", (Text("It is at [0.25, 0.25, 0.5, 0.75]."),))
    assert run(session, f"/boxes '{out}'") == f"1 box drawn: {out}"
    drawn = PIL.Image.open(out)
    assert drawn.size == (200, 100)
    # this model crops the middle 100 x 100 of it
    inked = np.nonzero((np.asarray(drawn) != 255).any(axis=2))
    assert (inked[1].min(), inked[0].min(), inked[1].max(), inked[0].max()) == (75, 25, 99, 74)
    with pytest.raises(LlavaError, match=r"\.png or \.jpg"):
        run(session, f"/boxes {tmp_path / 'boxes.txt'}")
    with pytest.raises(LlavaError, match="boxes"):
        run(session, f"/boxes {tmp_path / 'no folder' / 'boxes.png'}")
    session.chat.messages[-1] = Message("assistant", (Text("I see none."),))
    with pytest.raises(LlavaError, match="holds no box"):
        run(session, f"/boxes {out}")
