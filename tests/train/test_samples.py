"""The page of sample answers."""

import html.parser
from pathlib import Path

import pytest
from PIL import Image

from llava.train.samples import write_sample_page


def lines(picture: Path) -> list[dict[str, object]]:
    return [
        {"step": step, "image": str(picture), "question": question, "answer": f"<b>{question} at {step}</b>"}
        for step in (0, 100, 200)
        for question in ("What?", "Where & why?")
    ]


class Reader(html.parser.HTMLParser):
    """Collects tags and the text of table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = [""]
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.tags[-1] == "td":
            self.cells[-1] += data


def test_the_page_shows_each_picture_once_with_its_answers_newest_first(tmp_path: Path) -> None:
    picture = tmp_path / "a cat.png"
    Image.new("RGB", (900, 300), "red").save(picture)
    write_sample_page(tmp_path / "samples.html", lines(picture), title="a <run>")
    text = (tmp_path / "samples.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.tags.count("img") == 1
    assert reader.tags.count("table") == 2
    assert reader.cells[:6] == ["200", "<b>What? at 200</b>", "100", "<b>What? at 100</b>", "0", "<b>What? at 0</b>"]
    assert "b" not in reader.tags, "an answer is text, whatever it says"
    assert "a &lt;run&gt;" in text
    assert "http" not in text, "whole in one file, nothing is fetched"


def test_a_picture_that_is_gone_leaves_its_answers(tmp_path: Path) -> None:
    write_sample_page(tmp_path / "samples.html", lines(tmp_path / "gone.png"), title="run")
    assert 'alt="gone.png"' in (tmp_path / "samples.html").read_text()


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_sample_page(tmp_path / "nowhere" / "samples.html", [], title="run")
    assert "samples.html: not written" in caplog.text
