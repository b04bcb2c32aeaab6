"""Trackers: the numbers of metrics.jsonl, by name, each imported only when named."""

import sys
import types
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from llava.errors import MissingExtraError
from llava.train.progress import RunInfo, Sample
from llava.train.run import RunStoppedError, run_recipe
from llava.train.trackers import TrackerWatcher, require_trackers, run_id
from tests.train.test_metrics import record
from tests.train.test_run import StopAfter, losses, make_recipe
from tests.train.test_run import world as world


class Calls:
    """Stands for a tracker's module and for whatever its functions return; notes every call."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **more: Any) -> Calls:
            self.made.append((name, args, more))
            return self

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, more) for called, args, more in self.made if called == name]


def inject(monkeypatch: pytest.MonkeyPatch, name: str) -> Calls:
    """A package of this name that is not there, as a module whose functions note their calls."""
    calls = Calls()
    module = types.ModuleType(name)
    module.__getattr__ = lambda attribute: getattr(calls, attribute)  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def info(out_dir: Path, *, first_step: int = 0) -> RunInfo:
    return RunInfo(out_dir, [], total_steps=9, first_step=first_step, conversations=3, device="cpu", dtype="float32")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(util, "find_spec", lambda package: None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(MissingExtraError, match=rf"run\.track: {name} needs .*pip install 'llava\[track\]'"):
        run_recipe(make_recipe(world, tmp_path / "run", f"run.track=[{name}]"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "said before anything is loaded or trained"


def test_none_is_imported_when_none_is_named(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "wandb", "trackio", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    require_trackers([])
    run_recipe(make_recipe(world, tmp_path / "run", "optim.max_steps=1"))


def test_weights_and_biases_gets_every_step_and_the_recipe(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = inject(monkeypatch, "wandb")
    run_recipe(make_recipe(world, tmp_path / "run", "run.track=[wandb]", "optim.max_steps=3"))
    ((_, settings),) = wandb.named("init")
    assert settings["project"] == "llava"
    assert settings["config"]["optim"]["max_steps"] == 3
    logged = wandb.named("log")
    assert [more["step"] for _, more in logged] == [1, 2, 3]
    assert [args[0]["train/loss"] for args, _ in logged] == losses(tmp_path / "run")
    assert all(isinstance(value, float) for args, _ in logged for value in args[0].values())
    assert {"train/mfu", "train/memory_gib", "train/tokens_per_second", "train/supervised_share"} <= set(
        logged[0][0][0]
    )
    assert len(wandb.named("finish")) == 1


def test_trackio_gets_every_step_and_the_answers(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = inject(monkeypatch, "trackio")
    changes = ("run.track=[trackio]", "optim.max_steps=2", f"run.sample_images=[{world}/images/0.png]")
    run_recipe(make_recipe(world, tmp_path / "run", *changes, "run.sample_every=2", "run.sample_questions=['Colour?']"))
    logged = [args[0] for args, _ in trackio.named("log")]
    assert sum("train/loss" in values for values in logged) == 2
    assert [list(values) for values in logged if "train/loss" not in values] == [["samples/0.png: Colour?"]] * 2
    assert len(trackio.named("finish")) == 1


def test_a_resumed_run_goes_on_under_its_id(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = inject(monkeypatch, "wandb")
    recipe = make_recipe(world, tmp_path / "run", "run.track=[wandb]", "optim.max_steps=4")
    with pytest.raises(RunStoppedError):
        run_recipe(recipe, watcher=StopAfter(2))
    run_recipe(recipe)
    (_, first), (_, second) = wandb.named("init")
    assert first["id"] == second["id"]
    assert [more["step"] for _, more in wandb.named("log")] == [1, 2, 3, 4]
    assert run_id(info(tmp_path / "run")) != first["id"], "a run that begins anew is another one"


def test_only_logged_steps_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = inject(monkeypatch, "trackio")
    watcher = TrackerWatcher(["trackio"], config={}, every=4)
    watcher.started(info(tmp_path))
    for step in range(1, 10):
        watcher.stepped(record(step))
    assert [more["step"] for _, more in trackio.named("log")] == [4, 8, 9], "and the last"


def test_a_tracker_that_cannot_write_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trackio = inject(monkeypatch, "trackio")
    watcher = TrackerWatcher(["trackio"], config={})
    watcher.started(info(tmp_path))

    def fail(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["trackio"], "log", fail, raising=False)
    watcher.stepped(record(1))
    watcher.stepped(record(2))
    assert trackio.named("log") == []
    assert caplog.text.count("No space left") == 1


def test_a_step_that_is_not_finite_is_told_without_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = inject(monkeypatch, "trackio")
    watcher = TrackerWatcher(["trackio"], config={})
    watcher.started(info(tmp_path))
    watcher.stepped(record(1, float("nan"), skipped=True))
    ((values,), _) = trackio.named("log")[0]
    assert "train/loss" not in values
    assert values["train/skipped"] == 1.0


@pytest.mark.skipif(util.find_spec("tensorboard") is None, reason="tensorboard is not installed (extra `track`)")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_files_hold_the_losses_and_drop_what_a_resume_repeats(world: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe(world, tmp_path / "run", "run.track=[tensorboard]", "optim.max_steps=4")
    with pytest.raises(RunStoppedError):
        run_recipe(recipe, watcher=StopAfter(2))
    run_recipe(recipe)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(tmp_path / "run"))


@pytest.mark.skipif(util.find_spec("tensorboard") is None, reason="tensorboard is not installed (extra `track`)")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_answers_are_in_tensorboard_as_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watcher = TrackerWatcher(["tensorboard"], config={"run": 1})
    watcher.started(info(tmp_path))
    watcher.sampled(Sample(3, Path("cat.png"), "What?", "a cat"))
    watcher.ended()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert any("cat.png" in tag for tag in events.Tags()["tensors"])
