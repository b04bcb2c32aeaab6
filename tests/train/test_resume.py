"""A run goes on only as the run that it was: what may change, what may not, and one run a folder."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from llava.checkpoint.load import load
from llava.errors import LlavaError, TrainingError
from llava.train import resume
from llava.train.journal import read_lines
from llava.train.loop import StepRecord
from llava.train.progress import Watcher
from llava.train.recipe import load_recipe
from llava.train.resume import FREE_TO_CHANGE, differences, digest_tensor, held_folder
from llava.train.run import RunResult, RunStoppedError, run_recipe
from llava.train.sections import Recipe
from tests.train.kill_server import write_world


class StopAfter(Watcher):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, record: StepRecord) -> None:
        if record.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def recipe_of(world: Path, *changes: str) -> Recipe:
    return load_recipe(world / "recipe.yaml", [f"run.out={world}/run", *changes])


def stop_early(recipe: Recipe) -> None:
    with pytest.raises(RunStoppedError):
        run_recipe(recipe, watcher=StopAfter(1))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with a run in it that was stopped after its first step."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    stop_early(recipe_of(folder))
    return folder


@pytest.fixture
def own(world: Path, tmp_path: Path) -> Path:
    """A copy of the world, to damage, with a run that was stopped in it."""
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    shutil.rmtree(copy / "run")
    text = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(text.replace(str(world), str(copy)))
    return copy


REFUSED = [
    "model.template=vicuna_v1",
    "model.image_mode=crop",
    "model.projector=linear",
    "model.vision_feature_layer=-1",
    "model.match_embedding_scale=true",
    "data.template=plain",
    "data.max_tokens=199",
    "data.row_tokens=255",
    "data.too_long=drop",
    "data.order=file",
    "data.group_by_picture=false",
    "data.conversations_per_tree=1",
    "tune.language_model=full",
    "optim.learning_rate=1e-3",
    "optim.projector_learning_rate=1e-3",
    "optim.weight_decay=0.1",
    "optim.beta1=0.8",
    "optim.beta2=0.99",
    "optim.eps=1e-6",
    "optim.schedule=linear",
    "optim.warmup_share=0.5",
    "optim.final_share=0.5",
    "optim.max_grad_norm=2.0",
    "optim.batch_conversations=8",
    "optim.epochs=2.0",
    "optim.max_steps=5",
    "run.seed=1",
    "run.dtype=bfloat16",
]


@pytest.mark.parametrize("change", REFUSED)
def test_a_value_that_decides_what_is_learnt_may_not_change(world: Path, change: str) -> None:
    with pytest.raises(TrainingError) as caught:
        run_recipe(recipe_of(world, change))
    assert f"is of another recipe: {change.split('=')[0]}: " in str(caught.value)
    assert "--restart" in str(caught.value)
    assert (world / "run" / "checkpoints" / "step-00000001").is_dir(), "what was there is untouched"


def test_every_key_that_may_change_is_a_key() -> None:
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    for section, *key in FREE_TO_CHANGE:
        assert section in sections
        assert not key or key[0] in sections[section].model_fields, (section, key)  # type: ignore[union-attr]


def test_where_and_how_a_run_trains_may_change(world: Path, tmp_path: Path) -> None:
    before = recipe_of(world).model_dump(mode="json")
    changes = [
        "description=again", "data.workers=0", "data.max_bad_share=0.5", f"data.token_cache={tmp_path}/tokens",
        f"run.out={tmp_path}/elsewhere", "run.device=cpu", "run.micro_batch_tokens=64", "run.log_every=2",
        "run.save_every=1", "run.keep=1", "run.max_bad_steps=3", "run.sample_every=3",
        "run.activation_checkpointing=full",
    ]  # fmt: skip
    changed = recipe_of(world, *changes)
    assert changed.model_dump(mode="json") != before
    assert differences(before, changed.model_dump(mode="json")) == []
    shutil.copytree(world / "run", tmp_path / "elsewhere")
    assert run_recipe(changed).first_step == 1


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_another_byte_in_the_data_is_refused(own: Path) -> None:
    stop_early(recipe_of(own))
    text = (own / "mix.json").read_text()
    (own / "mix.json").write_text(text.replace("number 7", "number 8", 1))
    with pytest.raises(TrainingError, match="the checkpoint was made with another data"):
        run_recipe(recipe_of(own))


def test_another_tokenizer_under_the_same_path_is_refused(own: Path) -> None:
    stop_early(recipe_of(own))
    config = own / "language_model" / "tokenizer_config.json"
    changed = {**json.loads(config.read_text()), "model_max_length": 77}
    config.write_text(json.dumps(changed))
    with pytest.raises(TrainingError, match=r"tokenizer and picture settings of this run have changed since \(tokeni"):
        run_recipe(recipe_of(own))


def test_other_picture_settings_under_the_same_path_are_refused(own: Path) -> None:
    stop_early(recipe_of(own))
    settings = own / "vision_tower" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.5", "0.4", 1))
    with pytest.raises(TrainingError, match=r"picture settings of this run have changed since \(preprocessor_config"):
        run_recipe(recipe_of(own))


def test_a_template_that_was_written_anew_under_its_name_is_refused(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_early(recipe_of(own))
    whole = resume.take_fingerprints

    def with_another_template(*args: object) -> dict[str, dict[str, str]]:
        return {**whole(*args), "template": {"llava_hf": "0" * 16}}  # type: ignore[arg-type]

    monkeypatch.setattr("llava.train.prepare.take_fingerprints", with_another_template)
    with pytest.raises(TrainingError, match=r"the template of this run have changed since \(llava_hf\)"):
        run_recipe(recipe_of(own))


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_one_bit_of_a_frozen_weight_is_refused_by_name(own: Path, part: str) -> None:
    stop_early(recipe_of(own))
    flip_last_bit(own / part / "model.safetensors")
    with pytest.raises(TrainingError, match=rf"the frozen weights of this run have changed since \({part}\.[\w.]+\)"):
        run_recipe(recipe_of(own))


def test_a_trained_weight_of_the_start_may_change_because_the_checkpoint_holds_it(own: Path) -> None:
    stop_early(recipe_of(own, "tune.language_model=full"))
    flip_last_bit(own / "language_model" / "model.safetensors")
    assert run_recipe(recipe_of(own, "tune.language_model=full")).first_step == 1


def test_a_device_that_would_compute_in_another_format_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"run.out={tmp_path}/run"
    monkeypatch.setattr("llava.distributed.cpu_has_bfloat16", lambda: False)
    stop_early(recipe_of(world, out, "run.dtype=auto"))
    monkeypatch.setattr("llava.distributed.cpu_has_bfloat16", lambda: True)
    with pytest.raises(TrainingError, match="was computed in float32, this device would take bfloat16"):
        run_recipe(recipe_of(world, out, "run.dtype=auto"))


def test_another_version_of_a_library_is_a_warning(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    monkeypatch.setattr("llava.__version__", "9.9")
    with caplog.at_level(logging.WARNING):
        assert run_recipe(recipe_of(world, f"run.out={tmp_path}/run")).first_step == 1
    assert "was made with llava" in caplog.text
    assert "perhaps not to the same bit" in caplog.text


def test_a_checkpoint_of_another_format_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    monkeypatch.setattr("llava.train.state.FORMAT", 99)
    with pytest.raises(TrainingError, match="a checkpoint of format 2, this version writes 99"):
        run_recipe(recipe_of(world, f"run.out={tmp_path}/run"))


@pytest.mark.parametrize(
    "changes",
    [
        ["tune.language_model=last_layers", "tune.language_model_layers=1"],
        ["tune.vision_tower=lora", "tune.language_model=lora"],
        ["tune.vision_tower=full", "run.dtype=bfloat16"],
        ["tune.language_model=qlora"],
        ["tune.language_model=full", "optim.optimizer=adamw_8bit"],
    ],
    ids=["last layers", "lora on both", "tower in bfloat16", "qlora", "8-bit moments"],
)
def test_every_way_of_learning_goes_on_to_the_same_bits(world: Path, tmp_path: Path, changes: list[str]) -> None:
    if {"tune.language_model=qlora", "optim.optimizer=adamw_8bit"} & {*changes}:
        pytest.importorskip("bitsandbytes", reason="needs pip install 'llava[quant]'")
    whole = run_recipe(recipe_of(world, f"run.out={tmp_path}/whole", *changes))
    cut = recipe_of(world, f"run.out={tmp_path}/cut", *changes)
    with pytest.raises(RunStoppedError):
        run_recipe(cut, watcher=StopAfter(4))
    resumed = run_recipe(cut)
    assert resumed.first_step == 4

    def ending(run: RunResult) -> list[object]:
        files = sorted([*run.out_dir.glob("*.safetensors"), *run.out_dir.glob("*.bin")])
        losses = [line["loss"].hex() for line in read_lines(run.metrics_path)]
        return [losses, [(path.name, path.read_bytes()) for path in files]]

    assert ending(resumed) == ending(whole)


# --- digests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_a_digest_notices_any_bit_type_and_shape_but_not_the_layout(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(5, 6) * 50).abs().to(dtype)
    digest = digest_tensor(tensor)
    for place in range(tensor.numel() * tensor.element_size()):
        other = tensor.clone()
        other.view(-1).view(torch.uint8)[place] ^= 1 << (place % 8)
        assert digest_tensor(other) != digest
    assert digest_tensor(tensor.t().contiguous().t()) == digest
    assert digest_tensor(tensor.view(6, 5)) != digest
    assert digest_tensor(tensor[0, 0]) != digest_tensor(tensor[:1, 0])
    assert digest_tensor(torch.zeros(2, dtype=torch.float16)) != digest_tensor(torch.zeros(2, dtype=torch.bfloat16))


# --- one run a folder --------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(world: Path) -> None:
    with (
        held_folder(world / "run"),
        pytest.raises(TrainingError, match=rf"another run is training into this folder \(process {os.getpid()}\)"),
    ):
        run_recipe(recipe_of(world))
    assert not (world / "run" / ".lock").exists()


def test_the_lock_of_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 1\n")
    with held_folder(tmp_path):
        pass


def test_a_run_that_is_refused_leaves_no_folder(world: Path, tmp_path: Path) -> None:
    with pytest.raises(LlavaError):
        run_recipe(recipe_of(world, f"run.out={tmp_path}/a/b", "data.files=[none.json]"))
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refusal = r"file/run: cannot write there \(Not a directory\); choose another run.out"
    with pytest.raises(TrainingError, match=refusal), held_folder(tmp_path / "file" / "run"):
        pass


def test_what_dead_processes_left_half_written_is_removed_and_what_living_ones_write_stays(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".run.json.partial").write_text("{")
    names = (".run.999999999-x.partial", f".run.{os.getppid()}-x.partial", ".run2.999999999-x.partial")
    dead, living, other = (tmp_path / name for name in names)
    for folder in (dead, living, other):
        folder.mkdir()
    with held_folder(out):
        assert (dead.exists(), living.exists(), other.exists()) == (False, True, True)
        assert [path.name for path in out.iterdir()] == [".lock"]


def test_a_run_that_was_killed_in_its_last_act_is_tidied_when_asked_again(world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world, f"run.out={tmp_path}/run", "optim.max_steps=1")
    run_recipe(recipe)
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert run_recipe(recipe).first_step == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
    load(tmp_path / "run", device="cpu", dtype="float32")
