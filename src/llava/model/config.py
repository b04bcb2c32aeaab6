"""What decides how a LLaVA behaves: one frozen object, written as a `config.json` that others open too.

`LlavaConfig.to_dict` gives the keys that stock transformers, vLLM and SGLang read (`model_type` "llava", or
"llava_next" when pictures are tiled) and one block of ours, `llava`, for what those keys cannot say: chat template,
image mode, projector, merge type. Nothing here looks at the name of a folder or a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast, get_args

from llava.errors import CheckpointError, name_nearest

ImageMode = Literal["pad", "crop", "squash", "anyres"]
MergeType = Literal["flat", "spatial", "spatial_unpad"]
FeatureSelect = Literal["patch", "cls_patch", "skip_first"]

# Towers whose first token is a class token, not a patch. SigLIP has none.
TOWERS_WITH_CLS = ("clip_vision_model", "clip")
STOCK_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}
PROJECTOR_PATTERN = re.compile(r"linear|identity|mlp([1-9]\d*)x_gelu")


@dataclass(frozen=True)
class LlavaConfig:
    """The parts of a LLaVA and how they are put together.

    vision_config, text_config: Hugging Face configuration dicts, each with its `model_type`.
    image_token_id: the id that stands for one image feature in `input_ids`; it may lie outside the embedding's rows.
    projector: "linear", "mlpNx_gelu" or "identity".
    vision_feature_layer: index into the tower's hidden states (0 is the embedding's output, -1 the last block's);
        several are concatenated on the width.
    vision_feature_select: "patch" keeps the patches only (drops a class token where the tower has one), "cls_patch"
        keeps every token, "skip_first" drops the first token even of a tower without a class token.
    image_mode: how a picture becomes tiles: padded to a square, resized and cropped, squashed, or cut (anyres).
    image_grid_pinpoints: (height, width) of the canvases that anyres chooses from, in pixels.
    merge_type: how the tiles' features are joined: one after the other ("flat"), as one picture in reading order
        ("spatial"), or that without its padding and with `image_newline` after every row ("spatial_unpad").
    anyres_max: at most this many tiles' worth of features a picture, the excess is interpolated away (OneVision).
    template: the chat template's name in llava.prompt.templates.
    image_start_end: whether a picture stands between `<im_start>` and `<im_end>`.
    """

    vision_config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    image_token_id: int
    projector: str = "mlp2x_gelu"
    vision_feature_layer: int | tuple[int, ...] = -2
    vision_feature_select: FeatureSelect = "patch"
    image_mode: ImageMode = "pad"
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()
    merge_type: MergeType = "flat"
    anyres_max: int | None = None
    template: str = "vicuna_v1"
    image_start_end: bool = False
    # Keys of the `llava` block that other rooms own (the prompt's tokenizer dialect, say); carried along unread.
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in ("vision_config", "text_config"):
            if "model_type" not in getattr(self, part):
                raise CheckpointError(f"config: {part} has no model_type; copy it from the part's own config.json")
        if not PROJECTOR_PATTERN.fullmatch(self.projector):
            known = ["linear", "mlp2x_gelu", "mlp3x_gelu", "identity"]
            raise CheckpointError(f"config: projector {self.projector!r}; {name_nearest(self.projector, known)}")
        _require_choice("image_mode", self.image_mode, get_args(ImageMode))
        _require_choice("merge_type", self.merge_type, get_args(MergeType))
        _require_choice("vision_feature_select", self.vision_feature_select, get_args(FeatureSelect))
        blocks = self.vision_config.get("num_hidden_layers")
        layers = (
            self.vision_feature_layer if isinstance(self.vision_feature_layer, tuple) else (self.vision_feature_layer,)
        )
        if blocks is not None and any(not -blocks - 1 <= layer <= blocks for layer in layers):
            raise CheckpointError(
                f"config: vision_feature_layer {self.vision_feature_layer}; a tower of {blocks} blocks has states "
                f"0 to {blocks}, or -{blocks + 1} to -1"
            )
        if self.image_mode == "anyres" and not self.image_grid_pinpoints:
            raise CheckpointError("config: image_mode 'anyres' needs image_grid_pinpoints, a list of [height, width]")

    @property
    def vision_width(self) -> int:
        """Width of the features that the projector takes: the tower's, once for each chosen layer."""
        layers = 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)
        return int(self.vision_config["hidden_size"]) * layers

    @property
    def text_width(self) -> int:
        """Width of the language model's embeddings (MPT calls it d_model)."""
        return int(self.text_config.get("hidden_size") or self.text_config["d_model"])

    @property
    def vocab_size(self) -> int:
        """Rows of the language model's embedding."""
        return int(self.text_config["vocab_size"])

    @property
    def image_size(self) -> int:
        """Side of a tile in pixels."""
        return int(self.vision_config["image_size"])

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // int(self.vision_config["patch_size"])

    @property
    def tower_has_cls(self) -> bool:
        """Whether the tower's first token is a class token."""
        return self.vision_config["model_type"] in TOWERS_WITH_CLS

    @property
    def skipped_tokens(self) -> int:
        """How many of the tower's first tokens are dropped (0 or 1)."""
        if self.vision_feature_select == "skip_first":
            return 1
        return int(self.tower_has_cls and self.vision_feature_select == "patch")

    @property
    def features_per_tile(self) -> int:
        """Feature rows of one tile after the projector."""
        return self.patches_per_side**2 + int(self.tower_has_cls) - self.skipped_tokens

    @property
    def has_newline(self) -> bool:
        """Whether the model holds the learnt `image_newline` row."""
        return self.merge_type == "spatial_unpad"

    def with_changes(self, **changes: Any) -> LlavaConfig:
        """A copy with these fields changed, checked again."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json: stock keys plus the `llava` block."""
        anyres = self.image_mode == "anyres"
        # only OneVision's class interpolates the excess of many tiles away
        model_type = "llava" if not anyres else "llava_next" if self.anyres_max is None else "llava_onevision"
        out: dict[str, Any] = {
            "architectures": [STOCK_CLASSES[model_type]],
            "model_type": model_type,
            "image_token_index": self.image_token_id,
            "image_seq_length": self.features_per_tile,
            "projector_hidden_act": "gelu" if self.projector.startswith("mlp") else "linear",
            "multimodal_projector_bias": True,
            "vision_feature_layer": _listed(self.vision_feature_layer),
            "vision_feature_select_strategy": "default" if self.skipped_tokens else "full",
            "tie_word_embeddings": bool(self.text_config.get("tie_word_embeddings", False)),
            "vision_config": dict(self.vision_config),
            "text_config": dict(self.text_config),
        }
        if anyres:
            out["image_grid_pinpoints"] = [list(point) for point in self.image_grid_pinpoints]
        if model_type == "llava_onevision":
            out["vision_aspect_ratio"] = f"anyres_max_{self.anyres_max}"
        out["llava"] = {
            **self.extra,
            "format": 1,
            "template": self.template,
            "projector": self.projector,
            "image_mode": self.image_mode,
            "image_start_end": self.image_start_end,
            "image_token_id": self.image_token_id,
            "vision_feature_layer": _listed(self.vision_feature_layer),
            "vision_feature_select": self.vision_feature_select,
            "merge_type": self.merge_type,
            "image_grid_pinpoints": [list(point) for point in self.image_grid_pinpoints],
            "anyres_max": self.anyres_max,
            "image_size": self.image_size,
            "patches_per_side": self.patches_per_side,
            "features_per_tile": self.features_per_tile,
        }
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, origin: str = "config.json") -> LlavaConfig:
        """Read a config.json with a `llava` block, or a stock `llava` / `llava_next` one without it.

        Raises CheckpointError, naming `origin` and the key, for what is missing or unknown.
        """
        for key in ("vision_config", "text_config"):
            if not isinstance(data.get(key), Mapping):
                raise CheckpointError(f"{origin}: no {key}; this is not the config.json of a LLaVA folder")
        block = data.get("llava")
        if block is not None and not isinstance(block, Mapping):
            raise CheckpointError(f"{origin}: llava is {block!r}, not an object; remove it or restore it")
        chosen = _from_stock(data) if block is None else _from_block(block)
        token = chosen.pop("image_token_id", None)
        if token is None:
            token = data.get("image_token_index", data.get("image_token_id"))
        if not isinstance(token, int):
            raise CheckpointError(f"{origin}: no image_token_index; add the id of the <image> token")
        # What the stock keys left to their classes' defaults is filled in, so that every reader sees the same.
        return cls(
            vision_config=complete_config(data["vision_config"], "clip_vision_model", origin=origin),
            text_config=complete_config(data["text_config"], "llama", origin=origin),
            image_token_id=token,
            **chosen,
        )


