"""Every shipped recipe takes two steps, from its own kind of start, on parts that are tiny; only sizes are replaced.

A second stage starts from the folder that its first stage left. Those that differ from another in names alone are in
the slow tier (four dozen runs of half a second).
"""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.checkpoint.load import load
from llava.model.llava import Llava
from llava.train.metrics import read_metrics
from llava.train.prepare import open_model, prepare_run
from llava.train.recipe import load_recipe, shipped_recipes
from llava.train.run import run_recipe
from llava.train.sections import Recipe
from llava.train.selection import PARTS, is_packed, mode_of, part_of
from tests.train.tiny_training import write_tiny_bases

GOLDEN = Path(__file__).parent.parent / "golden"
CHECKPOINTS = GOLDEN / "checkpoints"
# Finished models and projectors of others, in the layouts that they were published in.
PUBLISHED = {
    "liuhaotian/llava-v1.5-7b": "a_v1_5_full/llava-v1.5-tiny",
    "liuhaotian/llava-v1.5-13b": "a_v1_5_full/llava-v1.5-tiny",
    "liuhaotian/llava-v1.6-vicuna-7b": "c_v1_6_anyres/llava-v1.6-vicuna-tiny",
    "liuhaotian/llava-pretrain-vicuna-13b-v1.3": "d_projector_only/llava-tiny-v1.5-pretrain",
}
VOCABULARY = ("embed_tokens.weight", "wte.weight", "lm_head.weight")
QUICK = {
    "llava-v0-13b-align",
    "llava-v0-13b-instruct",
    "llava-lightning-7b-lora",
    "llava-scienceqa-13b",
    "llava-v1.5-7b-align",
    "llava-v1.5-7b-instruct",
    "llava-v1.5-7b-lora",
    "llava-v1.5-13b-task-lora",
    "llava-v1.6-7b-instruct",
    "llava-mpt-7b-align",
    "llava-mpt-7b-instruct",
    "xtuner-vicuna-7b-qlora",
    "xtuner-vicuna-7b-refcoco",
    "xtuner-llama3-8b-full-vitlora",
    "xtuner-phi3-mini-internvl",
    "paddlemix-v1.6-7b-sft",
}
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in sorted(shipped_recipes())
    if not name.startswith("quickstart")
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tiny bases of three families, and a data set with pictures of several shapes and one text without any."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_bases(folder)
    write_mpt_base(folder / "mpt")
    write_phi3_base(folder / "phi3", tokenizer=folder / "language_model")
    (folder / "images").mkdir()
    records = []
    for number, size in enumerate([(16, 16), (40, 16), (16, 40), (30, 30)]):
        Image.new("RGB", size, (50 * number, 200, 90)).save(folder / "images" / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"green {number}"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "captions.json").write_text(json.dumps(records))
    text = [{"from": "human", "value": "Name a prime."}, {"from": "gpt", "value": "Seven."}]
    records.insert(1, {"id": "text", "conversations": text})
    (folder / "mix.json").write_text(json.dumps(records))
    for record in records:
        first, second = record.pop("conversations")
        record["conversations"] = [[first["value"], second["value"]]]
    (folder / "pairs.json").write_text(json.dumps(records))
    yield folder
    shutil.rmtree(folder)


def write_mpt_base(folder: Path) -> None:
    from transformers import MptConfig, MptForCausalLM

    shutil.copytree(GOLDEN / "prompt" / "tokenizers" / "mpt-tiny-chat", folder)
    torch.manual_seed(0)
    config = MptConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=512, max_seq_len=512, no_bias=True)
    MptForCausalLM(config).save_pretrained(folder)


def write_phi3_base(folder: Path, *, tokenizer: Path) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer / name, folder / name)
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=480,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    Phi3ForCausalLM(config).save_pretrained(folder)


