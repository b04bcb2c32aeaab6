"""Checkpoints: whole or not there, verified, and bit-exact."""

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import llava.train.state as state_module
from llava.data.loader import GlobalStep, Layout, lay_out
from llava.errors import TrainingError
from llava.model.llava import Llava
from llava.train.loop import Trainer
from llava.train.sections import OptimSection, TuneSection
from llava.train.stages import apply_stage
from llava.train.state import (
    collect_generators,
    collect_tensors,
    list_checkpoints,
    load_newest,
    restore_generators,
    restore_tensors,
    save_state,
    seed_generators,
)
from tests.train.tiny_training import IMAGE_ID, grow, make_mixed_conversations

CPU = torch.device("cpu")


def save(root: Path, step: int, *, keep: int = 9) -> Path:
    return save_state(root, step, tensors={"x": torch.full((3,), float(step))}, facts={"note": step}, keep=keep)


def test_the_newest_checkpoint_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 9)
    save(tmp_path, 10)
    found = load_newest(tmp_path)
    assert found is not None
    assert (found.step, found.facts["note"]) == (10, 10)
    assert found.tensors["x"].tolist() == [10.0] * 3


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "none") is None


def test_old_checkpoints_go_only_after_the_new_one_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000002"]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
    ids=["flipped", "cut", "emptied", "missing"],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, name: str, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / name)
    found = load_newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "damaged-step-00000002" in caplog.text
    assert (tmp_path / "damaged-step-00000002").is_dir()


def test_a_half_written_checkpoint_is_not_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    partial = tmp_path / ".step-00000002.partial"
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    found = load_newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert not partial.exists()


@pytest.mark.parametrize("call", range(8))
def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_rubbish(
    tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    calls = 0
    whole = state_module.sync_path

    def failing(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        whole(path)

    monkeypatch.setattr(state_module, "sync_path", failing)
    if call < 5:
        with pytest.raises(TrainingError, match=r"could not be written .No space left on device"):
            save(tmp_path, 2)
    else:
        save(tmp_path, 2)
    monkeypatch.undo()
    found = load_newest(tmp_path)
    assert found is not None
    # The fifth flush comes after the rename: the new checkpoint is whole then.
    assert found.step == (1 if call < 4 else 2)
    assert not list(tmp_path.glob(".*partial"))


def test_all_is_on_the_disk_before_it_is_named_and_named_on_the_disk_before_anything_old_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut needs, and a kill cannot show."""
    save(tmp_path, 1, keep=1)
    done: list[tuple[str, str]] = []
    for name in ("fsync", "rename"):
        whole = getattr(os, name)

        def noted(what: int | Path, *rest: object, name: str = name, whole: Callable[..., None] = whole) -> None:
            path = Path(f"/proc/self/fd/{what}").readlink() if isinstance(what, int) else Path(what)
            done.append((name, str(path.relative_to(tmp_path))))
            whole(what, *rest)

        monkeypatch.setattr(os, name, noted)
    save(tmp_path, 2, keep=1)
    partial = ".step-00000002.partial"
    assert sorted(done[:3]) == [
        ("fsync", f"{partial}/{file}") for file in ("manifest.json", "state.json", "state.safetensors")
    ]
    assert done[3:] == [("fsync", partial), ("rename", partial), ("fsync", "."), ("rename", "step-00000001")]


def test_a_replacement_that_was_interrupted_is_undone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.replaced")
    found = load_newest(tmp_path)
    assert found is not None
    assert found.step == 1
    save(tmp_path, 1)
    (tmp_path / ".step-00000001.replaced").mkdir()  # the new one was in place already
    assert load_newest(tmp_path) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_an_old_checkpoint_whose_removal_was_interrupted_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (tmp_path / ".step-00000001.old").mkdir()
    load_newest(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_when_every_checkpoint_is_damaged_the_run_does_not_begin_anew_in_silence(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_bit(save(tmp_path, step) / "state.safetensors")
    for _ in range(2):
        with pytest.raises(
            TrainingError, match="no whole checkpoint is left, only damaged-step-00000001, damaged-step"
        ):
            load_newest(tmp_path)


def test_every_generator_goes_on_where_it_was() -> None:
    seed_generators(3)
    random.gauss(0, 1)
    np.random.standard_normal()
    saved = collect_generators(CPU)

    def draw() -> list[float]:
        return [
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),
            np.random.random(),
            torch.rand(()).item(),
        ]

    first = draw()
    assert draw() != first
    restore_generators(saved, CPU)
    assert draw() == first


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 1)
    assert json.loads((folder / "state.json").read_text())["step"] == 1


def make_run(build: Callable[..., Llava]) -> Trainer:
    model = build(dropout=0.2)
    apply_stage(model, TuneSection(language_model="full"))
    return Trainer(model, optim=OptimSection(learning_rate=3e-3), total_steps=8, dtype=torch.float32)


def make_step(number: int) -> GlobalStep:
    batches = lay_out(grow(make_mixed_conversations(number)), Layout(40, 40, 80, IMAGE_ID, 0))
    return GlobalStep(number, 0.0, (), tuple(batches), 0)


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    tmp_path: Path, tiny_llava: Callable[..., Llava], cut: int
) -> None:
    whole = make_run(tiny_llava)
    torch.manual_seed(7)
    expected = [whole.step(make_step(n)).loss.hex() for n in range(8)]

    first = make_run(tiny_llava)
    torch.manual_seed(7)
    losses = [first.step(make_step(n)).loss.hex() for n in range(cut)]
    tensors = collect_tensors(first.model, first.optimizer, CPU)
    save_state(tmp_path, cut, tensors=tensors, facts={}, keep=1)

    second = make_run(tiny_llava)
    torch.manual_seed(12345)
    saved = load_newest(tmp_path)
    assert saved is not None
    restore_tensors(saved.tensors, second.model, second.optimizer, CPU)
    losses += [second.step(make_step(n)).loss.hex() for n in range(cut, 8)]
    assert losses == expected
    for (name, left), (_, right) in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(left, right), name


def test_a_checkpoint_of_other_trained_weights_is_refused(tiny_llava: Callable[..., Llava]) -> None:
    trainer = make_run(tiny_llava)
    tensors = collect_tensors(trainer.model, trainer.optimizer, CPU)
    apply_stage(trainer.model, TuneSection())
    with pytest.raises(TrainingError, match="holds other trained weights than this run: language_model"):
        restore_tensors(tensors, trainer.model, trainer.optimizer, CPU)
