"""`--check`: what it says is what the run does, and it leaves nothing behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import CheckpointError, RecipeError, TrainingError
from llava.train.estimate import Sharding, count_state
from llava.train.metrics import read_metrics
from llava.train.preflight import check_run, plan_run
from llava.train.prepare import prepare_run
from llava.train.recipe import load_recipe, shipped_recipes
from llava.train.run import run_recipe
from llava.train.sections import Recipe
from llava.train.shapes import PackedLinear, find_config, shape_model
from llava.train.stages import describe_stage
from llava.train.throughput import Device, named_device
from tests.train.test_run import make_recipe
from tests.train.test_run import world as world

H100 = named_device("h100")


def names_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_check_of_everything_counts_what_the_run_then_computes(world: Path, tmp_path: Path) -> None:
    recipe = make_recipe(world, tmp_path / "run")
    before = names_under(tmp_path)
    report = check_run(recipe, sample=0)
    assert names_under(tmp_path) == before, "nothing is left behind"
    assert report.counted.is_exact
    assert report.fits
    result = run_recipe(recipe)
    lines = read_metrics(result.metrics_path)
    assert report.counted.steps == result.total_steps
    assert report.counted.work.tokens == sum(line["tokens"] for line in lines)
    assert report.counted.work.answer_tokens == sum(line["answer_tokens"] for line in lines)
    assert report.counted.counted == sum(line["conversations"] for line in lines)
    assert report.hours > 0


def test_a_check_of_a_sample_says_so_and_is_near(world: Path, tmp_path: Path) -> None:
    recipe = make_recipe(world, tmp_path / "run", "optim.epochs=4.0")
    everything, sampled = check_run(recipe, sample=0).counted, check_run(recipe, sample=16).counted
    assert not sampled.is_exact
    assert sampled.counted == 16
    assert sampled.trained == everything.trained == 96
    assert sampled.work.tokens == pytest.approx(everything.work.tokens, rel=0.2)


def test_the_estimate_counts_the_runs_own_weights_gradients_and_moments(world: Path, tmp_path: Path) -> None:
    recipe = make_recipe(world, tmp_path / "run", "run.device=cpu", "run.dtype=float32")
    memory = check_run(recipe).memory["none"]
    prepared = prepare_run(recipe)
    parameters = list(prepared.loaded.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    assert memory.weights == sum(p.nbytes for p in [*parameters, *prepared.loaded.model.buffers()])
    # a step of one micro-batch has no gradient before its activations: the larger of the two counts
    assert memory.gradients in (0, sum(p.nbytes for p in trained))
    prepared.trainer.step(prepared.loader.make(0))
    moments = [t for values in prepared.trainer.optimizer.state.values() for t in values.values()]
    assert memory.optimizer == sum(t.nbytes for t in moments)


def test_recomputing_needs_less_and_what_does_not_fit_is_said(world: Path, tmp_path: Path) -> None:
    recipe = make_recipe(world, tmp_path / "run")
    report = check_run(recipe, on=Device("toy", 1.0, 1 << 20))
    none, selective, full = (report.memory[mode].activations for mode in ("none", "selective", "full"))
    assert none > selective > full
    assert report.chosen == "full"
    assert not report.fits
    assert check_run(recipe, on=H100).chosen == "none"


def test_a_check_leaves_the_files_of_an_earlier_run_alone(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    before = names_under(tmp_path) | {"recipe.yaml"}
    check_run(make_recipe(world, out))
    assert names_under(tmp_path) == before
    assert (out / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_place_that_cannot_be_written_to_is_found_before_the_run(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write there"):
        check_run(make_recipe(world, tmp_path / "run", f"run.out={tmp_path}/file/run"), sample=1)


def test_a_full_disk_is_found_before_the_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(TrainingError, match=r"needs 0\.1 GB, 0\.0 GB are free; free some space"):
        check_run(make_recipe(world, tmp_path / "run"))


def test_a_model_that_is_not_there_is_one_clear_line(world: Path, tmp_path: Path) -> None:
    recipe = make_recipe(world, tmp_path / "run", "model={path: /nowhere/model}")
    with pytest.raises(CheckpointError, match="/nowhere/model: no such folder"):
        check_run(recipe)
    with pytest.raises(CheckpointError, match=r"/nowhere/model"):
        plan_run(recipe, on=H100)


# --- from configurations alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["tune.language_model=frozen"],
        ["tune.language_model=last_layers", "tune.language_model_layers=1"],
        ["tune.language_model=lora", "tune.vision_tower=lora"],
        ["tune.vision_tower=full"],
    ],
    ids=["full", "frozen", "last layers", "lora", "tower"],
)
def test_shapes_alone_give_the_real_models_table_and_bytes(world: Path, tmp_path: Path, changes: list[str]) -> None:
    recipe = make_recipe(world, tmp_path / "run", "run.dtype=bfloat16", *changes)
    prepared = prepare_run(recipe)
    model, summaries = shape_model(recipe)
    assert describe_stage(summaries) == describe_stage(prepared.summaries)
    made, real = (count_state(m, dtype=torch.bfloat16) for m in (model, prepared.loaded.model))
    assert made == real


def test_nf4_is_counted_without_bitsandbytes(world: Path, tmp_path: Path) -> None:
    recipe = make_recipe(world, tmp_path / "run", "tune.language_model=qlora")
    model, summaries = shape_model(recipe)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 2 * 7  # two blocks of a Llama
    for layer in packed:
        count = layer.in_features * layer.out_features
        # half a byte a number, one for 64, four for 256 of these: 4.127 bits in large layers
        assert layer.weight.nbytes == count // 2 + -(-count // 64) + 4 * -(-count // (64 * 256))
    row = describe_stage(summaries)[2]
    assert row[1] == "qlora"
    assert "nf4" in row[6]
    memory = plan_run(recipe, on=H100).memory
    assert memory["full"].total <= memory["none"].total
    assert memory["none"].gradients < memory["none"].weights


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if not name.startswith("quickstart")])
def test_every_shipped_recipe_can_be_planned_with_nothing_downloaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of all of them are known by name, or by the recipe that they start from."""
    import huggingface_hub

    def refuse(*args: Any, **more: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    config = find_config(load_recipe(name).model)
    assert config.text_width >= 3072
    assert config.features_per_tile >= 256


def test_a_recipe_that_starts_from_anothers_run_has_its_parts() -> None:
    config = find_config(load_recipe("llava-v1.5-7b-instruct").model)
    assert config.text_width == 4096
    assert config.image_mode == "pad"
    assert find_config(load_recipe("llava-v1.6-7b-instruct").model).image_mode == "anyres"


def test_a_downloaded_config_is_taken_before_what_is_known(tmp_path: Path) -> None:
    folder = tmp_path / "vicuna-7b-v1.5"
    folder.mkdir()
    values = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    (folder / "config.json").write_text(json.dumps(values))
    recipe = load_recipe("llava-v1.5-7b-align", [f"model.language_model={folder}"])
    assert find_config(recipe.model).text_width == 64


def test_processes_share_what_their_mode_says(world: Path, tmp_path: Path) -> None:
    recipe = make_recipe(world, tmp_path / "run")
    assert plan_run(recipe, on=H100, processes=4).sharding == Sharding("ddp", 4)
    shared = Recipe.model_validate(
        {**recipe.model_dump(), "run": {**recipe.run.model_dump(), "parallel": "zero3", "cpu_offload": True}}
    )
    one, four = plan_run(shared, on=H100), plan_run(shared, on=H100, processes=4)
    assert four.hours == pytest.approx(one.hours / 4)
    assert four.memory["none"].weights == 0
    assert four.memory["none"].host == pytest.approx(
        sum(getattr(one.memory["none"], name) for name in ("weights", "gradients", "optimizer")) / 4, rel=0.01
    )


def test_a_run_without_a_folder_is_refused(world: Path, tmp_path: Path) -> None:
    recipe = make_recipe(world, tmp_path / "run")
    nameless = recipe.model_copy(update={"run": recipe.run.model_copy(update={"out": None})})
    with pytest.raises(RecipeError, match=r"run\.out is missing"):
        check_run(nameless)
