"""Parts of a LLaVA alone: a folder with a causal language model, a folder with a vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.checkpoint import internlm2
from llava.checkpoint.names import COMPUTED, LANGUAGE_MODEL, NOT_OF_THE_TOWER, TOWER, refuse_strangers
from llava.checkpoint.opened import EMBEDDINGS, HEAD
from llava.checkpoint.weights import Source, read_folder
from llava.errors import CheckpointError
from llava.model.config import complete_config

TOWER_TYPES = {
    "clip": "clip_vision_model",
    "clip_vision_model": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip_vision_model": "siglip_vision_model",
}


def open_language_model(folder: Path, data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Source]]:
    """Configuration and tensors (common names) of a causal language model's folder.

    data: its config.json. Raises CheckpointError for an architecture that transformers does not have, or for keys
    that are not a language model's.
    """
    if "model_type" not in data:
        raise CheckpointError(f"{folder}: no config.json with a model_type; this is not a language model's folder")
    config = language_config(data, folder)
    raw = read_language_model(read_folder(folder), str(data["model_type"]), data, folder)
    tensors, unknown = LANGUAGE_MODEL.rename_all(raw)
    refuse_strangers(raw, unknown, "a causal language model")
    learnt = {name: source for name, source in tensors.items() if not COMPUTED.search(name)}
    if HEAD not in learnt and not config.get("tie_word_embeddings"):
        raise CheckpointError(
            f"{folder}: no lm_head.weight, and config.json does not tie it to the embedding; set tie_word_embeddings "
            "to true if it is tied"
        )
    return config, learnt


def language_config(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A language model's configuration as transformers knows it; InternLM2 becomes the Llama that it is."""
    if data.get("model_type") == "internlm2":
        data = internlm2.llama_config(data)
    return complete_config(data, "llama", origin=str(folder / "config.json"))


def read_language_model(
    raw: Mapping[str, Source], kind: str, data: Mapping[str, Any], folder: Path
) -> Mapping[str, Source]:
    """A language model's tensors under transformers' names; only InternLM2's differ."""
    return internlm2.as_llama(raw, data, folder) if kind == "internlm2" else raw


def embedding_name(tensors: Mapping[str, Source]) -> str:
    """The common name of the embedding among tensors."""
    for name in EMBEDDINGS:
        if name in tensors:
            return name
    raise CheckpointError(f"{next(iter(tensors.values())).file}: no embedding; missing: 'model.embed_tokens.weight'")


def open_tower(folder: Path, data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Source]]:
    """Configuration and tensors (common names) of a vision tower's folder: CLIP or SigLIP, whole or its vision half."""
    kind = str(data.get("model_type", ""))
    if kind not in TOWER_TYPES:
        known = ", ".join(sorted(TOWER_TYPES))
        raise CheckpointError(f"{folder}: vision tower of model_type {kind!r}; known: {known}")
    values = data.get("vision_config", data) if kind in ("clip", "siglip") else data
    vision = {**values, "model_type": TOWER_TYPES[kind]}
    raw = read_folder(folder)
    tensors, unknown = TOWER.rename_all(raw)
    refuse_strangers(raw, [name for name in unknown if not name.startswith(NOT_OF_THE_TOWER)], "a vision tower")
    learnt = {name: source for name, source in tensors.items() if not COMPUTED.search(name)}
    if kind.startswith("siglip"):
        vision["vision_use_head"] = any(name.startswith("vision_tower.vision_model.head.") for name in learnt)
    return complete_config(vision, TOWER_TYPES[kind], origin=str(folder / "config.json")), learnt
