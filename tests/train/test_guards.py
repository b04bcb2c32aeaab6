"""Numbers that are not finite: noticed, skipped, counted, written down, and after enough of them the end."""

import json
import logging
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava.data.loader import GlobalStep
from llava.errors import TrainingError
from llava.prompt.processor import Processor
from llava.train import guards
from llava.train.guards import LossScale, StepGuard
from llava.train.loop import StepRecord, Trainer
from llava.train.metrics import read_metrics
from llava.train.progress import Watcher
from llava.train.recipe import load_recipe
from llava.train.run import RunStoppedError, run_recipe
from llava.train.sections import Recipe
from tests.train.kill_server import write_world

NAN = float("nan")


class Watched(Watcher):
    """Keeps the records; presses Ctrl-C after a step when asked."""

    def __init__(self, stop_after: int = 0) -> None:
        self.records: list[StepRecord] = []
        self._stop_after = stop_after

    def stepped(self, record: StepRecord) -> None:
        self.records.append(record)
        if record.step == self._stop_after:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def recipe_of(world: Path, out: Path, *changes: str) -> Recipe:
    return load_recipe(world / "recipe.yaml", [f"run.out={out}", "tune.language_model=full", *changes])


def bad_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "bad_steps.jsonl").read_text().splitlines()]


# --- the guard itself --------------------------------------------------------------------------------------------


def judge(guard: StepGuard, loss: float, grad_norm: float, step: int = 1) -> str:
    return guard.judge(step, loss=loss, grad_norm=grad_norm, conversations=[3, 4])


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (1.0, NAN), (float("inf"), 1.0), (1.0, float("inf"))])
def test_what_is_not_finite_is_bad(loss: float, norm: float, caplog: pytest.LogCaptureFixture) -> None:
    guard = StepGuard(max_bad_steps=2)
    assert judge(guard, 1.0, 1.0) == "good"
    with caplog.at_level(logging.WARNING):
        assert judge(guard, loss, norm, step=7) == "bad"
    assert "step 7" in caplog.text
    assert "conversation 3, conversation 4" in caplog.text
    with pytest.raises(TrainingError, match="not finite for 2 steps in a row, 2 of the run in all"):
        judge(guard, loss, norm)


