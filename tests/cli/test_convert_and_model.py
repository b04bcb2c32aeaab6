"""`llava convert` and `llava model show`, as typed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import llava
from llava.checkpoint.known_models import KNOWN_MODELS
from llava.cli.main import main

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoints"
LORA = str(GOLDEN / "e_lora" / "llava-v1.5-tiny-lora")
WHOLE = str(GOLDEN / "b_v0" / "llava-tiny-v0")
DELTA = str(GOLDEN / "f_delta" / "delta_llava-tiny-v0")


@pytest.fixture(autouse=True)
def _in_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN / "bases")


def test_convert_prints_what_was_compared_and_the_measured_peak(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", LORA, str(tmp_path / "out"), "--base", "vicuna-tiny-v1.5", "--merge-lora", "--to", "hf"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "80 tensors re-opened and equal to their source" in printed
    assert "peak memory" in printed and "largest tensor" in printed
    assert llava.load(tmp_path / "out", device="cpu").report.format == "huggingface llava"


def test_a_delta_is_added_made_and_a_projector_taken_out(tmp_path: Path) -> None:
    assert main(["convert", "--delta", DELTA, "--base", "llama-tiny", str(tmp_path / "sum")]) == 0
    assert main(["convert", WHOLE, str(tmp_path / "delta"), "--make-delta", "--base", "llama-tiny"]) == 0
    assert main(["convert", WHOLE, str(tmp_path / "projector"), "--extract-projector"]) == 0
    assert (tmp_path / "projector" / "mm_projector.bin").is_file()
    assert llava.load(tmp_path / "delta", base="llama-tiny", device="cpu").report.format == "original"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([LORA, "OUT"], "name the model it was trained on"),
        ([WHOLE], "takes two folders, got 1"),
        ([WHOLE, "OUT", "--to", "ggml"], "Known: gguf, hf"),
        ([WHOLE, "OUT", "--dtype", "float8"], "Known: bfloat16, float16, float32"),
        (["nowhere", "OUT"], "no such folder"),
        (["--delta", DELTA, "OUT"], "--base FOLDER"),
        ([WHOLE, "OUT", "--make-delta"], "--base FOLDER"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *[str(tmp_path / a) if a == "OUT" else a for a in arguments]]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_show_says_what_a_folder_is_and_what_decided_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "show", WHOLE, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["format"], about["template"], about["projector"]) == ("original", "llava_v0", "linear")
    assert {
        "what": "image mode",
        "value": "crop",
        "because": "config.json: no image_aspect_ratio, which means 'square'",
    } in about["decisions"]
    assert main(["model", "show", WHOLE]) == 0
    assert "linear (config.json: no mm_projector_type" in capsys.readouterr().out


def test_show_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    assert main(["model", "show", LORA]) == 2
    assert "MISSING" in capsys.readouterr().out
    folder = tmp_path / "damaged"
    shutil.copytree(GOLDEN / "g_mpt" / "llava-mpt-tiny", folder)
    state = load_file(folder / "model.safetensors")
    del state["transformer.norm_f.weight"]
    save_file(state, folder / "model.safetensors")
    assert main(["model", "show", str(folder)]) == 2
    assert "missing: 'transformer.norm_f.weight' of shape [64]" in capsys.readouterr().out


def test_the_list_names_published_models_and_those_here(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["model", "list"]) == 0
    printed = capsys.readouterr().out
    assert "here: none" in printed
    for known in KNOWN_MODELS:
        row = next(line for line in printed.splitlines() if known.name in line.split())
        assert known.template in row and known.needs in row
    for name in ("llava-quickstart/model", "runs/mine"):
        shutil.copytree(model, tmp_path / name)
    (tmp_path / "runs" / "begun").mkdir()
    assert main(["model", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["path"] for one in listed["here"]] == ["llava-quickstart/model", "runs/mine"]
    assert listed["here"][0]["template"] == "llava_hf"
    assert len(listed["known"]) == len(KNOWN_MODELS)
