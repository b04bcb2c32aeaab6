from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import llava
from llava.errors import ContextLengthError, ImageError, LlavaError, UsageError
from llava.inference.answer import Assistant
from llava.inference.talk import Model
from llava.prompt.conversation import Image

COLOURS = ("red", "green", "blue", "white", "orange")


@pytest.fixture(scope="module")
def m(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from tests.cli.tiny_model import write_model

    made = llava.load(write_model(tmp_path_factory.mktemp("model")), dtype="float32", device="cpu")
    head = made.model.language_model.lm_head.weight
    with torch.no_grad():
        letters = head[3 + ord("a") : 3 + ord("z") + 1].clone()
        head.zero_()  # random bytes are no text: let it say letters only
        head[3 + ord("a") : 3 + ord("z") + 1] = letters
        made.model.multi_modal_projector.linear_2.weight.mul_(20)  # pictures that differ are to matter
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, colour in enumerate(COLOURS):
        PIL.Image.new("RGB", (60, 40 + 5 * number), colour).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def test_the_same_picture_is_answered_the_same_however_it_is_given(m: Model, folder: Path) -> None:
    path = folder / "0.png"
    picture = PIL.Image.open(path).convert("RGB")
    ways: list[Any] = [path, str(path), path.read_bytes(), picture, np.asarray(picture), Image(path), [path]]
    answers = {m.chat(way, "What is it?", max_new_tokens=6) for way in ways}
    assert len(answers) == 1
    assert answers != {m.chat(folder / "1.png", "What is it?", max_new_tokens=6)}


def test_a_question_without_a_picture_is_answered(m: Model) -> None:
    assert isinstance(m.chat(None, "Hello", max_new_tokens=4), str)


def test_a_stream_says_what_chat_says(m: Model, folder: Path) -> None:
    pieces = list(m.stream(folder / "0.png", "What is it?", max_new_tokens=8))
    assert "".join(pieces).strip() == m.chat(folder / "0.png", "What is it?", max_new_tokens=8)
    assert len(pieces) > 1


def test_a_chat_remembers_its_turns_and_reads_only_what_is_new(m: Model, folder: Path) -> None:
    talk = m.start_chat(max_new_tokens=5)
    talk.ask("What is it?", folder / "0.png")
    before = m.assistant.engine.prefixes.hit_tokens
    talk.ask("And the colour?")
    assert m.assistant.engine.prefixes.hit_tokens > before
    assert [message.role for message in talk.messages] == ["user", "assistant"] * 2
    assert [len(message.images) for message in talk.messages] == [1, 0, 0, 0]


def test_an_answer_that_is_broken_off_keeps_what_was_said(m: Model, folder: Path) -> None:
    talk = m.start_chat(max_new_tokens=30)
    stream = talk.stream("What is it?", folder / "0.png")
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert talk.messages[-1].text == first.strip()
    assert m.assistant.engine.num_active == 0


def test_a_conversation_goes_on_after_ctrl_c_and_after_being_stopped(m: Model, folder: Path) -> None:
    talk = m.start_chat(max_new_tokens=30)
    stream = talk.stream("What is it?", folder / "0.png")
    first = next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert talk.messages[-1].text == first.strip()
    said = ""
    for piece in talk.stream("And now?"):
        said += piece
        talk.stop()
    assert talk.messages[-1].text == said.strip()
    assert len(talk.messages) == 4
    assert len(said) < 30
    talk.stop()  # nothing under way: nothing happens
    assert m.assistant.engine.num_active == 0


def test_another_model_and_system_text_may_take_over(m: Model) -> None:
    talk = m.start_chat(max_new_tokens=4, system="Be kind.")
    talk.ask("Hello")
    talk.system, talk.assistant = None, Assistant(m.model, m.processor.with_template("vicuna_v1"))
    other = Model(m.model, m.processor.with_template("vicuna_v1"), m.report).start_chat(max_new_tokens=4)
    other.messages = list(talk.messages)
    assert talk.ask("Again") == other.ask("Again")


def test_a_question_too_long_fails_alone(m: Model, folder: Path) -> None:
    heard: dict[int, LlavaError | None] = {}
    pairs = [(Image(folder / "0.png"), words) for words in ("What?", "long " * 600, "Why?")]
    for beams in (1, 2):
        texts = m.answer_all(
            pairs,
            beams=beams,
            on_error="skip",
            on_answer=lambda number, text, error: heard.update({number: error}),
            max_new_tokens=4,
        )
        assert texts[1] == ""
        assert [type(heard[number]) for number in range(3)] == [type(None), ContextLengthError, type(None)]


def test_an_error_leaves_the_conversation_as_it_was(m: Model, tmp_path: Path) -> None:
    talk = m.start_chat()
    with pytest.raises(ImageError):
        talk.ask("What is it?", tmp_path / "missing.png")
    assert talk.messages == []


def test_a_folder_is_captioned_in_the_order_of_its_names(m: Model, folder: Path) -> None:
    alone = [m.caption(folder / f"{number}.png", max_new_tokens=5)[0] for number in range(len(COLOURS))]
    assert m.caption(folder, max_new_tokens=5) == alone
    assert len(set(alone)) > 1


def test_captions_by_beams_are_those_of_one_at_a_time(m: Model, folder: Path) -> None:
    together = m.caption(folder, beams=3, max_new_tokens=6)
    assert together == [m.caption(path, beams=3, max_new_tokens=6)[0] for path in sorted(folder.glob("*.png"))]


def test_questions_and_pictures_are_paired_or_spread(m: Model, folder: Path) -> None:
    paths = sorted(folder.glob("*.png"))[:2]
    words = ["What is it?", "Which colour?"]
    both = m.vqa(paths, words, max_new_tokens=4)
    assert both == [m.chat(path, word, max_new_tokens=4) for path, word in zip(paths, words, strict=True)]
    assert m.vqa(paths[0], words, max_new_tokens=4) == [m.chat(paths[0], word, max_new_tokens=4) for word in words]
    assert m.vqa(paths, words[0], max_new_tokens=4) == [m.chat(path, words[0], max_new_tokens=4) for path in paths]
    with pytest.raises(UsageError, match="2 pictures and 3 questions"):
        m.vqa(paths, [*words, "Why?"])
    assert m.vqa([], words[0]) == []


def test_a_broken_picture_is_named_or_skipped(m: Model, folder: Path) -> None:
    (folder / "2.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match="picture 3 of 5"):
        m.caption(folder, max_new_tokens=3)
    seen: list[tuple[int, bool, LlavaError | None]] = []
    found = m.answer_all(
        [(Image(path), "What?") for path in sorted(folder.glob("*.png"))],
        on_error="skip",
        max_new_tokens=3,
        on_answer=lambda number, text, error: seen.append((number, text is None, error)),
    )
    assert found[2] == ""
    assert all(text for number, text in enumerate(found) if number != 2)
    assert sorted((number, failed) for number, failed, _ in seen) == [(i, i == 2) for i in range(5)]


def test_wrong_arguments_are_one_line_each(m: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'temperature'"):
        m.chat(None, "Hello", temperatur=0.2)
    with pytest.raises(UsageError, match="no pictures in it"):
        m.caption(tmp_path)
    with pytest.raises(UsageError, match="allow_urls=True"):
        m.chat("https://example.com/cat.png", "What?")
    with pytest.raises(UsageError, match="int: no picture"):
        m.caption(7)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'raise' or 'skip'"):
        m.caption([], on_error="ignore")  # type: ignore[arg-type]


def test_a_web_address_into_the_own_network_is_never_asked(m: Model) -> None:
    with pytest.raises(LlavaError, match="127"):
        m.chat("http://127.0.0.1:9/cat.png", "What?", allow_urls=True)
