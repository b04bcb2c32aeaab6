"""How a model writes boxes stands in its config.json, and goes wherever the model goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import llava
from llava.checkpoint.huggingface import save
from llava.cli.main import main
from llava.prompt.boxes import BoxFormat

FORM = {"scale": 1000, "frame": "picture"}


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counting") / "model"
    shutil.copytree(model, folder)
    block = llava.load(model, device="cpu").model.config.to_dict()["llava"] | {"boxes": FORM}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "llava": block}))
    return folder


def form(folder: Path) -> BoxFormat:
    return BoxFormat.of(llava.load(folder, device="cpu").model.config.extra)


@pytest.mark.parametrize("layout", ["hf", "original", "xtuner"])
def test_it_survives_conversion_there_and_back(folder: Path, tmp_path: Path, layout: str) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["convert", str(folder), str(there), "--to", layout]) == 0
    assert main(["convert", str(there), str(back), "--to", "hf"]) == 0
    assert form(there) == form(back) == BoxFormat(1000, "picture")


def test_it_survives_being_saved(folder: Path, tmp_path: Path) -> None:
    loaded = llava.load(folder, device="cpu")
    save(loaded.model, loaded.processor, tmp_path / "saved")
    assert form(tmp_path / "saved") == BoxFormat(1000, "picture")