def complete_config(part: Mapping[str, Any], default_type: str, *, origin: str) -> dict[str, Any]:
    """A Hugging Face configuration dict with its class's defaults filled in and rope_theta kept readable.

    Raises CheckpointError for a model_type that transformers does not have: its code would come from the folder
    (`auto_map`), and that is never run.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    name = str(part.get("model_type", default_type))
    if name not in CONFIG_MAPPING:
        remote = " and its auto_map points at code in the folder, which is never run" if "auto_map" in part else ""
        raise CheckpointError(
            f"{origin}: model_type {name!r} is not in transformers{remote}; convert the model to a type that is"
        )
    values = {
        key: value for key, value in part.items() if key not in ("model_type", "auto_map", "transformers_version")
    }
    try:
        complete = CONFIG_MAPPING[name](**values).to_dict()
    except (StrictDataclassError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{origin}: not a {name} configuration ({reason}); restore it from the model's page"
        ) from error
    for key in ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"):
        complete.pop(key, None)
    # transformers 5 files it under rope_parameters; vLLM and SGLang on older transformers look for the plain key.
    rope = complete.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        complete["rope_theta"] = rope["rope_theta"]
    complete["model_type"] = name
    return cast(dict[str, Any], complete)


def _from_stock(data: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields as a stock config.json implies them; template and image mode are that family's published ones."""
    vision_type = data["vision_config"].get("model_type", "clip_vision_model")
    skips_first = data.get("vision_feature_select_strategy", "default") == "default"
    if vision_type in TOWERS_WITH_CLS:
        select = "patch" if skips_first else "cls_patch"
    else:
        select = "skip_first" if skips_first else "patch"
    tiled = data.get("model_type") in ("llava_next", "llava_onevision")
    points = data.get("image_grid_pinpoints") or ()
    if tiled and not points:
        points = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    limit = re.fullmatch(r"anyres_max_(\d+)", str(data.get("vision_aspect_ratio", "")))
    return {
        "projector": "mlp2x_gelu",
        "vision_feature_layer": _hashable(data.get("vision_feature_layer", -2)),
        "vision_feature_select": select,
        # transformers' LLaVA-1.5 processor resizes and crops; its do_pad is off unless preprocessor_config.json says so
        "image_mode": "anyres" if tiled else "crop",
        "image_grid_pinpoints": tuple((int(h), int(w)) for h, w in points) if tiled else (),
        "merge_type": "spatial_unpad" if tiled else "flat",
        "anyres_max": int(limit.group(1)) if limit else None,
        "template": "llava_hf",
    }


def _from_block(block: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from the `llava` block; keys that are not ours are carried along."""
    ours = {f.name for f in fields(LlavaConfig)} - {"extra", "vision_config", "text_config"}
    derived = {"format", "image_size", "patches_per_side", "features_per_tile"}
    chosen = {key: value for key, value in block.items() if key in ours}
    if "vision_feature_layer" in chosen:
        chosen["vision_feature_layer"] = _hashable(chosen["vision_feature_layer"])
    points = chosen.get("image_grid_pinpoints") or ()
    chosen["image_grid_pinpoints"] = tuple((int(h), int(w)) for h, w in points)
    chosen["extra"] = {key: value for key, value in block.items() if key not in ours | derived}
    return chosen


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise CheckpointError(f"config: {name} {value!r}; {name_nearest(str(value), choices)}")


def _listed(layer: int | tuple[int, ...]) -> int | list[int]:
    return layer if isinstance(layer, int) else list(layer)


def _hashable(layer: int | list[int]) -> int | tuple[int, ...]:
    return layer if isinstance(layer, int) else tuple(layer)
