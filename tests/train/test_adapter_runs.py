"""Runs with LoRA through `run_recipe`: the folder opens, merges, is read by peft and the original, and goes on."""

import importlib.util
import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from llava.checkpoint.load import Loaded, load
from llava.checkpoint.tuned import MANIFEST, Manifest
from llava.errors import CheckpointError
from llava.model.lora import is_adapted, lora_layers
from llava.train.loop import StepRecord
from llava.train.metrics import read_metrics
from llava.train.prepare import prepare_run
from llava.train.progress import Watcher
from llava.train.recipe import load_recipe
from llava.train.run import RunStoppedError, run_recipe
from llava.train.sections import Recipe
from tests.train.tiny_training import write_tiny_bases

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes: pip install 'llava[quant]'")
LORA = ("tune.language_model=lora", "tune.language_model_lora.rank=4", "tune.language_model_lora.alpha=8.0")
TOWER_LORA = ("tune.vision_tower=lora", "tune.vision_tower_lora.rank=2", "tune.vision_tower_lora.alpha=4.0")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("adapters") / "world")


def make_world(folder: Path) -> Path:
    """Two bases, six pictures with two questions each."""
    folder.mkdir()
    write_tiny_bases(folder)
    (folder / "images").mkdir()
    records = []
    for number in range(6):
        colour, rgb = (("red", (220, 20, 20)), ("blue", (20, 20, 220)))[number % 2]
        Image.new("RGB", (16, 16), rgb).save(folder / "images" / f"{number}.png")
        for question in ("Colour?", "Which?"):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": colour}]
            records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "mix.json").write_text(json.dumps(records))
    return folder


def make_recipe(world: Path, out: Path, *changes: str, dtype: str = "float32") -> Recipe:
    path = out.parent / "recipe.yaml"
    path.write_text(
        f"""\
model: {{language_model: {world}/language_model, vision_tower: {world}/vision_tower, template: vicuna_v1}}
data: {{files: [{world}/mix.json], images: {world}/images, max_tokens: 200, row_tokens: 256, workers: 0}}
optim: {{learning_rate: 1e-2, batch_conversations: 4, max_steps: 3}}
run: {{out: {out}, device: cpu, dtype: {dtype}}}
"""
    )
    return load_recipe(path, changes)


def question(loaded: Loaded) -> dict[str, Tensor]:
    """One picture and some words, as the model takes them."""
    generator = torch.Generator().manual_seed(0)
    size, features = loaded.model.config.image_size, loaded.model.config.features_per_tile
    words = torch.randint(5, 200, (6,), generator=generator)
    ids = torch.cat([torch.tensor([1]), torch.full((features,), loaded.model.config.image_token_id), words])
    return {"input_ids": ids[None], "pixel_values": torch.randn(1, 3, size, size, generator=generator)}


@torch.no_grad()
def scores(loaded: Loaded) -> Tensor:
    loaded.model.eval()
    return loaded.model.logits(loaded.model(**question(loaded))).float()


def open_float32(folder: Path, **options: object) -> Loaded:
    return load(folder, device="cpu", dtype="float32", **options)  # type: ignore[arg-type]


def assert_close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    assert (one - other).abs().max().item() <= tolerance * one.abs().max().item()


@pytest.mark.parametrize("changes", [LORA, (*LORA, *TOWER_LORA), TOWER_LORA], ids=["language", "both", "tower"])
def test_a_run_leaves_adapters_that_open_beside_and_merged(world: Path, tmp_path: Path, changes: Sequence[str]) -> None:
    out = run_recipe(make_recipe(world, tmp_path / "run", *changes)).out_dir
    assert not (out / "model.safetensors").exists()
    beside, merged = open_float32(out, merge_lora=False), open_float32(out)
    assert is_adapted(beside.model) and not is_adapted(merged.model)
    assert all(layer.lora_B["default"].weight.abs().max() > 0 for _, layer in lora_layers(beside.model))
    assert_close(scores(beside), scores(merged))
    assert merged.processor.template.name == "vicuna_v1"


def test_the_trained_model_in_memory_is_what_the_folder_holds(world: Path, tmp_path: Path) -> None:
    recipe = make_recipe(world, tmp_path / "run", *LORA, *TOWER_LORA)
    prepared = prepare_run(recipe)
    list(prepared.trainer.run(iter(prepared.loader)))
    trained = scores(prepared.loaded)
    assert_close(trained, scores(open_float32(run_recipe(recipe).out_dir)))


