"""XTuner's folders: parts on a base, LoRA merged as peft merges it, and a whole model written and read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import llava
from llava.checkpoint import xtuner
from llava.checkpoint.convert import convert
from llava.checkpoint.load import open_checkpoint
from llava.errors import CheckpointError, UsageError
from llava.prompt.conversation import Conversation, Image, Message, Text

# peft asks transformers 5 for a property by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoints"
BASE = GOLDEN / "bases" / "vicuna-tiny-v1.5"
TOWER = GOLDEN / "bases" / "openai" / "clip-tiny-patch14-56"
WIDTH, TOWER_WIDTH = 64, 32
INTERNLM2_NAMES = (
    ("model.embed_tokens", "model.tok_embeddings"),
    ("lm_head", "output"),
    ("self_attn.o_proj", "attention.wo"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.up_proj", "feed_forward.w3"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
)
RECIPE = """
from xtuner.utils import PROMPT_TEMPLATE
raise SystemExit("this file is never run")
llm_name_or_path = 'lmsys/vicuna-7b-v1.5'
visual_encoder_name_or_path = {tower!r}
prompt_template = PROMPT_TEMPLATE.{template}
train_dataset = dict(type=LLaVADataset, pad_image_to_square={pads})
model = dict(type=LLaVAModel, freeze_llm=True, visual_select_layer={layer})
"""


def projector_state(depth: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    out = {}
    for index in range(depth):
        columns = TOWER_WIDTH if index == 0 else WIDTH
        out[f"model.{2 * index}.weight"] = torch.randn(WIDTH, columns, generator=generator) / columns**0.5
        out[f"model.{2 * index}.bias"] = torch.randn(WIDTH, generator=generator) * 0.1
    return out


def write_parts(folder: Path, *, depth: int = 2, **recipe: Any) -> Path:
    """A folder as `xtuner convert pth_to_hf` leaves it when only the projector was trained."""
    (folder / "projector").mkdir(parents=True)
    about = {"model_type": "projector", "depth": depth, "hidden_act": "gelu", "bias": True}
    remote = {"auto_map": {"AutoModel": "modeling_projector.ProjectorModel"}}
    (folder / "projector" / "config.json").write_text(json.dumps({**about, **remote}))
    (folder / "projector" / "modeling_projector.py").write_text("raise SystemExit('never run')")
    save_file(projector_state(depth), folder / "projector" / "model.safetensors")
    if recipe:
        settings = {"tower": str(TOWER), "template": "vicuna", "pads": True, "layer": -2, **recipe}
        (folder / "xtuner_config.py").write_text(RECIPE.format(**settings))
    return folder


def adapt(model: Any, targets: list[str], folder: Path) -> dict[str, torch.Tensor]:
    """Write a LoRA with peft as XTuner does; returns the weights as peft itself merges them."""
    import peft

    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model.float(), settings)
    adapted.save_pretrained(folder)
    merged: dict[str, torch.Tensor] = adapted.merge_and_unload().state_dict()
    return merged


def language_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE)


def tower() -> Any:
    from transformers import CLIPVisionModel

    return CLIPVisionModel.from_pretrained(TOWER)


def test_a_projector_on_base_and_tower_opens_with_what_the_recipe_says(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "attempt-3", layer=-3, pads=False)
    opened = open_checkpoint(folder, base=BASE)
    assert (opened.config.template, opened.config.image_mode) == ("xtuner_vicuna", "crop")
    assert (opened.config.projector, opened.config.vision_feature_layer) == ("mlp2x_gelu", -3)
    loaded = llava.load(folder, base=BASE, device="cpu", dtype="float32")
    for key, value in projector_state().items():
        number, leaf = int(key.split(".")[1]) // 2 + 1, key.split(".")[2]
        assert torch.equal(loaded.model.multi_modal_projector.get_parameter(f"linear_{number}.{leaf}"), value)
    assert torch.equal(loaded.model.lm_head.weight, language_model().lm_head.weight.float())  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [1, 3])
def test_the_projectors_depth_is_in_its_own_config(tmp_path: Path, depth: int) -> None:
    folder = write_parts(tmp_path / "m", depth=depth)
    loaded = llava.load(folder, base=BASE, vision_tower=TOWER, device="cpu")
    assert loaded.model.config.projector == ("linear" if depth == 1 else "mlp3x_gelu")


def test_both_loras_are_merged_as_peft_merges_them(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "m")
    words = adapt(language_model(), ["q_proj", "up_proj", "down_proj"], folder / "llm_adapter")
    sight = adapt(tower(), ["q_proj", "fc1", "fc2"], folder / "visual_encoder_adapter")
    loaded = llava.load(folder, base=BASE, vision_tower=TOWER, device="cpu", dtype="float32")
    for model, expected in ((loaded.model.language_model, words), (loaded.model.vision_tower, sight)):
        state = {key.removeprefix("vision_model."): value for key, value in model.state_dict().items()}
        for name, value in expected.items():
            torch.testing.assert_close(state[name.removeprefix("vision_model.")], value, rtol=0, atol=1e-6)


def test_a_lora_of_a_qlora_run_is_merged_into_the_16_bit_base(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "m")
    words = adapt(language_model(), ["q_proj"], folder / "llm_adapter")
    quantised = tmp_path / "base-4bit"
    shutil.copytree(BASE, quantised)
    data = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**data, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(CheckpointError, match="the 16-bit model, and that one is the base"):
        open_checkpoint(folder, base=quantised, vision_tower=TOWER)
    opened = open_checkpoint(folder, base=BASE, vision_tower=TOWER)
    value = opened.tensors["language_model.model.layers.0.self_attn.q_proj.weight"].read()
    torch.testing.assert_close(value, words["model.layers.0.self_attn.q_proj.weight"], rtol=0, atol=1e-6)


def test_a_lora_can_stay_beside_the_weights(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "m")
    adapt(language_model(), ["q_proj"], folder / "llm_adapter")
    places = {"base": BASE, "vision_tower": TOWER, "device": "cpu", "dtype": "float32"}
    apart, together = (llava.load(folder, merge_lora=merge, **places) for merge in (False, True))  # type: ignore[arg-type]
    row = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(apart.model(row), together.model(row), rtol=0, atol=1e-5)


def test_a_tower_and_a_language_model_trained_in_full_are_taken_from_the_folder(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "m")
    model, sight = language_model(), tower()
    with torch.no_grad():
        model.model.norm.weight.fill_(2)
        sight_norm = next(p for n, p in sight.named_parameters() if "pre_layrnorm.weight" in n)
        sight_norm.fill_(3)
    model.save_pretrained(folder)
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(BASE / file, folder / file)
    sight.save_pretrained(folder / "visual_encoder")
    shutil.copyfile(TOWER / "preprocessor_config.json", folder / "visual_encoder" / "preprocessor_config.json")
    loaded = llava.load(folder, device="cpu")
    state = loaded.model.state_dict()
    assert all(bool((state[name] == 2).all()) for name in state if name.endswith("language_model.model.norm.weight"))
    assert all(bool((state[name] == 3).all()) for name in state if name.endswith("pre_layrnorm.weight"))


def test_a_lora_of_internlm2s_fused_weight_is_merged_before_it_is_split(tmp_path: Path) -> None:
    heads, size = 4, WIDTH // 4
    base = tmp_path / "internlm2"
    base.mkdir()
    state, fused = {}, {}
    for key, value in language_model().state_dict().items():
        name = key
        for ours, theirs in INTERNLM2_NAMES:
            name = name.replace(ours, theirs)
        if "self_attn" not in name:
            state[name] = value.clone()
    for layer in range(2):
        sides = [language_model().state_dict()[f"model.layers.{layer}.self_attn.{side}_proj.weight"] for side in "qkv"]
        packed = torch.stack([side.view(heads, size, WIDTH) for side in sides], dim=1)  # (heads, 3, size, WIDTH)
        fused[f"model.layers.{layer}.attention.wqkv.weight"] = packed.reshape(3 * WIDTH, WIDTH).contiguous()
    save_file(state | fused, base / "model.safetensors")
    config = {**json.loads((BASE / "config.json").read_text()), "model_type": "internlm2", "bias": False}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}
    (base / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(BASE / file, base / file)
    folder = write_parts(tmp_path / "m")
    (folder / "llm_adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["wqkv"]}
    (folder / "llm_adapter" / "adapter_config.json").write_text(json.dumps(settings))
    a, b = torch.randn(4, WIDTH), torch.randn(3 * WIDTH, 4)
    place = "base_model.model.model.layers.1.attention.wqkv"
    save_file(
        {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}, folder / "llm_adapter" / "adapter_model.safetensors"
    )
    loaded = llava.load(folder, base=base, vision_tower=TOWER, device="cpu", dtype="float32")
    whole = fused["model.layers.1.attention.wqkv.weight"].float() + 2 * b @ a
    for number, side in enumerate("qkv"):
        expected = whole.view(heads, 3, size, WIDTH)[:, number].reshape(WIDTH, WIDTH)
        got = loaded.model.language_model.get_parameter(f"model.layers.1.self_attn.{side}_proj.weight")
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert loaded.model.config.template == "internlm2_chat"
    with pytest.raises(UsageError, match="can only be merged"):
        open_checkpoint(folder, base=base, vision_tower=TOWER, merge_lora=False)


def test_what_is_not_in_the_folder_is_asked_for_by_name(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "m", template="vicuna")
    with pytest.raises(UsageError, match=r"no language model; .*base=, --base \(it was trained on 'lmsys/vicuna-7b"):
        open_checkpoint(folder)
    with pytest.raises(UsageError, match=r"no vision tower; .* vision_tower="):
        open_checkpoint(write_parts(tmp_path / "n"), base=BASE)


def test_an_adapter_of_another_base_is_an_error_that_names_both_shapes(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "m")
    adapt(language_model(), ["up_proj"], folder / "llm_adapter")
    file = folder / "llm_adapter" / "adapter_model.safetensors"
    from safetensors.torch import load_file

    state = load_file(file)
    key = next(name for name in state if "lora_A" in name)
    save_file({**state, key: torch.zeros(4, WIDTH + 1)}, file)
    with pytest.raises(CheckpointError, match=r"expected|is it the right base"):
        llava.load(folder, base=BASE, vision_tower=TOWER, device="cpu")


@pytest.mark.parametrize("name", ["vicuna", "mistral", "llama3_chat"])
def test_the_recipes_template_is_found_by_its_name(tmp_path: Path, name: str) -> None:
    opened = open_checkpoint(write_parts(tmp_path / "m", template=name), base=BASE)
    assert opened.config.template == xtuner.XTUNER_TEMPLATES.get(name, name)
    asked = open_checkpoint(tmp_path / "m", base=BASE, template="vicuna_v1")
    assert asked.config.template == "vicuna_v1"


def test_a_model_written_for_xtuner_opens_with_equal_weights_and_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(GOLDEN / "bases")
    source = GOLDEN / "a_v1_5_full" / "llava-v1.5-tiny"
    report = convert(source, tmp_path / "out", to="xtuner")
    assert report.num_compared == len(open_checkpoint(source).tensors)
    ours, theirs = (llava.load(path, device="cpu", dtype="float32") for path in (tmp_path / "out", source))
    state = theirs.model.state_dict()
    for key, value in ours.model.state_dict().items():
        assert torch.equal(value, state[key]), key
    talk = Conversation((Message("user", (Image(GOLDEN / "bases/images/wide.png"), Text("What is it?"))),))
    mine, original = (loaded.processor.encode(talk, open_turn=True) for loaded in (ours, theirs))
    assert mine.input_ids.tolist() == original.input_ids.tolist()
    assert (mine.pixel_values == original.pixel_values).all()


def test_transformers_opens_each_written_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    monkeypatch.chdir(GOLDEN / "bases")
    convert(GOLDEN / "a_v1_5_full" / "llava-v1.5-tiny", tmp_path / "out", to="xtuner")
    tensors = open_checkpoint(tmp_path / "out").tensors
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    assert torch.equal(model.lm_head.weight, tensors["language_model.lm_head.weight"].read())
    sight = CLIPVisionModel.from_pretrained(tmp_path / "out" / "visual_encoder", dtype=torch.float16)
    for name, value in sight.state_dict().items():
        if "position_ids" not in name:
            common = f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"
            assert torch.equal(value, tensors[common].read().half()), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("c_v1_6_anyres/llava-v1.6-vicuna-tiny", "no pictures in tiles"),
        ("b_v1_linear_startend/llava-v1-tiny", "no tokens around a picture"),
    ],
)
def test_what_xtuner_has_no_place_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(GOLDEN / "bases")
    with pytest.raises(CheckpointError, match=message):
        convert(GOLDEN / name, tmp_path / "out", to="xtuner")
    assert not list(tmp_path.iterdir())


def test_an_mpt_is_written_under_its_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(GOLDEN / "bases")
    convert(GOLDEN / "g_mpt" / "llava-mpt-tiny", tmp_path / "out", to="xtuner")
    expected = open_checkpoint(tmp_path / "out").tensors["language_model.model.wte.weight"].read()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    assert torch.equal(model.transformer.wte.weight, expected)
