from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

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
from llava.inference.answer import Assistant
from llava.inference.sampling import SamplingParams


@pytest.fixture(scope="module")
def assistant(model: Path) -> Assistant:
    loaded = llava.load(model, dtype="float32", device="cpu")
    return Assistant(loaded.model, loaded.processor)


@pytest.fixture
def session(assistant: Assistant) -> Session:
    return Session(assistant, SamplingParams(max_new_tokens=8))


def run(session: Session, line: str) -> str:
    return "".join(session.run_command(line) if line.startswith("/") else session.answer(line))


def test_a_talk_of_several_turns_remembers_them(session: Session) -> None:
    run(session, "Hello")
    run(session, "Again")
    assert [message.role for message in session.messages] == ["user", "assistant"] * 2
    assert session.messages[2].text == "Again"


def test_a_picture_goes_with_the_next_question(session: Session, picture: Path) -> None:
    run(session, f"/image {picture}")
    run(session, "What is it?")
    run(session, "And now?")
    assert [len(message.images) for message in session.messages] == [1, 0, 0, 0]


def test_several_pictures_and_quoted_paths(session: Session, picture: Path) -> None:
    assert run(session, f"/image '{picture}' \"{picture}\"") == "2 pictures for your next question"


def test_a_missing_picture_is_reported_where_it_is_named(session: Session) -> None:
    with pytest.raises(LlavaError, match=r"missing\.png"):
        run(session, "/image missing.png")
    assert session.pending == []


def test_undo_takes_back_a_question_with_its_answer(session: Session) -> None:
    run(session, "Hello")
    before = list(session.messages)
    run(session, "Again")
    assert run(session, "/undo") == "took back: Again"
    assert session.messages == before
    run(session, "/undo")
    with pytest.raises(LlavaError, match="nothing was said"):
        run(session, "/undo")


def test_retry_answers_the_same_question_again(session: Session, picture: Path) -> None:
    run(session, f"/image {picture}")
    first = run(session, "What is it?")
    assert run(session, "/retry") == first
    assert len(session.messages) == 2
    assert len(session.messages[0].images) == 1


def test_clear_forgets_everything(session: Session, picture: Path) -> None:
    run(session, "Hello")
    run(session, f"/image {picture}")
    run(session, "/clear")
    assert session.messages == session.pending == []


def test_settings_are_shown_and_changed(session: Session) -> None:
    run(session, "/set max_new_tokens 3")
    run(session, "/set temperature=0.5")
    run(session, "/set seed 7")
    assert session.params == SamplingParams(max_new_tokens=3, temperature=0.5, seed=7)
    assert "top_p 1.0" in run(session, "/set")
    run(session, "/set seed none")
    assert session.params.seed is None


@pytest.mark.parametrize(
    "line", ["/set warmth 1", "/set top_p 9", "/set top_p much", "/set seed", "/image", "/imag", "/"]
)
def test_a_wrong_command_changes_nothing(session: Session, line: str) -> None:
    before = session.params
    with pytest.raises(LlavaError):
        run(session, line)
    assert session.params == before


def test_a_saved_talk_can_be_continued(session: Session, assistant: Assistant, picture: Path, tmp_path: Path) -> None:
    run(session, "/system Be kind.")
    run(session, f"/image {picture}")
    run(session, "What is it?")
    path = tmp_path / "talk.json"
    run(session, f"/save {path}")
    assert json.loads(path.read_text())[0] == {"role": "system", "content": "Be kind."}
    other = Session(assistant, session.params)
    run(other, f"/load {path}")
    assert other.messages == session.messages
    assert other.system == "Be kind."
    assert run(other, "And now?") == run(session, "And now?")


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_file_that_cannot_be_loaded_leaves_the_talk(session: Session, content: str | None, tmp_path: Path) -> None:
    run(session, "Hello")
    before = list(session.messages)
    path = tmp_path / "talk.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LlavaError, match=r"talk\.json"):
        run(session, f"/load {path}")
    assert session.messages == before


def test_saving_where_nothing_can_be_written_is_an_error(session: Session, tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match="no folder"):
        run(session, f"/save {tmp_path / 'no folder' / 'talk.json'}")


def test_help_names_every_command(session: Session) -> None:
    shown = run(session, "/help")
    assert all(name in shown for name in COMMANDS)


def test_a_talk_too_long_is_refused_and_kept(session: Session) -> None:
    run(session, "Hello")
    before = list(session.messages)
    with pytest.raises(LlavaError, match="context"):
        run(session, "long " * 300)
    assert session.messages == before


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
    said = session.messages[1].text
    assert 0 < len(said) < 60
    assert capsys.readouterr().out.strip() == said
    session.answer = whole  # type: ignore[method-assign]
    run(session, "/set max_new_tokens 4")
    assert run(session, "Go on") or len(session.messages) == 4


def test_an_error_in_the_terminal_is_one_line(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    respond(session, "/image missing.png")
    shown = capsys.readouterr().out
    assert "missing.png" in shown
    assert shown.count("\n") == 1


def test_the_terminal_runs_lines_until_it_is_left(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("Hello\r\x03/undo\r/quit\r")
        talk(session, name="model")
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
