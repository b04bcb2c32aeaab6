from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.eval.figures import number
from llava.eval.radar import radar
from llava.eval.report import write_report
from llava.eval.run import Asking, run_task
from tests.eval.made_up import MadeUp, write_benchmark
from tests.eval.models import draw_pictures
from tests.eval.test_run import WORDS, Says


class Page(html.parser.HTMLParser):
    """Checks that tags close in order, and keeps what is said and what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "line", "circle", "polygon", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag in ("line", "circle", "polygon"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def measured(tmp_path: Path, words: Mapping[str, str] = WORDS, *, tasks: int = 1) -> Path:
    root = write_benchmark(tmp_path / "data", draw_pictures(tmp_path, 2))
    for place in range(tasks):
        task: Any = MadeUp()
        task.name = f"made_up{place or ''}"
        run_task(task, Says(words), root=root, out=tmp_path / "out", asking=Asking())
    write_report(tmp_path / "out")
    return tmp_path / "out"


def test_the_figures_stand_beside_the_published_with_what_made_them(tmp_path: Path) -> None:
    out = measured(tmp_path)
    record = json.loads((out / "report.json").read_text())
    assert record["model"] == "says"
    task = record["tasks"]["made_up"]
    assert task["headline"] == {"accuracy": 75.0}
    assert task["published"]["LLaVA-1.5-7B"] == 61.5
    assert task["interval"] == [50.0, 100.0]
    for name in ("rows", "split_hash", "prompt", "decoding", "weights", "llava", "python", "rule", "files"):
        assert task["provenance"][name], name
    text = (out / "report.md").read_text()
    assert "| Made up | accuracy | 75 | 50.0 to 100.0 | 4 | 61.5 | 70 |" in text
    assert "- one note" in text
    assert "Accuracy: 75.00" in text
    assert "| yes | 2 |" in text


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    text = (measured(tmp_path) / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in page.sources)
    assert "1 of 4 answers are not fully right" in text
    assert sum(source.startswith("data:") for source in page.sources) == 1
    assert "<script" not in text


def test_answers_cannot_write_into_the_page_or_the_table(tmp_path: Path) -> None:
    evil = "</b><script>alert(1)</script>|`x`\n# head"
    text = (measured(tmp_path, WORDS | {"0": evil}) / "report.html").read_text()
    assert not Page(text).open
    assert "<script" not in text


def test_a_picture_that_has_gone_is_a_word_on_the_page(tmp_path: Path) -> None:
    out = measured(tmp_path)
    (tmp_path / "0.png").unlink()
    write_report(out)
    assert "0.png cannot be read" in (out / "report.html").read_text()


def test_three_benchmarks_make_a_radar(tmp_path: Path) -> None:
    text = (measured(tmp_path, tasks=3) / "report.html").read_text()
    assert not Page(text).open
    assert text.count('class="model m') == 3
    assert "says, made_up: 75" in text


def test_a_radar_puts_the_best_figure_near_the_rim_and_nothing_into_the_middle() -> None:
    drawn = radar(["a", "b", "c"], {"one": {"a": 100.0, "b": 0.0, "c": 1.0}, "two": {"a": 50.0, "b": 4.0}})
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="3"><title>([^<]+)', drawn)
    far = {said: ((float(x) - 280) ** 2 + (float(y) - 280) ** 2) ** 0.5 / 180 for x, y, said in circles}
    assert far["one, a: 100"] == pytest.approx(1 / 1.06, abs=0.01)
    assert far["two, a: 50"] == pytest.approx(0.5 / 1.06, abs=0.01)
    assert far["one, b: 0"] == pytest.approx(0, abs=0.01)
    assert far["two, b: 4"] == pytest.approx(1 / 1.06, abs=0.01)
    assert "<polyline" in drawn
    assert radar(["a", "b"], {"one": {"a": 1.0, "b": 1.0}}) == ""


def test_a_long_table_is_folded_and_a_very_long_one_cut(tmp_path: Path) -> None:
    out = measured(tmp_path)
    path = out / "made_up/result.json"
    record = json.loads(path.read_text())
    record["tables"]["long"] = [{"n": n} for n in range(400)]
    path.write_text(json.dumps(record))
    write_report(out)
    text = (out / "report.html").read_text()
    assert not Page(text).open
    assert "long: 400 rows; the first 300" in text
    assert text.count("<td class=number>299</td>") == 1
    assert "<td class=number>300</td>" not in text
    assert "### long" not in (out / "report.md").read_text()


def test_a_folder_without_results_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results here"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (75.0, "75"),
        (0.540881, "0.5409"),
        (1531.3187, "1,531.3187"),
        (100.0, "100"),
        (0.0, "0"),
        (None, ""),
        (-1.0, "-1"),
        (float("nan"), "nan"),
    ],
)
def test_figures_are_written_without_needless_digits(value: float | None, text: str) -> None:
    assert number(value) == text