def test_the_count_goes_on_in_another_process() -> None:
    guard = StepGuard(max_bad_steps=3)
    judge(guard, NAN, 1.0)
    judge(guard, 1.0, 1.0)
    judge(guard, NAN, 1.0)
    later = StepGuard(max_bad_steps=3)
    later.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert (later.bad_in_a_row, later.bad_steps) == (1, 2)
    judge(later, NAN, 1.0)
    with pytest.raises(TrainingError, match="for 3 steps in a row, 4 of the run in all"):
        judge(later, NAN, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_scale_moves_as_torchs_grad_scaler(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_STEPS_TO_DOUBLE", 4)
    chance = random.Random(seed)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=4)
    guard = StepGuard(max_bad_steps=1, dtype=torch.float16)
    for _ in range(60):
        overflows = chance.random() < 0.2
        theirs.scale(parameter.sum()).backward()
        assert parameter.grad is not None
        if overflows:
            parameter.grad.fill_(float("inf"))
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        assert judge(guard, 1.0, float("inf") if overflows else 1.0) == ("overflow" if overflows else "good")
        assert guard.scale == theirs.get_scale()


def test_a_scaled_gradient_comes_back_to_the_bit() -> None:
    guard = StepGuard(max_bad_steps=1, dtype=torch.float16)
    parameter = torch.nn.Parameter(torch.zeros(1000))
    torch.manual_seed(0)
    gradient = torch.randn(1000) * 10.0 ** torch.randint(-20, 3, (1000,))
    parameter.grad = gradient * guard.scale
    guard.unscale([parameter, torch.nn.Parameter(torch.zeros(1))])
    assert torch.equal(parameter.grad, gradient)


def test_float16_that_overflows_without_a_scale_left_is_bad() -> None:
    guard = StepGuard(max_bad_steps=9, dtype=torch.float16)
    guard.load_state_dict({**guard.state_dict(), "loss_scale": 2.0})
    assert [judge(guard, 1.0, NAN), judge(guard, 1.0, NAN), judge(guard, NAN, 1.0)] == ["overflow", "bad", "bad"]
    assert (guard.overflows, guard.bad_steps, guard.scale) == (1, 2, 1.0)


def test_the_loss_scale_is_not_doubled_without_end() -> None:
    scale = LossScale(2.0**40, guards._STEPS_TO_DOUBLE - 1)
    scale.count_good()
    assert scale == LossScale(2.0**40, 0)


# --- a run with something that is not finite in it ---------------------------------------------------------------


def spoil_the_loss(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    whole = Trainer._accumulate

    def spoilt(self: Trainer, *args: Any, **more: Any) -> float:
        return whole(self, *args, **more) + (NAN if self.now in steps else 0.0)  # type: ignore[attr-defined]

    monkeypatch.setattr(Trainer, "_accumulate", spoilt)
    note_the_step(monkeypatch)


def spoil_one_gradient(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    whole = Trainer._accumulate

    def spoilt(self: Trainer, *args: Any, **more: Any) -> float:
        summed = whole(self, *args, **more)
        if self.now in steps:  # type: ignore[attr-defined]
            gradient = next(p.grad for p in self.model.parameters() if p.grad is not None)
            gradient.view(-1)[-1] = NAN
        return summed

    monkeypatch.setattr(Trainer, "_accumulate", spoilt)
    note_the_step(monkeypatch)


def note_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers know as `now` which step, from 1, they are at."""
    whole = Trainer.step

    def noted(self: Trainer, step: GlobalStep, **more: Any) -> StepRecord:
        self.now = step.step + 1  # type: ignore[attr-defined]
        return whole(self, step, **more)

    monkeypatch.setattr(Trainer, "step", noted)


def spoil_a_picture(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Picture 7's first number is not finite, whichever steps it comes in."""
    whole = Processor.prepare_image

    def spoilt(self: Processor, image: Any) -> Any:
        prepared = whole(self, image)
        if image.source.name == "7.png":
            pixels = np.array(prepared.pixel_values)
            pixels.reshape(-1)[0] = NAN
            object.__setattr__(prepared, "pixel_values", pixels)
        return prepared

    monkeypatch.setattr(Processor, "prepare_image", spoilt)


@pytest.mark.parametrize("spoil", [spoil_the_loss, spoil_one_gradient, spoil_a_picture])
def test_a_step_that_is_not_finite_is_skipped_counted_and_its_records_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spoil: Any
) -> None:
    spoil(monkeypatch, range(3, 4))
    watcher = Watched()
    out = run_recipe(recipe_of(world, tmp_path / "run"), watcher=watcher).out_dir
    bad = [record for record in watcher.records if record.skipped]
    lines = bad_lines(out)
    assert [line["step"] for line in lines] == [record.step for record in bad]
    assert 1 <= len(bad) <= 2, "an epoch and a half holds a picture once or twice"
    assert all(
        np.isfinite(record.loss) and np.isfinite(record.grad_norm) for record in watcher.records if record not in bad
    )
    assert f"{len(bad)} steps were skipped: not finite" in caplog.text
    for line in lines:
        assert "nan" in (line["loss"], line["grad_norm"])
        assert len(line["records"]) == 4
        if spoil is spoil_a_picture:
            assert any("(record 14)" in record or "(record 15)" in record for record in line["records"])
        else:
            assert line["step"] == 3
    skipped = [line["step"] for line in read_metrics(out / "metrics.jsonl") if line.get("skipped")]
    assert skipped == [line["step"] for line in lines]


def test_a_run_stops_after_so_many_bad_steps_even_when_it_was_interrupted_between_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_the_loss(monkeypatch, range(3, 99))
    recipe = recipe_of(world, tmp_path / "run", "run.max_bad_steps=4")
    with pytest.raises(RunStoppedError):
        run_recipe(recipe, watcher=Watched(stop_after=4))
    with pytest.raises(
        TrainingError, match=r"step 6: loss nan.* for 4 steps in a row, 4 of the run in all \(.*mix.json"
    ):
        run_recipe(recipe)
    assert [line["step"] for line in bad_lines(tmp_path / "run")] == [3, 4, 5, 6]


# --- float16 -----------------------------------------------------------------------------------------------------


def test_float16_trains_as_float32_does(world: Path, tmp_path: Path) -> None:
    half, single = (
        run_recipe(recipe_of(world, tmp_path / dtype, f"run.dtype={dtype}", "optim.learning_rate=1e-3"))
        for dtype in ("float16", "float32")
    )
    for one, other in zip(read_metrics(half.metrics_path), read_metrics(single.metrics_path), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)  # float16 has 11 bits
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-2)


def test_overflowed_steps_are_counted_apart_and_a_resumed_run_scales_as_the_whole_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So high that the first steps overflow; doubled again so soon that later ones do.
    monkeypatch.setattr(LossScale.__init__, "__defaults__", (2.0**22, 0))
    monkeypatch.setattr(guards, "_STEPS_TO_DOUBLE", 2)
    changes = ("run.dtype=float16", "optim.batch_conversations=3")
    whole = Watched()
    run_recipe(recipe_of(world, tmp_path / "whole", *changes), watcher=whole)
    overflowed = [record.step for record in whole.records if record.overflowed]
    assert overflowed[0] == 1
    assert len(overflowed) < len(whole.records)
    assert not (tmp_path / "whole" / "bad_steps.jsonl").exists(), "the data is not to blame"
    for cut in (1, overflowed[-2], overflowed[-2] + 1):
        out = tmp_path / f"cut-{cut}"
        first, second = Watched(stop_after=cut), Watched()
        with pytest.raises(RunStoppedError):
            run_recipe(recipe_of(world, out, *changes), watcher=first)
        run_recipe(recipe_of(world, out, *changes), watcher=second)
        made = [(r.step, r.loss.hex(), r.overflowed) for r in first.records + second.records]
        assert made == [(r.step, r.loss.hex(), r.overflowed) for r in whole.records]
        weights = "model.safetensors"
        assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
