"""New tokens and canvases reach a new model, learn in both stages, and are saved; nothing else of it moves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava.checkpoint.load import build, load
from llava.checkpoint.tuned import Manifest
from llava.train.prepare import prepare_run
from llava.train.run import run_recipe
from llava.train.start import added_token_ids, open_model
from tests.train.test_adapter_runs import LORA, assert_close, make_recipe, make_world, open_float32, scores

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
START_END = "model.start_end_tokens=true"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("starts") / "world")


def test_new_tokens_get_the_mean_of_the_old_rows_in_both_matrices(world: Path) -> None:
    loaded = build(
        world / "language_model", world / "vision_tower", start_end_tokens=True, device="cpu", dtype="float32"
    )
    tokenizer = loaded.processor.tokenizer
    ids = [tokenizer.token_id(token) for token in ("<im_start>", "<im_end>", "<image>")]
    assert ids == [480, 481, 482], "behind the base's vocabulary, the original's two first"
    base = load_file(world / "language_model" / "model.safetensors")
    for ours, theirs in ((EMBEDDING, "model.embed_tokens.weight"), (HEAD, "lm_head.weight")):
        rows = loaded.model.get_parameter(ours)
        assert rows.shape[0] == 512
        torch.testing.assert_close(rows[480:], base[theirs].mean(dim=0).expand(32, -1))
        assert torch.equal(rows[:480], base[theirs])
    assert loaded.model.config.image_start_end
    assert loaded.processor.start_end_tokens


def test_rows_that_a_padded_vocabulary_has_already_become_the_mean_of_those_before(world: Path, tmp_path: Path) -> None:
    import json
    import shutil

    padded = tmp_path / "padded"
    shutil.copytree(world / "language_model", padded)
    tensors = load_file(padded / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.full((32, 32), 7.0)])
    save_file(tensors, padded / "model.safetensors", {"format": "pt"})
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps({**config, "vocab_size": 512}))
    model = build(padded, world / "vision_tower", start_end_tokens=True, device="cpu", dtype="float32").model
    torch.testing.assert_close(
        model.embed_tokens.weight[480:483], tensors["model.embed_tokens.weight"][:480].mean(0).expand(3, -1)
    )
    assert (model.embed_tokens.weight[483:] == 7).all()


def test_canvases_of_a_recipe_reach_the_model_and_v16s_are_the_default(world: Path, tmp_path: Path) -> None:
    anyres = "model.image_mode=anyres"
    named = make_recipe(world, tmp_path / "a", anyres, "model.image_grid_pinpoints=[[16, 32], [32, 16]]")
    assert open_model(named).model.config.image_grid_pinpoints == ((16, 32), (32, 16))
    config = open_model(make_recipe(world, tmp_path / "b", anyres)).model.config
    assert config.image_grid_pinpoints == ((16, 32), (32, 16), (32, 32), (48, 16), (16, 48))
    assert config.has_newline


def moved(before: Tensor, after: Tensor) -> list[int]:
    return (before != after).any(dim=1).nonzero().flatten().tolist()


def test_in_stage_1_the_rows_of_start_and_end_learn_and_nothing_else_of_the_language_model(
    world: Path, tmp_path: Path
) -> None:
    decay = "optim.weight_decay=0.5"
    out = run_recipe(make_recipe(world, tmp_path / "run", START_END, decay)).out_dir
    saved = load_file(out / "model.safetensors")
    model = build(
        world / "language_model", world / "vision_tower", start_end_tokens=True, device="cpu", dtype="float32"
    ).model
    for name, start in model.named_parameters():
        if name.startswith("language_model."):
            assert moved(start.reshape(start.shape[0], -1), saved[name].reshape(start.shape[0], -1)) == (
                [480, 481] if name in (EMBEDDING, HEAD) else []
            ), name
    second = make_recipe(world, tmp_path / "second", f"model={{path: {out}}}", *LORA)
    prepared = prepare_run(second)
    assert added_token_ids(prepared.loaded.processor) == [480, 481]
    names = {name for name, p in prepared.loaded.model.named_parameters() if p.requires_grad and "added" in name}
    assert names == {"language_model.model.embed_tokens.added_rows", "language_model.lm_head.added_rows"}


def test_a_lora_runs_rows_are_in_its_folder_and_in_what_is_merged(world: Path, tmp_path: Path) -> None:
    first = run_recipe(make_recipe(world, tmp_path / "first", START_END)).out_dir
    recipe = make_recipe(world, tmp_path / "second", f"model={{path: {first}}}", *LORA)
    prepared = prepare_run(recipe)
    list(prepared.trainer.run(iter(prepared.loader)))
    in_memory = scores(prepared.loaded)
    second = run_recipe(recipe).out_dir
    assert Manifest.read(second).added_ids == (480, 481)
    opened = open_float32(second)
    assert moved(load_file(first / "model.safetensors")[EMBEDDING], opened.model.embed_tokens.weight) == [480, 481]
    assert_close(in_memory, scores(opened))


def test_a_newline_learns_with_the_projector_and_is_saved(world: Path, tmp_path: Path) -> None:
    anyres = ("model.image_mode=anyres", "model.image_grid_pinpoints=[[16, 32], [32, 16]]")
    recipe = make_recipe(world, tmp_path / "run", *anyres, *LORA, "tune.projector=lora")
    start = open_model(recipe).model.image_newline
    out = run_recipe(recipe).out_dir
    end = load(out, device="cpu", dtype="float32").model.image_newline
    assert start is not None and end is not None and not torch.equal(start, end)
