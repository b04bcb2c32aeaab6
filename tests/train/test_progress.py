"""The terminal's lines: what is known before the first step, and of each step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava.train.meter import Meter
from llava.train.progress import Sample, TerminalWatcher, Watcher, WatcherGroup, make_table, say_duration
from llava.train.sections import TuneSection
from llava.train.stages import TABLE_HEAD, apply_stage, describe_stage
from tests.train.test_metrics import record
from tests.train.test_trackers import info
from tests.train.tiny_training import build_tiny_llava


def test_plain_lines_say_everything_about_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_tiny_llava()
    table = describe_stage(apply_stage(model, TuneSection()))
    meter = Meter(model, device=torch.device("cpu"), dtype=torch.float32)
    watcher = TerminalWatcher(plain_seconds=0.0)
    watcher.started(replace(info(tmp_path), table=table, meter=meter))
    watcher.stepped(record(3, tiles=2, pairs=500))
    watcher.sampled(Sample(3, Path("cat.png"), "What [is] it?", "a [cat]"))
    watcher.ended()
    text = capsys.readouterr().err
    for wanted in ("projector", "TFLOP/s, measured now", "step 3/9", "loss 1.500", "160 tokens/s", "25% supervised"):
        assert wanted in text
    for wanted in ("MFU", "GiB", "left", "cat.png: What [is] it? -> a [cat]"):
        assert wanted in text


def test_a_loss_that_is_not_finite_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watcher = TerminalWatcher(plain_seconds=0.0)
    watcher.started(info(tmp_path))
    watcher.stepped(record(1, 2.0))
    watcher.stepped(record(2, float("nan")))
    assert "step 2/9  loss 2.000" in capsys.readouterr().err


def test_columns_that_say_nothing_are_left_out() -> None:
    rows = describe_stage(apply_stage(build_tiny_llava(), TuneSection()))
    assert len(make_table(rows, title="").columns) < len(TABLE_HEAD)


def test_a_group_tells_every_watcher_everything(tmp_path: Path) -> None:
    told: list[str] = []

    class Note(Watcher):
        def __getattribute__(self, name: str) -> object:
            if name.startswith("_"):
                return super().__getattribute__(name)
            return lambda *args: told.append(name)

    group = WatcherGroup(Note(), Note())
    group.started(info(tmp_path))
    group.stepped(record(1))
    group.sampled(Sample(1, Path("a"), "b", "c"))
    group.saved(tmp_path)
    group.stopped("why")
    group.ended()
    events = [name for name in vars(Watcher) if not name.startswith("_")]
    assert told == [name for name in events for _ in range(2)], "every event of a watcher, in order, to both"


def test_times_are_said_for_people() -> None:
    assert [say_duration(s) for s in (0.4, 89, 91, 3599, 3600, 86_399, 86_400, 1e6)] == [
        "0 s",
        "89 s",
        "2 min",
        "1 h 0 min",
        "1 h 0 min",
        "1 d 0 h",
        "1 d 0 h",
        "11 d 13 h",
    ]