def tiny(name: str, world: Path) -> Recipe:
    """The shipped recipe with its sizes and places replaced, and nothing else."""
    recipe = load_recipe(name)
    model = recipe.model
    plain = recipe.data.template == "plain"
    file = world / ("captions.json" if plain else "pairs.json" if name.startswith("paddlemix") else "mix.json")
    changes = [
        f"data.images={world}/images",
        "data.workers=0",
        "optim.batch_conversations=2",
        "optim.max_steps=2",
        f"run.out={world}/{name}",
        "run.device=cpu",
        "run.dtype=float32",
    ]
    if recipe.data.files:
        changes.append(f"data.files=[{file}]")
    else:
        changes.append(f"data.sources=[{{file: {file}, images: {world}/images}}, {{file: {world}/captions.json}}]")
    if model.language_model is not None:
        kind = {"mosaicml": "mpt", "microsoft": "phi3"}.get(model.language_model.split("/")[0], "language_model")
        changes += [f"model.language_model={world}/{kind}", f"model.vision_tower={world}/vision_tower"]
    elif model.path is not None and model.path.startswith("runs/"):
        changes.append(f"model.path={ran(model.path.removeprefix('runs/'), world)}")
    elif model.path is not None:
        changes.append(f"model.path={CHECKPOINTS / PUBLISHED[model.path]}")
    if model.base is not None:
        changes.append(f"model.base={CHECKPOINTS}/bases/vicuna-tiny-v1.5")
    if model.image_grid_pinpoints is not None:
        smaller = [[16 * height // 336, 16 * width // 336] for height, width in model.image_grid_pinpoints]
        changes.append(f"model.image_grid_pinpoints={smaller}")
    return load_recipe(name, changes)


def ran(name: str, world: Path) -> Path:
    """The folder of a shipped recipe's tiny run, run once."""
    recipe = tiny(name, world)
    if any(is_packed(mode_of(recipe.tune, part)) for part in PARTS) and not importlib.util.find_spec("bitsandbytes"):
        pytest.skip("4-bit weights need bitsandbytes")
    assert recipe.run.out is not None
    if not (Path(recipe.run.out) / "run.json").exists():
        run_recipe(recipe)
    return Path(recipe.run.out)


def start_of(recipe: Recipe) -> Llava:
    """The model that the run started from; a new one's projector is not comparable."""
    return open_model(recipe).model


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_takes_two_steps_and_moves_what_it_says(
    name: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKPOINTS / "bases")  # the published folders name their tower by a relative path
    out = ran(name, world)
    recipe = tiny(name, world)
    lines = read_metrics(out / "metrics.jsonl")
    assert len(lines) == 2
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
    trained = load(out, device="cpu", dtype="float32")
    wanted = load_recipe(name).model
    assert trained.model.config.image_mode == (wanted.image_mode or start_of(recipe).config.image_mode)
    assert wanted.template in (None, trained.processor.template.name)
    before = dict(start_of(recipe).named_parameters())
    after = dict(trained.model.named_parameters())
    # MPT's output layer is the embedding, and is written as a copy, because stock LLaVA classes cannot tie it
    assert after.keys() - before.keys() <= ({"language_model.lm_head.weight"} if "mpt" in name else set())
    for part in PARTS:
        mode = mode_of(recipe.tune, part)
        moved = [n for n, p in before.items() if part_of(n) == part and not torch.equal(p, after[n].to(p.dtype))]
        if is_packed(mode):
            continue  # what was rounded to four bits and back is not what it was
        if mode == "frozen":
            assert all(recipe.model.start_end_tokens and n.endswith(VOCABULARY) for n in moved), (part, moved)
            rows = [int((before[n] != after[n]).any(dim=1).sum()) for n in moved]
            assert all(count <= 2 for count in rows), "only <im_start> and <im_end> learn"
        else:
            assert moved, part
    if recipe.model.image_mode == "anyres":
        assert not torch.equal(before["image_newline"], after["image_newline"])


@pytest.mark.parametrize("order", ["grouped_by_length", "file"])
def test_a_recipe_takes_the_originals_batches_when_asked(order: str, world: Path) -> None:
    recipe = tiny("llava-v1.5-7b-instruct", world)
    changed = {
        "data": recipe.data.model_copy(update={"order": order, "group_by_picture": False}),
        "run": recipe.run.model_copy(update={"out": f"{world}/{order}"}),
    }
    plan = prepare_run(recipe.model_copy(update=changed)).loader.plan
    first, second = ([n for group in plan.groups_of(step) for n in group] for step in (0, 1))
    if order == "file":
        assert (first, second) == ([0, 1], [2, 3])
    else:  # the second record is text: it waits for the merged steps at the end
        assert len(first) == 2
        assert 1 not in first


def test_adapters_that_begin_to_look_at_tiles_keep_their_newline(world: Path) -> None:
    align = ran("llava-v1.6-7b-align", world)
    recipe = load_recipe(
        "llava-v1.5-7b-lora",
        [
            f"model={{path: {align}, image_mode: anyres, image_grid_pinpoints: [[32, 16], [16, 32]]}}",
            f"data={{files: [{world}/mix.json], images: {world}/images, workers: 0}}",
            "optim.batch_conversations=2",
            "optim.max_steps=2",
            f"run={{out: {world}/tiles-lora, device: cpu, dtype: float32}}",
        ],
    )
    fresh = start_of(recipe).image_newline
    run_recipe(recipe)
    opened = load(world / "tiles-lora", device="cpu", dtype="float32").model
    assert opened.config.image_mode == "anyres"
    assert opened.image_newline is not None
    assert fresh is not None
    assert not torch.equal(opened.image_newline, fresh)


def test_every_recipe_has_a_run_and_the_quick_ones_exist() -> None:
    assert set(shipped_recipes()) > QUICK
