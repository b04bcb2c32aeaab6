"""`llava train --check` and `--resume`, as typed."""

import re
from pathlib import Path

import pytest
import torch

from llava.cli.main import main
from llava.train.throughput import DEVICES, Device
from tests.train.test_run import make_recipe
from tests.train.test_run import world as world


def call(*arguments: str) -> int:
    """The exit code of `llava train ARGUMENTS`."""
    return main(["train", *arguments])


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> str:
    make_recipe(world, tmp_path / "run")
    return str(tmp_path / "recipe.yaml")


def test_a_check_says_what_learns_what_it_counts_memory_hours_and_disk(
    recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(recipe, "--check", "--sample", "0") == 0
    said = capsys.readouterr().out
    for wanted in ("language_model", "24 conversations, 6 steps; counted over all 48", "TFLOP/s measured", "none *"):
        assert wanted in said
    for wanted in ("optimizer", "Memory: fits, with none", "Time: ", "Disk: ", "read back and taken away again"):
        assert wanted in said
    assert said.rstrip().endswith("all well; nothing was trained")
    assert not (tmp_path / "run").exists()


def test_a_check_for_other_devices_needs_neither_weights_nor_data(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(recipe, "data.files=[none.json]", "--check", "--shapes", "--on", "4090", "--devices", "2") == 0
    said = capsys.readouterr().out
    assert "2 x 4090 (165 TFLOP/s by its data sheet, 24 GiB), float32, ddp" in said
    assert "assumed: no data known by these names" in said
    assert re.search(r"Time: .* at 40% of 2 x 165 TFLOP/s", said)


def test_what_does_not_fit_is_said_with_what_helps(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEVICES, "toy", Device("toy", 1.0, 1 << 20))
    assert call(recipe, "--check", "--shapes", "--on", "toy") == 1
    said = capsys.readouterr().out
    assert "does NOT fit" in said
    assert "run.micro_batch_tokens" in said
    assert "all well" not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--check", "--on", "h10"], "did you mean 'h100'"),
        (["--check", "--shapes", "run.device=cpu"], "name the device to reckon for with --on"),
        (["--on", "h100"], "go with --check"),
        (["--resume"], "nothing to resume"),
        (["--resume", "--restart"], "give one of them"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_is_one_line(
    recipe: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(recipe, *arguments) == 2
    said = capsys.readouterr().err.strip()
    assert says in said
    assert "\n" not in said


def test_resume_goes_on_where_there_is_a_run(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--resume"]):
        main(["train", recipe, "optim.max_steps=1", *options])
    assert "finished already" in capsys.readouterr().out


def test_a_device_out_of_memory_is_a_line_with_what_helps(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("llava.train.run.run_recipe", fail)
    assert call(recipe) == 2
    said = capsys.readouterr().err.strip()
    assert "lower run.micro_batch_tokens (now 16384)" in said
    assert "\n" not in said
