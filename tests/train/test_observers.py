"""The curves are drawn while a run goes on, and never end it."""

from pathlib import Path

import pytest
from PIL import Image

from llava.train import observers
from llava.train.observers import PlotWatcher
from llava.train.run import RunStoppedError, run_recipe
from tests.train.test_metrics import record
from tests.train.test_run import StopAfter, make_recipe
from tests.train.test_run import world as world
from tests.train.test_trackers import info


def test_the_curves_are_drawn_while_it_runs_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "_REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(observers, "_REDRAW_SHARE", 1e9)
    watcher = PlotWatcher(title="a run")
    watcher.started(info(tmp_path))
    watcher.stepped(record(1, 2.0))
    assert "step 1: loss 2" in (tmp_path / "loss.svg").read_text()
    watcher.stepped(record(2, 1.0))
    assert "step 2: loss 1" in (tmp_path / "loss.svg").read_text()
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG"


def test_drawing_takes_little_of_the_time(tmp_path: Path) -> None:
    watcher = PlotWatcher(title="a run")
    watcher.started(info(tmp_path))
    for step in range(1, 50):
        watcher.stepped(record(step))
    assert not (tmp_path / "loss.svg").exists(), "not before half a minute has passed"
    watcher.ended()
    assert (tmp_path / "loss.svg").exists()


def test_a_resumed_runs_curve_begins_where_the_run_did(world: Path, tmp_path: Path) -> None:
    recipe = make_recipe(world, tmp_path / "run")
    with pytest.raises(RunStoppedError):
        run_recipe(recipe, watcher=StopAfter(2))
    drawn: list[PlotWatcher] = []
    original = PlotWatcher.ended

    def note(watcher: PlotWatcher) -> None:
        drawn.append(watcher)
        original(watcher)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlotWatcher, "ended", note)
        run_recipe(recipe)
    assert [line["step"] for line in drawn[0]._lines] == [1, 2, 3, 4, 5, 6]


def test_a_disk_without_room_for_the_picture_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = PlotWatcher(title="a run")
    watcher.started(info(tmp_path))
    watcher.stepped(record(1))

    def fail(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    watcher.ended()
    assert "the curves could not be drawn: No space left on device" in caplog.text
