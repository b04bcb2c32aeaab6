"""MMPretrain's LLaVA: one `.pth` with the original's keys behind `model.lang_encoder.`, read only.

The CLIP part is a second .pth in MMPretrain's own ViT naming; without it the tower's folder gives the weights, as they
are the published CLIP's. Neither file says how the model is built or tokenized: that comes from the folder given as
base (the LLaVA or language model that MMPretrain names as its tokenizer).

MMPretrain itself reads the tower's last block, while these weights were trained on the one before; opened here they
get the layer that they were trained on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.checkpoint.opened import Decision, Opened, OpenOptions
from llava.checkpoint.weights import Source, load_torch, sources_of
from llava.errors import CheckpointError, UsageError

LANGUAGE = "model.lang_encoder."
# the tower inside a whole model, the tower alone in the three spellings of MMPretrain's converters
TOWERS = ("model.vision_tower.", "backbone.", "visual.", "")
OWN_TOWER = "model.vision_tower.vision_tower.vision_model."
TOWER_TOP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.projection.weight": "embeddings.patch_embedding.weight",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
    "ln1.weight": "post_layernorm.weight",
    "ln1.bias": "post_layernorm.bias",
}
TOWER_LAYER = {
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "ffn.layers.0.0": "mlp.fc1",
    "ffn.layers.1": "mlp.fc2",
}
TOWER_BLOCK = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
FINAL_NORM = ("post_layernorm.weight", "post_layernorm.bias")
PROJECTOR = "model.mm_projector."


def detect(folder: Path, data: Mapping[str, Any]) -> bool:
    """Whether a folder holds a .pth with MMPretrain's keys; config.json, if any, is not its own."""
    return any(key.startswith(LANGUAGE) for path in folder.glob("*.pth") for key in read_pth(path))


def read(folder: Path, data: Mapping[str, Any], options: OpenOptions) -> Opened:
    """Understand a folder. Raises UsageError without a base, CheckpointError for keys that no LLaVA has."""
    from llava.checkpoint.load import read_config
    from llava.checkpoint.original import find_tower, read_full

    if options.base is None:
        raise UsageError(
            f"{folder}: an MMPretrain .pth holds neither configuration nor tokenizer; name the folder of the LLaVA or "
            "language model that it was made of with base=, --base"
        )
    base = read_config(options.base)
    language, tower, head = _split(folder)
    settings = _settings(base, language, has_tower=bool(tower), vision_tower=options.vision_tower, folder=folder)
    raw = dict(language)
    notes = ["MMPretrain itself reads the tower's last block; these weights were trained on the one before"]
    if tower:
        raw.update(tower)
        where = find_tower(str(settings["mm_vision_tower"]), folder, options)
        missing = [name for name in FINAL_NORM if OWN_TOWER + name not in tower]
        if len(missing) == len(FINAL_NORM):
            raw.update(_final_norm(where))
            notes.append("the tower's final norm, which LLaVA does not use, is that of the tower's folder")
    opened = read_full(folder, settings, options, raw=raw, name="mmpretrain", tokenizer_folder=options.base)
    kept = "the tower's .pth" if tower else "the tower's folder; there is no .pth of it"
    return replace(
        opened,
        decisions=(
            Decision("format", "mmpretrain", f"keys {LANGUAGE}* in a .pth"),
            Decision("configuration and tokenizer", str(options.base), "base= was given"),
            Decision("weights of the tower", kept, "the .pth files in the folder"),
            *(decision for decision in opened.decisions if decision.what not in ("format", "vision tower weights")),
        ),
        ignored={**opened.ignored, **dict.fromkeys(head, "a classification head, not LLaVA's")},
        notes=(*opened.notes, *notes),
    )


def read_pth(path: Path) -> dict[str, Source]:
    """The tensors of a .pth, inside a training checkpoint's `state_dict` too. Raises CheckpointError as load_torch."""

    def state() -> Mapping[str, Any]:
        loaded = load_torch(path)
        inner = loaded.get("state_dict", loaded)
        if not isinstance(inner, Mapping):
            raise CheckpointError(f"{path}: its state_dict is a {type(inner).__name__}, not a dict of tensors")
        return inner

    tensors = state()
    # memory-mapped: the tensors of an open file cost nothing until they are read
    return sources_of(tensors, path, lambda key: tensors[key])


