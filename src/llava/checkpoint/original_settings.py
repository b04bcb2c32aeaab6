"""What the original's config.json says: the language model's own keys, and LLaVA's `mm_*` ones as a LlavaConfig."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.model.config import LlavaConfig
from llava.prompt.tiling import parse_pinpoints

# model_type of the checkpoint to the language model's; "llava" and "llama" are v0's.
LANGUAGE_TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_mixtral": "mixtral",
    "llava_mpt": "mpt",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
    "llava_phi": "phi3",
    "llava_phi3": "phi3",
    "llava_gemma": "gemma",
    "llava_internlm2": "internlm2",
}
IMAGE_MODES = {None: "crop", "square": "crop", "pad": "pad", "anyres": "anyres"}
# config.json keys of LLaVA itself; the rest is the language model's.
OWN_KEYS = re.compile(
    r"mm_.*|tune_mm_.*|freeze_mm_.*|unfreeze_mm_.*|use_mm_proj|image_aspect_ratio|image_grid_pinpoints|"
    r"image_(crop|split)_resolution|tokenizer_(model_max_length|padding_side)|s2(_scales)?|sep_image_conv_front|"
    r"architectures|llava|auto_map|torch_dtype|dtype|transformers_version|_name_or_path|vision_tower_pretrained"
)


def language_type(data: Mapping[str, Any], folder: Path) -> str:
    """The language model's model_type in transformers. Raises CheckpointError for one that nobody maps."""
    from transformers import CONFIG_MAPPING

    named = str(data.get("model_type", "llava"))
    kind = LANGUAGE_TYPES.get(named, named)
    if kind in CONFIG_MAPPING or kind == "internlm2":
        return kind
    remote = "; its auto_map names code in the folder, which is never run" if "auto_map" in data else ""
    raise CheckpointError(
        f"{folder / 'config.json'}: model_type {named!r} is not known{remote}; known: {', '.join(LANGUAGE_TYPES)} and "
        "the causal language models of transformers"
    )


def language_part(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if not OWN_KEYS.fullmatch(key)}


def settings(
    folder: Path,
    data: Mapping[str, Any],
    text_config: Mapping[str, Any],
    vision_config: Mapping[str, Any],
    image_token_id: int,
    template: str,
) -> LlavaConfig:
    """The configuration; folder is for errors. Raises CheckpointError for a setting that is not known here."""
    where = folder / "config.json"
    if data.get("s2"):
        raise CheckpointError(f"{where}: s2 (multi-scale tower features) is not supported")
    if data.get("mm_resampler_type"):
        raise CheckpointError(f"{where}: mm_resampler_type {data['mm_resampler_type']!r} is not supported")
    width = data.get("mm_hidden_size")
    if width is not None and width != vision_config["hidden_size"]:
        raise CheckpointError(
            f"{where}: mm_hidden_size is {width}, but the vision tower's width is {vision_config['hidden_size']}; "
            "it is another tower"
        )
    ratio = data.get("image_aspect_ratio")
    limit = re.fullmatch(r"anyres_max_(\d+)", str(ratio))
    if ratio not in IMAGE_MODES and limit is None:
        known = "square, pad, anyres, anyres_max_N"
        raise CheckpointError(f"{where}: image_aspect_ratio {ratio!r}; known: {known}")
    mode = "anyres" if limit else IMAGE_MODES[ratio]
    points: tuple[tuple[int, int], ...] = ()
    if mode == "anyres":
        if "image_grid_pinpoints" not in data:
            raise CheckpointError(f"{where}: image_aspect_ratio 'anyres' but no image_grid_pinpoints")
        size = int(vision_config["image_size"])
        points = parse_pinpoints(data["image_grid_pinpoints"], tile_size=size, order="wh")
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=image_token_id,
        projector=data.get("mm_projector_type") or "linear",
        vision_feature_layer=int(data.get("mm_vision_select_layer", -2)),
        vision_feature_select=data.get("mm_vision_select_feature", "patch"),
        image_mode=mode,  # type: ignore[arg-type]
        image_grid_pinpoints=points,
        # a picture in one tile is never merged
        merge_type=data.get("mm_patch_merge_type", "flat"),
        anyres_max=int(limit.group(1)) if limit else None,
        template=template,
        image_start_end=bool(data.get("mm_use_im_start_end", False)),
        # the original tokenizes the words on either side of a picture apart, with every tokenizer
        extra={"text_after_image": "restart", **_boxes(data.get("llava"))},
    )


def _boxes(block: object) -> dict[str, Any]:
    """How the model writes boxes, from the block that is written here beside the original's keys."""
    return {"boxes": block["boxes"]} if isinstance(block, Mapping) and "boxes" in block else {}