def test_another_base_is_refused_and_both_are_named(world: Path, tmp_path: Path) -> None:
    out = run_recipe(make_recipe(world, tmp_path / "run", *LORA)).out_dir
    other = tmp_path / "other"
    shutil.copytree(world / "language_model", other)
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"was tuned on {world}/language_model.* but {other}.* holds other"):
        load(out, base=other)
    shutil.copytree(world / "language_model", tmp_path / "copy")
    assert_close(scores(open_float32(out)), scores(open_float32(out, base=tmp_path / "copy")))


def test_a_damaged_adapter_is_noticed(world: Path, tmp_path: Path) -> None:
    out = run_recipe(make_recipe(world, tmp_path / "run", *LORA)).out_dir
    path = out / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: not the file"):
        load(out)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own
def test_peft_opens_the_adapter_on_the_language_model_alone(world: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = run_recipe(make_recipe(world, tmp_path / "run", *LORA)).out_dir
    ours = open_float32(out).model.language_model.get_parameter("model.layers.1.mlp.up_proj.weight")
    base = AutoModelForCausalLM.from_pretrained(world / "language_model", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(out)).merge_and_unload()
    assert_close(ours, theirs.get_parameter("model.layers.1.mlp.up_proj.weight"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own
def test_peft_opens_the_towers_adapter_on_the_tower_alone(world: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import CLIPVisionModel

    out = run_recipe(make_recipe(world, tmp_path / "run", *LORA, *TOWER_LORA)).out_dir
    ours = dict(open_float32(out).model.vision_tower.named_parameters())
    base = CLIPVisionModel.from_pretrained(world / "vision_tower", dtype=torch.float32)
    theirs = dict(
        PeftModel.from_pretrained(base, str(out / "visual_encoder_adapter")).merge_and_unload().named_parameters()
    )
    name = next(name for name in ours if name.endswith("layers.1.mlp.fc1.weight"))
    assert_close(ours[name], theirs[name])


def test_the_originals_reader_opens_the_folder_on_the_same_base(world: Path, tmp_path: Path) -> None:
    out = run_recipe(make_recipe(world, tmp_path / "run", *LORA)).out_dir
    copy = tmp_path / "as-original"
    shutil.copytree(out, copy)
    (copy / MANIFEST).unlink()
    read = open_float32(copy, base=world / "language_model")
    assert read.report.format == "original LoRA"
    assert_close(scores(open_float32(out))[..., :480], scores(read)[..., :480])


def test_the_manifest_says_what_was_trained_on_what(world: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(run_recipe(make_recipe(world, tmp_path / "run", *LORA)).out_dir)
    assert manifest.base["language_model"] == f"{world}/language_model"
    modes = {part["part"]: (part["mode"], part["rank"]) for part in manifest.trained}
    assert modes == {"vision_tower": ("frozen", None), "projector": ("full", None), "language_model": ("lora", 4)}
    assert manifest.recipe["optim"]["learning_rate"] == 1e-2
    assert manifest.weights.startswith("sha256:")


class StopAfter(Watcher):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, record: StepRecord) -> None:
        if record.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_lora_run_goes_on_to_the_same_bits(world: Path, tmp_path: Path) -> None:
    whole = run_recipe(make_recipe(world, tmp_path / "whole", *LORA, *TOWER_LORA)).out_dir
    recipe = make_recipe(world, tmp_path / "cut", *LORA, *TOWER_LORA)
    with pytest.raises(RunStoppedError):
        run_recipe(recipe, watcher=StopAfter(1))
    cut = run_recipe(recipe).out_dir
    assert [line["loss"] for line in read_metrics(cut / "metrics.jsonl")] == [
        line["loss"] for line in read_metrics(whole / "metrics.jsonl")
    ]
    for name in ("adapter_model.safetensors", "visual_encoder_adapter/adapter_model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_a_task_run_starts_from_a_lora_folder_and_adapts_again(world: Path, tmp_path: Path) -> None:
    first = run_recipe(make_recipe(world, tmp_path / "first", *LORA)).out_dir
    start = f"model={{path: {first}}}"
    second = run_recipe(make_recipe(world, tmp_path / "second", start, *LORA)).out_dir
    assert Manifest.read(second).base == {"path": str(first)}
    assert_close(scores(open_float32(second, merge_lora=False)), scores(open_float32(second)))
    frozen = make_recipe(world, tmp_path / "still", start, *LORA, "optim.learning_rate=1e-12")
    assert_close(scores(open_float32(first)), scores(open_float32(run_recipe(frozen).out_dir)))


def test_a_frozen_language_model_keeps_its_own_bits_whatever_it_is_computed_in(world: Path, tmp_path: Path) -> None:
    out = run_recipe(make_recipe(world, tmp_path / "run", dtype="bfloat16")).out_dir
    from safetensors.torch import load_file

    name = "model.layers.0.mlp.up_proj.weight"
    saved = load_file(out / "model.safetensors")[f"language_model.{name}"]
    assert torch.equal(saved, load_file(world / "language_model" / "model.safetensors")[name])


QLORA = ("tune.language_model=qlora", *LORA[1:])


@needs_bitsandbytes
def test_a_qlora_run_with_a_towers_lora_merges_into_the_bases_own_weights(world: Path, tmp_path: Path) -> None:
    """XTuner's promoted recipe, small: NF4 language model with LoRA, LoRA on the tower, the projector in full."""
    recipe = make_recipe(world, tmp_path / "run", *QLORA, *TOWER_LORA)
    prepared = prepare_run(recipe)
    assert "nf4" in prepared.summaries[2].held_in
    packed = prepared.loaded.model.get_parameter("language_model.model.layers.0.mlp.up_proj.base_layer.weight")
    assert packed.dtype == torch.uint8 and packed.quant_state.nested, "NF4 with double quantisation"  # type: ignore[attr-defined]
    out = run_recipe(recipe).out_dir
    beside, merged = open_float32(out, merge_lora=False), open_float32(out)
    assert all(layer.lora_B["default"].weight.abs().max() > 0 for _, layer in lora_layers(beside.model))
    assert_close(scores(beside), scores(merged))


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sample_answers_do_not_take_a_packed_models_gradients(world: Path, tmp_path: Path, dtype: str) -> None:
    samples = ("run.sample_every=1", f"run.sample_images=[{world}/images/0.png]", "run.sample_questions=['Colour?']")
    plain = run_recipe(make_recipe(world, tmp_path / "plain", *QLORA, dtype=dtype)).out_dir
    sampled = run_recipe(make_recipe(world, tmp_path / "sampled", *QLORA, *samples, dtype=dtype)).out_dir
    assert len((sampled / "samples.jsonl").read_text().splitlines()) >= 2
    for name in ("adapter_model.safetensors",):
        assert (plain / name).read_bytes() == (sampled / name).read_bytes()


@needs_bitsandbytes
def test_a_stage_1_run_on_a_packed_language_model_leaves_a_whole_model(world: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out = run_recipe(make_recipe(world, tmp_path / "run", "tune.language_model=frozen_4bit")).out_dir
    name = "model.layers.0.mlp.up_proj.weight"
    saved = load_file(out / "model.safetensors")[f"language_model.{name}"]
    assert torch.equal(saved, load_file(world / "language_model" / "model.safetensors")[name])
    start = f"model={{path: {out}}}"
    second = run_recipe(make_recipe(world, tmp_path / "second", start, *QLORA)).out_dir
    assert_close(scores(open_float32(second, merge_lora=False)), scores(open_float32(second)))


@needs_bitsandbytes
def test_a_stopped_qlora_run_goes_on_to_the_same_bits(world: Path, tmp_path: Path) -> None:
    whole = run_recipe(make_recipe(world, tmp_path / "whole", *QLORA)).out_dir
    recipe = make_recipe(world, tmp_path / "cut", *QLORA)
    with pytest.raises(RunStoppedError):
        run_recipe(recipe, watcher=StopAfter(1))
    cut = run_recipe(recipe).out_dir
    assert (cut / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_bfloat16_lora_run_trains_float32_adapters_and_answers_meanwhile(world: Path, tmp_path: Path) -> None:
    samples = ("run.sample_every=1", f"run.sample_images=[{world}/images/0.png]", "run.sample_questions=['Colour?']")
    recipe = make_recipe(world, tmp_path / "run", *LORA, *samples, dtype="bfloat16")
    summary = prepare_run(recipe).summaries[2]
    assert summary.held_in == "bfloat16, float32"
    out = run_recipe(recipe).out_dir
    assert (out / "samples.jsonl").read_text()
    assert {p.dtype for n, p in open_float32(out, merge_lora=False).model.named_parameters() if "lora" in n} == {
        torch.float32
    }