def _split(folder: Path) -> tuple[dict[str, Source], dict[str, Source], list[str]]:
    """The language model's side and the tower under the original's names, and the keys of classification heads."""
    language: dict[str, Source] = {}
    tower: dict[str, Source] = {}
    head: list[str] = []
    for path in sorted(folder.glob("*.pth")):
        tensors = read_pth(path)
        prefix = next((start for start in TOWERS if f"{start}cls_token" in tensors), None)
        for key, source in tensors.items():
            if key.startswith(LANGUAGE):
                language[key.removeprefix(LANGUAGE)] = source
            elif key.startswith(("head.", "visual_proj.")) or (prefix == "visual." and not key.startswith(prefix)):
                head.append(key)
            elif prefix is None or not key.startswith(prefix):
                raise CheckpointError(f"{path}: unexpected key {key!r} of shape {list(source.shape)}")
            else:
                tower.update(_tower_tensor(key.removeprefix(prefix), source))
    return language, tower, head


def _tower_tensor(name: str, source: Source) -> dict[str, Source]:
    """One tensor of MMPretrain's ViT as Hugging Face's: without batch axes, q, k and v apart."""
    if name in ("cls_token", "pos_embed"):
        shape = source.shape[-1:] if name == "cls_token" else source.shape[-2:]
        return {OWN_TOWER + TOWER_TOP[name]: source.changed(lambda: source.read().reshape(shape), shape=shape)}
    if name in TOWER_TOP:
        return {OWN_TOWER + TOWER_TOP[name]: source}
    match = TOWER_BLOCK.fullmatch(name)
    if match is not None and match[2] in TOWER_LAYER:
        return {f"{OWN_TOWER}encoder.layers.{match[1]}.{TOWER_LAYER[match[2]]}.{match[3]}": source}
    if match is not None and match[2] == "attn.qkv" and source.shape[0] % 3 == 0:
        place = f"{OWN_TOWER}encoder.layers.{match[1]}.self_attn"
        return {f"{place}.{side}_proj.{match[3]}": _third(source, number) for number, side in enumerate("qkv")}
    raise CheckpointError(f"{source.file}: unexpected key {source.key!r} of shape {list(source.shape)}")


def _third(source: Source, number: int) -> Source:
    shape = (source.shape[0] // 3, *source.shape[1:])
    return source.changed(lambda: source.read().chunk(3)[number].clone(), shape=shape)


def _final_norm(folder: Path) -> dict[str, Source]:
    from llava.checkpoint.load import read_config
    from llava.checkpoint.parts import open_tower

    _, tensors = open_tower(folder, read_config(folder))
    return {OWN_TOWER + name: tensors[f"vision_tower.vision_model.{name}"] for name in FINAL_NORM}


def _settings(
    base: Mapping[str, Any],
    language: Mapping[str, Source],
    *,
    has_tower: bool,
    vision_tower: Path | None,
    folder: Path,
) -> dict[str, Any]:
    """A config.json in the original's words: the base's, with what the tensors themselves say."""
    depth = sum(key.startswith(PROJECTOR) and key.endswith("weight") for key in language)
    if depth == 0:
        raise CheckpointError(f"{folder}: no {LANGUAGE}{PROJECTOR}* in its .pth files; this is no whole LLaVA")
    plain = f"{PROJECTOR}weight" in language
    text = dict(base.get("text_config", base))
    settings: dict[str, Any] = {
        "image_aspect_ratio": "square" if plain else "pad",
        "mm_vision_select_layer": -2,
        **text,
        "mm_projector_type": "linear" if plain else f"mlp{depth}x_gelu",
        "unfreeze_mm_vision_tower": has_tower,
    }
    if vision_tower is not None:
        settings["mm_vision_tower"] = str(vision_tower)
    elif "mm_vision_tower" not in settings:
        raise UsageError(f"{folder}: name the tower's folder by vision_tower=; the base's config.json has none")
    embedding = language.get("model.embed_tokens.weight")
    if embedding is not None:
        settings["vocab_size"] = embedding.shape[0]
    return settings
