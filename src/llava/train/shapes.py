"""A run's model as shapes alone: from config.json files, or from names that everybody knows, without any weights.

    model, summaries = shape_model(recipe)     # fake tensors: see train/memory_trace.py

So that somebody on a laptop can plan a run on eight GPUs before downloading anything. A part's configuration is taken
from its folder when it is here, else from KNOWN by the last word of its name, else its config.json from the hub. A
recipe that starts from another shipped recipe's folder has that one's parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.checkpoint.folders import read_config
from llava.checkpoint.parts import TOWER_TYPES, language_config
from llava.errors import CheckpointError, RecipeError, name_nearest
from llava.model.config import LlavaConfig, complete_config
from llava.model.llava import Llava
from llava.model.lora import lora_layers
from llava.train.memory_trace import fake_copy
from llava.train.recipe import load_recipe, shipped_recipes
from llava.train.sections import ModelSection, Recipe, TuneSection
from llava.train.selection import PARTS, is_packed, linear_paths, mode_of, plan_storage
from llava.train.stages import PartSummary, apply_stage

_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # LLaVA-1.6's


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }


def _tower(kind: str, hidden: int, intermediate: int, layers: int, heads: int, size: int, patch: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": patch,
    }


_VICUNA_7B, _VICUNA_13B = _llama(4096, 11008, 32, 32, 32, 32000), _llama(5120, 13824, 40, 40, 40, 32000)
_CLIP_336 = _tower("clip_vision_model", 1024, 4096, 24, 16, 336, 14)

# The published config.json files' numbers, by the last word of the hub id.
KNOWN: dict[str, dict[str, Any]] = {
    **{f"vicuna-7b-{version}": _VICUNA_7B for version in ("v0", "v1.1", "v1.3", "v1.5")},
    **{f"vicuna-13b-{version}": _VICUNA_13B for version in ("v0", "v1.1", "v1.3", "v1.5")},
    "Meta-Llama-3-8B-Instruct": _llama(4096, 14336, 32, 32, 8, 128256),
    "Meta-Llama-3-70B-Instruct": _llama(8192, 28672, 80, 64, 8, 128256),
    "internlm2-chat-7b": _llama(4096, 14336, 32, 32, 8, 92544),
    "internlm2-chat-20b": _llama(6144, 16384, 48, 48, 8, 92544),
    "Phi-3-mini-4k-instruct": {**_llama(3072, 8192, 32, 32, 32, 32064), "model_type": "phi3"},
    "Mistral-7B-Instruct-v0.2": {**_llama(4096, 14336, 32, 32, 8, 32000), "model_type": "mistral"},
    "mpt-7b-chat": {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432},
    "clip-vit-large-patch14": _tower("clip_vision_model", 1024, 4096, 24, 16, 224, 14),
    "clip-vit-large-patch14-336": _CLIP_336,
    "siglip-so400m-patch14-384": _tower("siglip_vision_model", 1152, 4304, 27, 16, 384, 14),
}
# Whole LLaVAs: language model, tower, projector.
KNOWN_MODELS: dict[str, tuple[str, str, str]] = {
    "llava-v1.5-7b": ("vicuna-7b-v1.5", "clip-vit-large-patch14-336", "mlp2x_gelu"),
    "llava-v1.5-13b": ("vicuna-13b-v1.5", "clip-vit-large-patch14-336", "mlp2x_gelu"),
    "llava-v1.6-vicuna-7b": ("vicuna-7b-v1.5", "clip-vit-large-patch14-336", "mlp2x_gelu"),
    "llava-v1.6-vicuna-13b": ("vicuna-13b-v1.5", "clip-vit-large-patch14-336", "mlp2x_gelu"),
    "llava-v1.6-mistral-7b": ("Mistral-7B-Instruct-v0.2", "clip-vit-large-patch14-336", "mlp2x_gelu"),
    "llava-pretrain-vicuna-13b-v1.3": ("vicuna-13b-v1.3", "clip-vit-large-patch14", "linear"),
    "llava-1.5-7b-hf": ("vicuna-7b-v1.5", "clip-vit-large-patch14-336", "mlp2x_gelu"),
    "llava-1.5-13b-hf": ("vicuna-13b-v1.5", "clip-vit-large-patch14-336", "mlp2x_gelu"),
}


def shape_model(recipe: Recipe, *, dtype: torch.dtype = torch.bfloat16) -> tuple[Llava, list[PartSummary]]:
    """The recipe's model without values, with its stage applied: what trains, in which format what is held.

    dtype: of matrix products. NF4 layers are stand-ins of the same size that unpack themselves in use, so that
    bitsandbytes is not needed. Raises CheckpointError for a part of which nothing is known.
    """
    config = find_config(recipe.model)
    tune = _unpacked(recipe.tune)
    with torch.device("meta"):
        model = Llava.from_config(config)
        packed = [part for part in PARTS if is_packed(mode_of(recipe.tune, part))]
        paths = {path for part in packed for path in linear_paths(model, part)}
        for name, storage in plan_storage(model, tune, dtype).items():
            assert isinstance(storage, torch.dtype), "nothing is packed here"
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(storage)
        summaries = apply_stage(model, tune, optim=recipe.optim, compute=dtype)
        _pack(model, paths, dtype)
    fake, _ = fake_copy(model)
    named = {part: mode_of(recipe.tune, part) for part in packed}
    changed = [
        PartSummary(**{**vars(s), "mode": named[s.part], "held_in": f"nf4, {s.held_in}"}) if s.part in named else s
        for s in summaries
    ]
    return fake, changed


def find_config(wanted: ModelSection) -> LlavaConfig:
    """The configuration of the model that a recipe starts from. Raises CheckpointError when it cannot be found."""
    if wanted.path is None:
        assert wanted.language_model is not None and wanted.vision_tower is not None
        config = _assemble(wanted.language_model, wanted.vision_tower, wanted)
    else:
        config = _config_of_path(wanted.path, wanted)
    if wanted.image_mode not in (None, config.image_mode):
        tiled = wanted.image_mode == "anyres"
        points = wanted.image_grid_pinpoints or (_PINPOINTS if tiled else [])
        return config.with_changes(
            image_mode=wanted.image_mode,
            image_grid_pinpoints=tuple((int(h), int(w)) for h, w in points),
            merge_type="spatial_unpad" if tiled else "flat",
        )
    return config


def _config_of_path(path: str, wanted: ModelSection) -> LlavaConfig:
    folder = Path(path).expanduser()
    data: Mapping[str, Any] = read_config(folder) if folder.is_dir() else {}
    if "vision_config" in data and "text_config" in data:
        return LlavaConfig.from_dict(data, origin=str(folder / "config.json"))
    if "mm_vision_tower" in data:  # the original's layout: the language model's own keys, and ours with mm_
        projector = str(data.get("mm_projector_type", "linear"))
        return _assemble(folder, str(data["mm_vision_tower"]), wanted.model_copy(update={"projector": projector}))
    if folder.name in KNOWN_MODELS:
        language, tower, projector = KNOWN_MODELS[folder.name]
        return _assemble(language, tower, wanted.model_copy(update={"projector": projector}))
    for name in shipped_recipes():
        earlier = load_recipe(name)
        if earlier.run.out == path:
            return find_config(earlier.model)
    if folder.is_dir():
        raise CheckpointError(f"{folder}: no config.json of a LLaVA; its shapes are not known")
    data = _hub_config(path, KNOWN_MODELS)
    if "vision_config" in data and "text_config" in data:
        return LlavaConfig.from_dict(data, origin=f"{path}/config.json")
    raise CheckpointError(f"{path}: its config.json is not a LLaVA's of Hugging Face; download it first")


def _assemble(language_model: str | Path, vision_tower: str, wanted: ModelSection) -> LlavaConfig:
    text = language_config(_part_config(language_model), Path(language_model))
    vision = _part_config(vision_tower)
    kind = str(vision.get("model_type"))
    if kind not in TOWER_TYPES:
        raise CheckpointError(f"{vision_tower}: vision tower of model_type {kind!r}; known: {', '.join(TOWER_TYPES)}")
    values = vision.get("vision_config", vision) if kind in ("clip", "siglip") else vision
    tower = complete_config({**values, "model_type": TOWER_TYPES[kind]}, TOWER_TYPES[kind], origin=vision_tower)
    vocabulary = int(text["vocab_size"])
    rows = math.ceil((vocabulary + 1) / 64) * 64  # as checkpoint.huggingface grows it for <image>
    tiled = wanted.image_mode == "anyres"
    return LlavaConfig(
        vision_config=tower,
        text_config={**text, "vocab_size": rows},
        image_token_id=vocabulary,
        projector=wanted.projector,
        vision_feature_layer=-2 if wanted.vision_feature_layer is None else wanted.vision_feature_layer,
        image_mode=wanted.image_mode or "pad",
        image_grid_pinpoints=tuple((int(h), int(w)) for h, w in wanted.image_grid_pinpoints or _PINPOINTS)
        if tiled
        else (),
        merge_type="spatial_unpad" if tiled else "flat",
    )


def _part_config(name: str | Path) -> Mapping[str, Any]:
    folder = Path(name).expanduser()
    if folder.is_dir():
        data = read_config(folder)
        if "model_type" not in data:
            raise CheckpointError(f"{folder}: no config.json with a model_type")
        return data
    return KNOWN.get(folder.name) or _hub_config(str(name), KNOWN)


def _hub_config(name: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
    """A repository's config.json alone."""
    import json

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        text = Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name}: no folder here, no shape known by that name, and the hub did not give its config.json; "
            f"{name_nearest(Path(name).name, known)}"
        ) from error
    data: dict[str, Any] = json.loads(text)
    return data


