"""Which weights each tune mode trains, against what is counted by hand from a small model's names."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from llava.errors import RecipeError
from llava.model.llava import Llava
from llava.model.lora import lora_layers
from llava.train.sections import LoraSection, TuneSection
from llava.train.selection import PARTS, Part, linear_paths, part_of
from llava.train.stages import apply_stage

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWER_LINEAR = ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2")


def trained(model: Llava) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def expected(model: Llava, part: Part, mode: str) -> set[str]:
    """Written out by hand for the tiny model: a tower of three blocks read at -2, a language model of two."""
    names = {name for name, _ in model.named_parameters() if part_of(name) == part and ".lora_" not in name}
    if mode == "frozen":
        return set()
    if part == "projector":
        if mode == "full":
            return names
        if mode == "last_layers":
            return {"multi_modal_projector.linear_2.weight", "multi_modal_projector.linear_2.bias"}
        return {f"multi_modal_projector.linear_{layer}.lora_{side}.default.weight" for layer in (1, 2) for side in "AB"}
    if part == "vision_tower":
        if mode == "full":
            return {n for n in names if ".layers.2." not in n and "post_layernorm" not in n}
        if mode == "last_layers":
            return {n for n in names if ".layers.1." in n}
        head = next(n for n in names if ".layers.0." in n).partition(".0.")[0]
        paths = [
            f"{head}.{block}.{'mlp' if leaf[:2] == 'fc' else 'self_attn'}.{leaf}"
            for block in (0, 1)
            for leaf in TOWER_LINEAR
        ]
        return {f"{path}.lora_{side}.default.weight" for path in paths for side in "AB"}
    if mode == "full":
        return names
    if mode == "last_layers":
        ends = {"language_model.model.norm.weight", "language_model.lm_head.weight"}
        return {n for n in names if ".layers.1." in n} | ends
    return {
        f"language_model.model.layers.{block}.{'self_attn' if leaf in PROJECTIONS[:4] else 'mlp'}.{leaf}"
        f".lora_{side}.default.weight"
        for block in (0, 1)
        for leaf in PROJECTIONS
        for side in "AB"
    }


def make_tune(modes: dict[Part, str]) -> TuneSection:
    layers = {f"{part}_layers": 1 for part, mode in modes.items() if mode == "last_layers"}
    return TuneSection(**modes, **layers, language_model_lora=LoraSection(rank=2))  # type: ignore[arg-type]


# all but the first, in which nothing learns: a recipe refuses that
COMBINATIONS = list(itertools.product(("frozen", "full", "last_layers", "lora"), repeat=3))[1:]


@pytest.mark.parametrize("modes", COMBINATIONS, ids="-".join)
def test_every_combination_of_modes_trains_what_it_says(
    tiny_llava: Callable[..., Llava], modes: tuple[str, str, str]
) -> None:
    chosen = dict(zip(PARTS, modes, strict=True))
    model = tiny_llava()
    summaries = apply_stage(model, make_tune(chosen))
    wanted = set().union(*(expected(model, part, mode) for part, mode in chosen.items()))
    assert trained(model) == wanted
    assert sum(s.trained for s in summaries) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(s.parameters for s in summaries) == sum(p.numel() for p in model.parameters())
    for part, module in (("vision_tower", model.vision_tower), ("language_model", model.language_model)):
        assert module.training is (chosen[part] != "frozen")  # type: ignore[index]


def test_a_tower_with_the_language_models_own_names_is_never_adapted_by_accident(
    tiny_llava: Callable[..., Llava],
) -> None:
    model = tiny_llava()
    for block in model.vision_tower.modules():
        if hasattr(block, "fc1"):  # CLIP's q_proj, k_proj and v_proj are Llama's names already
            block.up_proj, block.down_proj, block.gate_proj = block.fc1, block.fc2, nn.Linear(4, 4)
    assert any(name.endswith("self_attn.q_proj") for name in linear_paths(model, "vision_tower"))
    everything = make_tune({"vision_tower": "frozen", "projector": "frozen", "language_model": "lora"})
    apply_stage(model, everything)
    assert {part_of(path) for path, _ in lora_layers(model)} == {"language_model"}
    loose = LoraSection(targets=r".*\.(q_proj|up_proj)", rank=2)
    model = tiny_llava()
    apply_stage(model, TuneSection(projector="frozen", language_model="lora", language_model_lora=loose))
    assert {part_of(path) for path, _ in lora_layers(model)} == {"language_model"}


def test_targets_are_whole_paths_and_one_that_matches_nothing_is_named(tiny_llava: Callable[..., Llava]) -> None:
    exact = LoraSection(targets=r"language_model\.model\.layers\.1\.self_attn\.v_proj", rank=2)
    model = tiny_llava()
    apply_stage(model, TuneSection(projector="frozen", language_model="lora", language_model_lora=exact))
    assert [path for path, _ in lora_layers(model)] == ["language_model.model.layers.1.self_attn.v_proj"]
    for targets, message in (("q_proj", "'q_proj' matches no linear layer's whole path"), ("(", "no regular exp")):
        wrong = TuneSection(language_model="lora", language_model_lora=LoraSection(targets=targets))
        with pytest.raises(RecipeError, match=message):
            apply_stage(tiny_llava(), wrong)


def test_the_output_layer_is_never_adapted(tiny_llava: Callable[..., Llava]) -> None:
    wrong = TuneSection(language_model="lora", language_model_lora=LoraSection(targets=r".*lm_head"))
    with pytest.raises(RecipeError, match="matches no linear layer"):
        apply_stage(tiny_llava(), wrong)


@pytest.mark.parametrize(("part", "number"), [("language_model", 3), ("vision_tower", 3), ("projector", 3)], ids=str)
def test_more_layers_than_there_are_is_an_error(tiny_llava: Callable[..., Llava], part: str, number: int) -> None:
    tune = TuneSection(**{part: "last_layers", f"{part}_layers": number})  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=rf"tune\.{part}_layers: 3, but the {part} has 2"):
        apply_stage(tiny_llava(), tune)


def test_the_last_layers_of_a_tied_language_model_train_the_shared_matrix_once() -> None:
    from tests.model.test_llava import tiny_model

    model = tiny_model()
    model.language_model.lm_head.weight = model.embed_tokens.weight
    apply_stage(model, TuneSection(projector="frozen", language_model="last_layers", language_model_layers=1))
    shared = [name for name in trained(model) if "embed_tokens" in name or "lm_head" in name]
    assert shared == ["language_model.model.embed_tokens.weight"]


@pytest.mark.parametrize("family", ["mpt", "gpt_neox", "qwen2", "phi3", "gemma"])
def test_blocks_and_targets_are_found_in_other_language_models(family: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from tests.train.tiny_training import build_tiny_llava

    small = {
        "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 64},
        "gpt_neox": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "vocab_size": 64,
            "intermediate_size": 48,
        },
    }
    llama = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "head_dim": 16}  # fmt: skip
    if family == "phi3":
        del llama["head_dim"]
    model = build_tiny_llava()
    with torch.device("cpu"):
        model.language_model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**small.get(family, llama)))
    tune = TuneSection(projector="frozen", language_model="lora", language_model_lora=LoraSection(rank=2))
    apply_stage(model, tune)
    assert len([path for path, _ in lora_layers(model)]) == {
        "mpt": 8, "gpt_neox": 8, "qwen2": 14, "phi3": 8, "gemma": 14}[family]  # fmt: skip
    last = TuneSection(projector="frozen", language_model="last_layers", language_model_layers=1)
    model.language_model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**small.get(family, llama)))
    apply_stage(model, last)
    names = trained(model)
    assert any(".1." in name for name in names) and not any(".0." in name for name in names)
    assert any("norm" in name and ".1." not in name for name in names), "the final norm"


def test_a_recipe_that_names_one_value_of_a_lora_keeps_the_others() -> None:
    tune = TuneSection.model_validate({"language_model": "lora", "language_model_lora": {"dropout": 0.0}})
    assert tune.language_model_lora == LoraSection(rank=128, alpha=256.0, dropout=0.0)
    assert TuneSection().language_model_lora == LoraSection(rank=128, alpha=256.0)
    tower = TuneSection.model_validate({"vision_tower": "lora", "vision_tower_lora": {"rank": 8}})
    assert tower.vision_tower_lora == LoraSection(rank=8)
