"""The shipped recipes against the numbers that their sources published, and against the documents about them."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from llava.cli.main import main
from llava.prompt.templates import TEMPLATES
from llava.train.catalogue import FAMILIES, by_family, catalogue, describe_learning, markdown_table
from llava.train.recipe import load_recipe, shipped_recipes
from llava.train.sections import Recipe

ROOT = Path(__file__).parent.parent.parent
PUBLISHED = sorted(name for name in shipped_recipes() if not name.startswith("quickstart"))


@dataclass(frozen=True)
class Numbers:
    """What a source says. lora: (rank, alpha, dropout) of the language model; tower: what is done to it."""

    batch: int
    rate: float
    learns: str
    epochs: float = 1.0
    tokens: int = 2048
    lora: tuple[int, float, float] | None = None
    projector_rate: float | None = None
    tower_rate: float | None = None
    tower_lora: tuple[int, float, float] | None = None
    template: str | None = None
    image: str | None = None
    start_end: bool = False


R64, R128, R512 = (64, 16.0, 0.05), (128, 256.0, 0.05), (512, 256.0, 0.05)
BOTH, FROZEN_4BIT = "projector, language model", "projector (language model frozen in 4 bits)"
V15_LORA = {"lora": R128, "projector_rate": 2e-5}
XT_QLORA = Numbers(128, 2e-4, f"{BOTH} QLoRA r512, tower LoRA r64", lora=R512, tower_lora=R64, image="pad")
XT_FULL = Numbers(128, 2e-5, BOTH, image="pad")
INTERNLM2 = Numbers(256, 1e-3, FROZEN_4BIT, template="internlm2_chat", image="crop")
PADDLE_LORA = (128, 256.0, 0.0)

SOURCES = {
    # haotian-liu/LLaVA: scripts of April and May 2023, and of its last commit
    "llava-v0-13b-align": Numbers(128, 2e-3, "projector", template="llava_v0", image="crop", start_end=True),
    "llava-v0-13b-instruct": Numbers(32, 2e-5, BOTH, epochs=3),
    "llava-lightning-7b-align": Numbers(128, 2e-3, "projector", template="vicuna_v1", image="crop"),
    "llava-lightning-7b-instruct": Numbers(128, 2e-5, BOTH),
    "llava-lightning-7b-lora": Numbers(128, 2e-5, f"{BOTH} LoRA r64", lora=R64),
    "llava-lightning-7b-qlora": Numbers(128, 2e-5, f"{BOTH} QLoRA r64", lora=R64),
    "llava-mpt-7b-align": Numbers(128, 2e-3, "projector", template="mpt", image="crop", start_end=True),
    "llava-mpt-7b-instruct": Numbers(128, 2e-5, BOTH),
    "llava-scienceqa-13b": Numbers(128, 2e-5, BOTH, epochs=12, template="vicuna_v1"),
    "llava-v1.5-7b-align": Numbers(256, 1e-3, "projector", template="vicuna_v1", image="crop"),
    "llava-v1.5-13b-align": Numbers(256, 1e-3, "projector", template="vicuna_v1", image="crop"),
    "llava-v1.5-7b-instruct": Numbers(128, 2e-5, BOTH, image="pad"),
    "llava-v1.5-13b-instruct": Numbers(128, 2e-5, BOTH, image="pad"),
    "llava-v1.5-7b-lora": Numbers(128, 2e-4, f"{BOTH} LoRA r128", image="pad", **V15_LORA),
    "llava-v1.5-13b-lora": Numbers(128, 2e-4, f"{BOTH} LoRA r128", image="pad", **V15_LORA),
    "llava-v1.5-7b-qlora": Numbers(128, 2e-4, f"{BOTH} QLoRA r128", image="pad", **V15_LORA),
    "llava-v1.5-13b-task": Numbers(128, 2e-5, BOTH, image="pad"),
    "llava-v1.5-13b-task-lora": Numbers(128, 2e-4, f"{BOTH} LoRA r128", image="pad", **V15_LORA),
    # LLaVA-VL/LLaVA-NeXT: scripts/train/{pretrain,finetune}_clip.sh
    "llava-v1.6-7b-align": Numbers(256, 1e-3, "projector", template="vicuna_v1", image="crop"),
    "llava-v1.6-7b-instruct": Numbers(128, 1e-5, f"{BOTH}, tower", tower_rate=2e-6, tokens=4096, image="anyres"),
    # InternLM/xtuner v0.1.23: xtuner/configs/llava
    "xtuner-vicuna-7b-align": Numbers(256, 1e-3, FROZEN_4BIT, template="xtuner_vicuna", image="crop"),
    "xtuner-vicuna-13b-align": Numbers(256, 1e-3, FROZEN_4BIT, template="xtuner_vicuna", image="crop"),
    "xtuner-vicuna-7b-qlora": XT_QLORA,
    "xtuner-vicuna-13b-qlora": XT_QLORA,
    "xtuner-vicuna-7b-refcoco": XT_QLORA,
    "xtuner-internlm2-7b-align": INTERNLM2,
    "xtuner-internlm2-20b-align": INTERNLM2,
    "xtuner-internlm2-7b-qlora": XT_QLORA,
    "xtuner-internlm2-20b-qlora": XT_QLORA,
    "xtuner-internlm2-7b-full": XT_FULL,
    "xtuner-internlm2-20b-full": XT_FULL,
    "xtuner-llama3-8b-align": Numbers(256, 1e-3, "projector", template="llama3_chat", image="crop"),
    "xtuner-llama3-8b-sharegpt4v-align": Numbers(256, 1e-3, "projector", template="llama3_chat", tokens=4096),
    "xtuner-llama3-8b-1gpu-align": Numbers(256, 1e-3, FROZEN_4BIT, template="llama3_chat", image="crop"),
    "xtuner-llama3-8b-1gpu-qlora": Numbers(128, 2e-4, f"{BOTH} QLoRA r64", lora=R64, image="pad"),
    "xtuner-llama3-8b-full": XT_FULL,
    "xtuner-llama3-8b-full-vitlora": Numbers(128, 2e-5, f"{BOTH}, tower LoRA r64", tower_lora=R64, image="pad"),
    "xtuner-llama3-8b-internvl": Numbers(
        128, 2e-5, f"{BOTH}, tower LoRA r64", tower_lora=R64, tokens=4096, image="pad"
    ),
    "xtuner-llama3-70b-align": Numbers(256, 5e-4, FROZEN_4BIT, template="llama3_chat"),
    "xtuner-phi3-mini-align": Numbers(256, 1e-3, "projector", template="phi3_chat", image="crop"),
    "xtuner-phi3-mini-sharegpt4v-align": Numbers(256, 1e-3, "projector", template="phi3_chat", tokens=4096),
    "xtuner-phi3-mini-full": XT_FULL,
    "xtuner-phi3-mini-internvl": Numbers(128, 2e-5, f"{BOTH}, tower", epochs=2, tokens=4096, image="pad"),
    # PaddlePaddle/PaddleMIX v2.1: paddlemix/config/llava; the batch is LLaVA's
    "paddlemix-v1.5-13b-align": Numbers(256, 1e-3, "projector", template="vicuna_v1"),
    "paddlemix-v1.5-7b-sft": Numbers(128, 2e-5, BOTH),
    "paddlemix-v1.5-7b-lora": Numbers(128, 2e-4, f"{BOTH} LoRA r128", lora=PADDLE_LORA, projector_rate=2e-5),
    "paddlemix-v1.6-7b-sft": Numbers(128, 2e-5, BOTH, tokens=4096),
    "paddlemix-v1.6-7b-lora": Numbers(
        128, 2e-4, f"{BOTH} LoRA r128", tokens=4096, lora=PADDLE_LORA, projector_rate=2e-5
    ),
}


def test_every_published_recipe_has_its_sources_numbers_here() -> None:
    assert sorted(SOURCES) == PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_its_sources_numbers(name: str) -> None:
    recipe, says = load_recipe(name), SOURCES[name]
    optim, tune = recipe.optim, recipe.tune
    assert (optim.batch_conversations, optim.learning_rate, optim.epochs) == (says.batch, says.rate, says.epochs)
    assert describe_learning(recipe) == says.learns
    assert recipe.data.max_tokens == says.tokens
    assert (optim.projector_learning_rate, optim.vision_tower_learning_rate) == (says.projector_rate, says.tower_rate)
    for mode, lora, wanted in (
        (tune.language_model, tune.language_model_lora, says.lora),
        (tune.vision_tower, tune.vision_tower_lora, says.tower_lora),
    ):
        assert ((lora.rank, lora.alpha, lora.dropout) if mode.endswith("lora") else None) == wanted
    assert says.template is None or recipe.model.template == says.template
    assert says.image is None or recipe.model.image_mode == says.image
    assert bool(recipe.model.start_end_tokens) == says.start_end


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_all_sources_share_is_in_every_recipe(name: str) -> None:
    recipe = load_recipe(name)
    optim = recipe.optim
    assert (optim.optimizer, optim.beta1, optim.beta2, optim.weight_decay) == ("adamw", 0.9, 0.999, 0.0)
    assert (optim.schedule, optim.warmup_share, optim.final_share, optim.max_grad_norm) == ("cosine", 0.03, 0.0, 1.0)
    assert recipe.model.vision_feature_layer in (-2, None)
    assert recipe.model.template in (None, *TEMPLATES)
    assert recipe.data.template in (None, "plain")
    assert recipe.data.row_tokens >= recipe.data.max_tokens
    assert recipe.run.out == f"runs/{name}"
    # one layer until LLaVA-1.5, two since
    assert recipe.model.projector == ("linear" if re.match(r"llava-(v0|lightning|mpt)-.*align", name) else "mlp2x_gelu")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_second_stage_starts_from_a_shipped_first_one_or_a_published_model(name: str) -> None:
    start = load_recipe(name).model.path
    if start is None:
        assert name.endswith("-align")
    elif start.startswith("runs/"):
        first = load_recipe(start.removeprefix("runs/"))
        assert first.run.out == start
        assert first.tune.language_model.startswith("frozen")
    else:
        assert start.startswith("liuhaotian/llava-")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_names_its_source_first_and_says_what_is_assumed(name: str) -> None:
    lines = shipped_recipes()[name].read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("# ") for line in lines if line.startswith("# "))
    assert re.search(r"arXiv:|scripts/|XTuner|PaddleMIX|README|^As xtuner-|\.\.\._e1_gpu8|7B recipe's numbers", comment)
    assert all(len(line) <= 120 for line in lines)


def test_the_tiles_of_v1_6_are_the_originals_with_height_first() -> None:
    points = load_recipe("llava-v1.6-7b-instruct").model.image_grid_pinpoints
    assert points == [
        [height, width] for width, height in ([336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008])
    ]


def test_the_list_groups_the_families_one_line_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "list"]) == 0
    printed = capsys.readouterr().out
    headings = [line for line in printed.splitlines() if line in FAMILIES.values()]
    assert headings == list(FAMILIES.values())
    for entry in catalogue():
        (line,) = [line for line in printed.splitlines() if line.split()[:1] == [entry.name]]
        assert line.endswith(f"  {entry.recipe.description}")
        assert len(line) <= 124, line


def test_the_document_holds_the_tables_of_all_families() -> None:
    document = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for heading, entries in by_family():
        assert f"## {heading}\n\n{markdown_table(entries)}\n" in document


@pytest.mark.parametrize(
    ("tune", "says"),
    [
        ({"vision_tower": "last_layers", "vision_tower_layers": 2}, "projector, tower last 2 layers"),
        (
            {"projector": "lora", "language_model": "frozen_4bit"},
            "projector LoRA r64 (language model frozen in 4 bits)",
        ),
    ],
)
def test_what_learns_is_said_in_words(tune: dict[str, object], says: str) -> None:
    values = {"model": {"path": "x"}, "data": {"files": ["x"]}, "optim": {"learning_rate": 1.0}, "tune": tune}
    assert describe_learning(Recipe.model_validate(values)) == says
