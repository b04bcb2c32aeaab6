"""One record looked at: its pictures with their tokens, its prompt, what is wrong; as values, page and PNG."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.data.record_view import draw_record, find_line, look_at_record, write_record_page
from llava.data.sources import read_conversations
from llava.errors import DataError
from llava.prompt.processor import Processor
from tests.data.test_check import processor as processor  # the fixture


def open_file(folder: Path, *records: Any, indent: int | None = None) -> Any:
    Image.new("RGB", (30, 20), "red").save(folder / "a.png")
    path = folder / "mix.json"
    path.write_text(json.dumps(list(records), indent=indent))
    return read_conversations(path)


def talk(answer: str = "Red <b>", image: str | None = "a.png") -> dict[str, Any]:
    turns = [{"from": "human", "value": ("<image>\n" if image else "") + "Colour?"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({"image": image} if image else {})}


def test_a_record_says_what_its_picture_costs_and_what_is_learnt(tmp_path: Path, processor: Processor) -> None:
    file = open_file(tmp_path, talk())
    view = look_at_record(file, 0, processor)
    (picture,) = view.pictures
    assert (picture.size, picture.tiles, picture.tokens) == ((20, 30), 1, 4)
    assert picture.num_bytes == (tmp_path / "a.png").stat().st_size
    assert view.encoded is not None
    assert sum(piece.num_tokens for piece in view.pieces) == len(view.encoded.input_ids)
    assert view.problems == ()


def test_what_is_wrong_with_a_record_is_said(tmp_path: Path, processor: Processor) -> None:
    file = open_file(tmp_path, talk(" ", "b.png"), {})
    view = look_at_record(file, 0, processor)
    assert view.encoded is None
    assert len(view.problems) == 2
    assert "empty answer: turn 2" in view.problems[0]
    assert "b.png: no such file" in view.problems[1]
    with pytest.raises(DataError, match="record 1"):
        look_at_record(file, 1, processor)


def test_without_a_model_the_turns_are_there(tmp_path: Path) -> None:
    view = look_at_record(open_file(tmp_path, talk()), 0, None)
    assert view.encoded is None
    assert view.pictures[0].tokens == 0
    assert view.problems == ()


@pytest.mark.parametrize("with_model", [True, False])
def test_the_page_and_the_drawing_show_picture_and_words(
    tmp_path: Path, processor: Processor, with_model: bool
) -> None:
    view = look_at_record(open_file(tmp_path, talk()), 0, processor if with_model else None)
    write_record_page(tmp_path / "r.html", view)
    page = (tmp_path / "r.html").read_text()
    assert "&lt;b&gt;" in page or "&lt;" in page
    assert "<b>" not in page
    assert "data:image/jpeg;base64," in page
    draw_record(tmp_path / "r.png", view)
    with Image.open(tmp_path / "r.png") as drawn:
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 20) or []}
    assert (255, 0, 0) in colours, "the picture"
    assert (0xD3, 0xF0, 0xDD) in colours, "what is learnt"
    assert (0xDB, 0xE9, 0xFF) in colours, "the picture's place in the prompt"


def test_a_text_only_record_is_drawn_too(tmp_path: Path, processor: Processor) -> None:
    draw_record(tmp_path / "r.png", look_at_record(open_file(tmp_path, talk(image=None)), 0, processor))
    assert (tmp_path / "r.png").stat().st_size > 0


def test_a_line_belongs_to_the_record_that_begins_at_or_over_it(tmp_path: Path) -> None:
    file = open_file(tmp_path, talk(), talk("Blue."), indent=1)
    second = int(file.origin(1).removeprefix(f"{file.path}:").split(" ")[0])
    assert find_line(file, second - 1) == 0
    assert find_line(file, second) == 1
    assert find_line(file, second + 3) == 1
    assert find_line(file, 1) == -1, "the bracket of the list"