# --- NF4 without bitsandbytes --------------------------------------------------------------------------------------


def _unpacked(tune: TuneSection) -> TuneSection:
    plain = {"qlora": "lora", "frozen_4bit": "frozen"}
    return tune.model_copy(update={part: plain.get(mode_of(tune, part), mode_of(tune, part)) for part in PARTS})


def _pack(model: Llava, paths: set[str], dtype: torch.dtype) -> None:
    """Put a stand-in in the place of each linear layer that NF4 holds, inside its adapter where it has one."""
    adapted = dict(lora_layers(model))
    for path in paths:
        owner: Any = adapted.get(path)
        old: Any = owner.base_layer if owner is not None else model.get_submodule(path)
        if not isinstance(old, nn.Linear):
            raise RecipeError(f"{path}: {type(old).__name__} is no linear layer; it cannot be held in 4 bit")
        new = PackedLinear(old, dtype)
        if owner is not None:
            owner.base_layer = new
        else:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)


class PackedLinear(nn.Module):
    """A linear layer as NF4 with double quantisation holds it: half a byte a number, one for each 64, four for each
    256 of those; unpacked whole in each use, and nothing of that kept for the backward pass. Shapes only."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        count = layer.weight.numel()
        packed = math.ceil(count / 2) + math.ceil(count / 64) + 4 * math.ceil(count / 64 / 256)
        self.weight = nn.Parameter(torch.empty(packed, dtype=torch.uint8), requires_grad=False)
        self.bias = layer.bias
        self._dtype = dtype

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: (..., in). Returns (..., out)."""
        sizes = (self.out_features, self.in_features)
        made: Tensor = _Unpacked.apply(inputs, self.weight, sizes, self._dtype)  # type: ignore[no-untyped-call]
        return made if self.bias is None else made + self.bias


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, sizes: tuple[int, int], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.sizes, ctx.dtype, ctx.wanted = sizes, dtype, inputs.dtype
        unpacked = torch.empty(sizes, dtype=dtype, device=weight.device)
        return inputs.to(dtype) @ unpacked.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        unpacked = torch.empty(ctx.sizes, dtype=ctx.dtype, device=weight.device)
        return (gradients[0].to(ctx.dtype) @ unpacked).to(ctx.wanted), None, None, None
