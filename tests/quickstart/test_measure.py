"""The measurement itself: a perfect answerer scores 1, a blind one is no better than its control."""

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from llava.data.scene_turns import KINDS
from llava.quickstart.measure import Measurement, measure
from llava.quickstart.report import ReportContents, report_as_json, write_page

Questions = Sequence[tuple[Image.Image, str]]


def measure_truth(*, wrong_at: int | None = None) -> Measurement:
    """Measure an answerer that knows the right answers (of the first call), with one answer spoilt if asked."""
    blank = measure(lambda asked: ["" for _ in asked], seed=3, num_scenes=40)
    truth = [one.turn.answer for one in blank.asked]
    if wrong_at is not None:
        truth[wrong_at] = "nonsense"
    calls: list[Questions] = []

    def answer(asked: Questions) -> list[str]:
        calls.append(asked)
        return truth

    return measure(answer, seed=3, num_scenes=40)


def test_a_perfect_answerer_scores_one_on_every_kind_and_beats_every_control() -> None:
    accuracy = measure_truth().accuracy()
    assert list(accuracy) == list(KINDS)
    for kind, row in accuracy.items():
        assert row.model == 1.0, kind
        if row.no_binding is not None:
            assert row.no_binding < 1.0, kind
        assert row.majority < 1.0, kind


def test_one_wrong_answer_lowers_exactly_its_kind() -> None:
    whole = measure_truth()
    kind = whole.asked[5].turn.kind
    spoilt = measure_truth(wrong_at=5).accuracy()
    assert spoilt[kind].model == pytest.approx(1 - 1 / spoilt[kind].questions)
    assert all(row.model == 1.0 for name, row in spoilt.items() if name != kind)


def test_the_wrong_picture_is_another_scenes_picture() -> None:
    seen: list[Questions] = []

    def answer(asked: Questions) -> list[str]:
        seen.append(list(asked))
        return ["" for _ in asked]

    measure(answer, seed=3, num_scenes=10)
    right, wrong = seen
    assert [question for _, question in right] == [question for _, question in wrong]
    assert all(own is not other for (own, _), (other, _) in zip(right, wrong, strict=True))


def test_the_same_seed_asks_the_same_and_another_seed_does_not() -> None:
    first, again, other = (measure(lambda asked: [""] * len(asked), seed=seed, num_scenes=8) for seed in (3, 3, 4))
    assert [one.turn for one in first.asked] == [one.turn for one in again.asked]
    assert [one.turn for one in first.asked] != [one.turn for one in other.asked]
    assert first.pictures[0].tobytes() == again.pictures[0].tobytes()


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_report_is_one_file_that_asks_the_network_for_nothing(tmp_path: Path) -> None:
    measurement = measure_truth(wrong_at=9)
    contents = ReportContents(
        accuracy=measurement.accuracy(),
        measurement=measurement,
        loss_plots=[("stage 1", '<svg viewBox="0 0 1 1"></svg>')],
        seconds={"draw": 2.0, "align": 3.0},
        facts={"seed": "3", "<b>": "<script>"},
        next_commands=[("talk", "llava chat")],
    )
    write_page(tmp_path / "report.html", contents)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = _Tags()
    tags.feed(text)
    assert sum(tag == "img" for tag, _ in tags.seen) == 12
    assert not [tag for tag, _ in tags.seen if tag in ("script", "link", "iframe")]
    links = [value for _, attrs in tags.seen for name, value in attrs.items() if name in ("src", "href")]
    assert all(value is not None and value.startswith("data:image/png;base64,") for value in links)
    figures = json.loads(json.dumps(report_as_json(contents)))
    assert set(figures["accuracy"]) == set(KINDS)
    assert set(figures["accuracy"]["colour"]) == {"model", "wrong_picture", "no_binding", "majority"}
    assert figures["seconds"] == {"draw": 2.0, "align": 3.0}
