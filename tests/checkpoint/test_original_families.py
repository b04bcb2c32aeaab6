"""The original's layout with each language model that it or its peers use: tiny, random, written by the test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import llava

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoints"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 480,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": ("llava_llama", {}),
    "mistral": ("llava_mistral", {"sliding_window": 4}),
    "qwen2": ("llava_qwen", {"tie_word_embeddings": True}),
    "phi3": ("llava_phi3", {}),
    "internlm2": ("llava_internlm2", {}),
}


@pytest.fixture(autouse=True)
def _in_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN / "bases")


def as_internlm2(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Llama's tensors under InternLM2's names: two query heads, the key, the value of each group in one weight."""
    names = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
    }
    out = {}
    for key, value in state.items():
        if ".q_proj." in key:
            k, v = (state[key.replace("q_proj", f"{part}_proj")] for part in "kv")
            q, k, v = value.view(2, 2, 16, 64), k.view(2, 1, 16, 64), v.view(2, 1, 16, 64)
            layer = key.split(".self_attn")[0]
            out[f"{layer}.attention.wqkv.weight"] = torch.cat([q, k, v], dim=1).reshape(-1, 64).contiguous()
        elif ".k_proj." not in key and ".v_proj." not in key:
            for old, new in names.items():
                key = key.replace(old, new)
            out[key] = value
    return out


def write_original(folder: Path, family: str, projector: str) -> Any:
    """A checkpoint of the original's layout in `folder`; returns the language model that is in it."""
    import transformers

    model_type, changes = FAMILIES[family]
    torch.manual_seed(0)
    kind = "llama" if family == "internlm2" else family
    config = transformers.CONFIG_MAPPING[kind](**{**SIZES, **changes})
    language = transformers.AutoModelForCausalLM.from_config(config).eval()
    state = dict(language.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    if family == "internlm2":
        state = as_internlm2(state)
    depth = 1 if projector == "linear" else int(projector[3])
    for index in range(depth):
        slot = "" if projector == "linear" else f"{2 * index}."
        state[f"model.mm_projector.{slot}weight"] = torch.randn(64, 32 if index == 0 else 64) * 0.1
        state[f"model.mm_projector.{slot}bias"] = torch.randn(64) * 0.1
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    data = {
        **SIZES,
        **changes,
        "model_type": model_type,
        "mm_vision_tower": "openai/clip-tiny-patch14-56",
        "mm_hidden_size": 32,
        "mm_projector_type": projector,
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
        "mm_use_im_patch_token": False,
    }
    if family == "internlm2":
        data |= {"bias": False, "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}}
        data["rms_norm_eps"] = config.rms_norm_eps
    if family in ("qwen2", "phi3", "mistral"):
        data["rms_norm_eps"] = config.rms_norm_eps
    (folder / "config.json").write_text(json.dumps(data))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / "bases" / "vicuna-tiny-v1.5" / name, folder)
    return language


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_opens_with_the_logits_of_its_own_class(family: str, projector: str, tmp_path: Path) -> None:
    language = write_original(tmp_path / "model", family, projector)
    loaded = llava.load(tmp_path / "model", device="cpu", dtype="float32")
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    token = loaded.processor.image_token_id
    row = torch.cat([torch.arange(3, 9), torch.full((16,), token), torch.arange(20, 30)])[None]
    with torch.no_grad():
        features = loaded.model.encode_images(pixels)[0]
        embeddings = language.get_input_embeddings()(row.clamp(max=479))
        embeddings[0, 6:22] = features
        expected = language(inputs_embeds=embeddings).logits
        found = loaded.model.logits(loaded.model(row, pixel_values=pixels))
    assert (found - expected).abs().max() < 1e-5
    assert loaded.model.config.projector == projector


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_converts_to_hf_and_back(family: str, tmp_path: Path) -> None:
    from llava.checkpoint.convert import convert

    write_original(tmp_path / "model", family, "mlp2x_gelu")
    convert(tmp_path / "model", tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "back", to="original")
    first = llava.load(tmp_path / "model", device="cpu", dtype="float32").model
    for name in ("hf", "back"):
        again = llava.load(tmp_path / name, device="cpu", dtype="float32").model
        row = torch.arange(3, 40)[None]
        with torch.no_grad():
            expected = first.logits(first(row))
            assert (again.logits(again(row))[..., :480] - expected).abs().max() < 1e-6


def test_mistral_gets_its_own_template_and_the_fast_classes_ids(tmp_path: Path) -> None:
    write_original(tmp_path / "prompt", "mistral", "mlp2x_gelu")
    processor = llava.load(tmp_path / "prompt", device="cpu", dtype="float32").processor
    assert processor.template.name == "mistral_instruct"
    assert processor.tokenizer.legacy is True  # type: ignore[attr-defined]
