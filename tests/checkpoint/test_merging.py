"""`llava model merge`: one model of adapters and base, which answers as they did."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.checkpoint.merging import merge
from llava.cli.main import main
from llava.errors import CheckpointError
from llava.train.run import run_recipe
from tests.train.test_adapter_runs import LORA, TOWER_LORA, make_recipe, make_world


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with LoRA on language model and tower."""
    folder = tmp_path_factory.mktemp("merging")
    return run_recipe(make_recipe(make_world(folder / "world"), folder / "run", *LORA, *TOWER_LORA)).out_dir


def test_a_merged_folder_scores_as_base_and_adapters(run_folder: Path, tmp_path: Path) -> None:
    report = merge(run_folder, tmp_path / "whole", dtype="float32", device="cpu")
    assert report.difference < 1e-5 * report.largest_score
    assert report.same_choices == report.num_positions
    # the oracle: W + B @ A * alpha / rank in float64, from the files alone
    whole, adapter = (
        load_file(tmp_path / "whole/model.safetensors"),
        load_file(run_folder / "adapter_model.safetensors"),
    )
    base = load_file(run_folder.parent / "world/language_model/model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    wanted = base[f"{name}.weight"].double() + (8 / 4) * b @ a
    torch.testing.assert_close(whole[f"language_model.{name}.weight"].double(), wanted, rtol=0, atol=1e-7)


def test_a_merged_model_is_written_in_the_bases_format_unless_told(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(run_folder, tmp_path / "whole", dtype="bfloat16", device="cpu")
    assert {value.dtype for value in load_file(tmp_path / "whole/model.safetensors").values()} == {torch.bfloat16}
    assert main(["model", "merge", str(run_folder), "--out", str(tmp_path / "other")]) == 0
    assert {value.dtype for value in load_file(tmp_path / "other/model.safetensors").values()} == {torch.float32}
    assert "the same best token at" in capsys.readouterr().out


def test_a_whole_model_has_nothing_to_merge(run_folder: Path, tmp_path: Path) -> None:
    merge(run_folder, tmp_path / "whole", device="cpu")
    with pytest.raises(CheckpointError, match="holds no adapter beside a base"):
        merge(tmp_path / "whole", tmp_path / "again")


def test_a_merge_that_scores_otherwise_leaves_nothing(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava.checkpoint import merging

    def damaging(source: Path, target: Path, **options: object) -> object:
        report = merging.__dict__["_convert"](source, target, **options)
        tensors = load_file(target / "model.safetensors")
        tensors["language_model.model.layers.0.mlp.down_proj.weight"] *= -3
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        return report

    monkeypatch.setattr(merging, "_convert", merging.convert, raising=False)
    monkeypatch.setattr(merging, "convert", damaging)
    with pytest.raises(CheckpointError, match="more than rounding to float32 explains"):
        merge(run_folder, tmp_path / "whole", dtype="float32", device="cpu")
    assert not (tmp_path / "whole").exists()
