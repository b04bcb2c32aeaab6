"""Runs on several processes: from the command line, stopped and gone on with by another number, ended by a fault."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.checkpoint.load import load
from llava.cli.main import main
from llava.train.launch import ECHO, _summarise
from llava.train.metrics import read_metrics
from tests.train.process_pair import ProcessPair
from tests.train.run_cases import TOTAL_STEPS, Part, run_part, write_world

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The run of one process that nothing interrupts."""
    out = recipe.parent / "whole"
    assert run_part(Part(recipe, out))["ended"] == "finished"
    return out


def assert_same_run(out: Path, whole: Path) -> None:
    lines, wanted = (read_metrics(folder / "metrics.jsonl") for folder in (out, whole))
    assert [line["step"] for line in lines] == list(range(1, TOTAL_STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in wanted], rel=1e-5)
    for count in ("tokens", "answer_tokens", "conversations"):
        assert [line[count] for line in lines] == [line[count] for line in wanted]
    weights, expected = (load_file(folder / "model.safetensors") for folder in (out, whole))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3"])
def test_a_run_goes_on_with_another_number_of_processes_in_the_same_order(
    recipe: Path, whole: Path, pair: ProcessPair, tmp_path: Path, mode: str
) -> None:
    out = tmp_path / "run"
    seen: dict[int, tuple[int, ...]] = {}
    first = run_part(Part(recipe, out, stop_after=2))
    seen |= first["seen"]
    assert "stopped after step 2" in first["ended"]
    # the signal comes to the process that does not write; both stop after the same step
    middle, other = pair.run(run_part, Part(recipe, out, (f"run.parallel={mode}",), stop_after=4, stopped=1))
    assert middle["ended"] == other["ended"]
    assert "stopped after step 4" in middle["ended"]
    assert middle["seen"] == other["seen"], "every process knows the whole step's conversations"
    assert not set(seen) & set(middle["seen"]), "no step is taken twice"
    seen |= middle["seen"]
    last = run_part(Part(recipe, out))
    assert last["ended"] == "finished"
    seen |= last["seen"]
    undisturbed = run_part(Part(recipe, tmp_path / "again"))["seen"]
    assert seen == undisturbed
    assert_same_run(out, whole)


