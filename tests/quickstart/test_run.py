"""The quickstart with small numbers: phases are kept, other settings are refused, the same seed gives the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llava.data.scene_turns import KINDS
from llava.errors import UsageError
from llava.quickstart import run as quickstart
from llava.quickstart.latest import find_latest, remember
from llava.quickstart.run import Audience, QuickstartSettings, run_quickstart

SMALL = QuickstartSettings(
    num_scenes=24,
    held_out_scenes=12,
    align_overrides=("optim.max_steps=2", "run.device=cpu", "run.dtype=float32"),
    instruct_overrides=("optim.max_steps=2", "run.device=cpu", "run.dtype=float32"),
)


class Listener(Audience):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_an_interrupted_quickstart_goes_on_and_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_quickstart(tmp_path / "whole", SMALL)
    assert set(whole.figures["accuracy"]) == set(KINDS)  # type: ignore[call-overload]
    assert (whole.model / "config.json").is_file() and whole.report.is_file()

    real = quickstart._train_stage

    def stop_in_stage_two(recipe: str, overrides: list[str], audience: Audience) -> None:
        if recipe == "quickstart-instruct":
            raise KeyboardInterrupt
        real(recipe, overrides, audience)

    monkeypatch.setattr(quickstart, "_train_stage", stop_in_stage_two)
    with pytest.raises(KeyboardInterrupt):
        run_quickstart(tmp_path / "cut", SMALL)
    monkeypatch.setattr(quickstart, "_train_stage", real)
    listener = Listener()
    resumed = run_quickstart(tmp_path / "cut", SMALL, audience=listener)
    assert [line.split(":")[0] for line in listener.lines if "done before" in line] == ["draw", "align"]
    assert resumed.figures["accuracy"] == whole.figures["accuracy"]
    same = [(folder / "model.safetensors").read_bytes() for folder in (whole.model, resumed.model)]
    assert same[0] == same[1]

    with pytest.raises(UsageError, match="another seed"):
        run_quickstart(tmp_path / "cut", replace(SMALL, seed=1))


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not a quickstart"):
        run_quickstart(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        run_quickstart(tmp_path / "file" / "out", SMALL)


def test_a_run_killed_before_its_first_phase_ended_is_recognised(tmp_path: Path) -> None:
    class Killed(Audience):
        def bar(self, title: str, total: int):  # type: ignore[no-untyped-def]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_quickstart(tmp_path / "out", SMALL, audience=Killed())
    assert json.loads((tmp_path / "out" / "progress.json").read_text())["seconds"] == {}
    listener = Listener()

    class Stop(Listener):
        def watcher(self, label: str):  # type: ignore[no-untyped-def]
            raise KeyboardInterrupt

    listener = Stop()
    with pytest.raises(KeyboardInterrupt):
        run_quickstart(tmp_path / "out", SMALL, audience=listener)
    assert (tmp_path / "out" / "data" / "conversations.json").is_file()
    assert listener.lines[-1].startswith("align")


def test_the_newest_quickstart_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert find_latest() is None
    elsewhere = tmp_path / "elsewhere" / "model"
    elsewhere.mkdir(parents=True)
    (elsewhere / "config.json").write_text("{}")
    remember(elsewhere)
    assert find_latest() == elsewhere
    here = tmp_path / "llava-quickstart" / "model"
    here.mkdir(parents=True)
    (here / "config.json").write_text("{}")
    assert find_latest() == Path("llava-quickstart/model")