def test_a_run_goes_on_with_the_weights_spread_in_another_way(
    recipe: Path, whole: Path, pair: ProcessPair, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for mode, stop in (("zero3", 2), ("ddp", 3), ("zero2", None)):
        ended = [part["ended"] for part in pair.run(run_part, Part(recipe, out, (f"run.parallel={mode}",), stop))]
        assert all(("finished" if stop is None else f"stopped after step {stop}") in text for text in ended)
    assert_same_run(out, whole)
    assert load(out, device="cpu", dtype="float32").processor.template.name == "llava_hf"


def test_dropout_draws_the_same_after_a_stop(recipe: Path, pair: ProcessPair, tmp_path: Path) -> None:
    lora = "tune={language_model: lora, language_model_lora: {rank: 4, dropout: 0.5}}"
    for changes in ((lora, "run.parallel=ddp"), (lora, "run.parallel=zero3")):
        name = changes[1].partition("=")[2]
        whole = pair.run(run_part, Part(recipe, tmp_path / f"{name}-whole", changes))[0]
        cut = tmp_path / f"{name}-cut"
        assert "stopped" in pair.run(run_part, Part(recipe, cut, changes, stop_after=3))[0]["ended"]
        resumed = pair.run(run_part, Part(recipe, cut, changes))[0]
        losses = [[float(line["loss"]).hex() for line in part["lines"]] for part in (whole, resumed)]
        assert losses[0] == losses[1]
    without = run_part(Part(recipe, tmp_path / "without", (lora.replace("0.5", "0.0"), "optim.max_steps=2")))["lines"]
    assert without[1]["loss"] != whole["lines"][1]["loss"], "nothing was dropped"


def test_sample_answers_are_given_by_one_process_and_refused_where_none_has_the_model(
    recipe: Path, pair: ProcessPair, tmp_path: Path
) -> None:
    picture = recipe.parent / "images" / "0.png"
    changes = (f"run.sample_images=[{picture}]", "run.sample_every=3")
    out = tmp_path / "ddp"
    for part in pair.run(run_part, Part(recipe, out, (*changes, "run.parallel=ddp"))):
        assert part["ended"] == "finished"
    steps = [json.loads(line)["step"] for line in (out / "samples.jsonl").read_text().splitlines()]
    assert steps == [0, 3, 6]
    for part in pair.run(run_part, Part(recipe, tmp_path / "zero", (*changes, "run.parallel=zero3"))):
        assert part["ended"].startswith("RecipeError: run.sample_every: under zero3 no process holds the whole model")


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_recomputed_activations_change_nothing(
    recipe: Path, whole: Path, pair: ProcessPair, tmp_path: Path, mode: str
) -> None:
    changes = (f"run.parallel={mode}", "run.activation_checkpointing=full", "run.micro_batch_tokens=64")
    for part in pair.run(run_part, Part(recipe, tmp_path / "run", changes)):
        assert part["ended"] == "finished"
    assert_same_run(tmp_path / "run", whole)


def test_offloading_without_anything_to_offload_from_is_refused(recipe: Path, tmp_path: Path) -> None:
    ended = run_part(Part(recipe, tmp_path / "run", ("run.cpu_offload=true",)))["ended"]
    assert ended.startswith("RecipeError: run.cpu_offload goes with several processes")


def test_devices_on_the_command_line_start_as_many_processes(recipe: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", str(recipe), "--out", str(out), "--devices", "2"]) == 0
    assert_same_run(out, whole)
    assert json.loads((out / "run.json").read_text())["state"] == "finished"


def test_devices_and_a_launcher_that_started_others_contradict_each_other(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert main(["train", str(recipe), "--out", str(tmp_path / "run"), "--devices", "2"]) == 2
    assert "--devices 2, but 4 processes were started here already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([2, ECHO], 2),
        ([ECHO, 1], 1),
        ([130, 130], 130),
        ([-signal.SIGTERM, 130], 130),
        ([-signal.SIGKILL, 2], 1),
    ],
)
def test_one_exit_code_stands_for_all(codes: list[int], code: int) -> None:
    assert _summarise(codes) == code


# --- faults: real processes, 10 to 20 s each -----------------------------------------------------------------------


def start(recipe: Path, out: Path, fault: str) -> subprocess.Popen[str]:
    """A launcher of two processes with a fault in them."""
    arguments = ["train", str(recipe), "--out", str(out)]
    code = f"import sys; from llava.train.launch import launch; sys.exit(launch({arguments!r}, processes=2, "
    return subprocess.Popen(
        [sys.executable, "-c", code + "module='tests.train.faulty_llava'))"],
        cwd=ROOT,
        env={**os.environ, "LLAVA_TEST_FAULT": fault, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(out / "metrics.jsonl")) < step:
        assert time.monotonic() < deadline, "no step is taken"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        ("raise:1:3", 2, "llava train: process 1 of 2: mix.json:3: it cannot be read any more; put it back"),
        ("raise:0:3", 2, "llava train: process 0 of 2: mix.json:3: it cannot be read any more; put it back"),
        ("crash:1:2", 1, "ZeroDivisionError: a bug of ours"),
        ("kill:1:3", 1, "llava: process 1 was ended by SIGKILL"),
        ("kill:0:3", 1, "llava: process 0 was ended by SIGKILL"),
    ],
)
def test_one_process_that_fails_ends_all_with_its_own_message(
    recipe: Path, tmp_path: Path, fault: str, code: int, says: str
) -> None:
    with start(recipe, tmp_path / "run", fault) as launcher:
        _, told = launcher.communicate(timeout=60)  # the others are killed at last, 20 s after the fault
    assert launcher.returncode == code, told
    assert says in told
    assert told.count("Traceback") == (1 if fault.startswith("crash") else 0), told
    if fault.startswith("raise"):
        assert sum("llava train:" in line for line in told.splitlines()) == 1, told


@pytest.mark.slow
def test_a_signal_to_the_launcher_finishes_the_step_and_saves(recipe: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher = start(recipe, out, "wait:0:0")
    wait_for_step(out, 2)
    launcher.send_signal(signal.SIGINT)
    _, told = launcher.communicate(timeout=120)
    assert launcher.returncode == 130, told
    assert told.count("llava train: stopped") == 1, told
    assert list((out / "checkpoints").glob("step-*"))
    assert run_part(Part(recipe, out))["ended"] == "finished"
    assert_same_run(out, whole)


@pytest.mark.slow
def test_processes_do_not_outlive_a_launcher_that_is_killed(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher = start(recipe, out, "wait:0:0")
    wait_for_step(out, 1)
    launcher.kill()
    launcher.communicate(timeout=120)  # their end of the pipe closes when the last of them has ended
    assert list((out / "checkpoints").glob("step-*")), "they took it for a wish to stop, and saved"
