"""Writing the original's layout: whole models that haotian-liu/LLaVA opens, projectors alone, deltas.

The tower goes to `vision_tower/` inside the folder, as a Hugging Face tower of its own, and config.json names it; the
original needs it as a path, so `mm_vision_tower` holds the folder's full path (reading here, a moved folder still
finds its own tower).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava.checkpoint.names import TOWER
from llava.checkpoint.opened import HEAD
from llava.checkpoint.original import PROJECTOR_FILE, START_END, naming
from llava.checkpoint.parts import embedding_name
from llava.checkpoint.processors import TOKENIZER_FILES
from llava.checkpoint.weights import Source, write_safetensors, write_text
from llava.errors import CheckpointError
from llava.model.config import LlavaConfig

if TYPE_CHECKING:
    from llava.prompt.processor import Processor

TOWER_FOLDER = "vision_tower"
# text_config.model_type to the checkpoint's model_type and class
FAMILIES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "mpt": ("llava_mpt", "LlavaMptForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
    "phi3": ("llava_phi3", "LlavaPhi3ForCausalLM"),
}
RATIOS = {"crop": "square", "pad": "pad", "anyres": "anyres"}


def write_model(
    temporary: Path,
    config: LlavaConfig,
    tensors: Mapping[str, Source],
    processor: Processor,
    *,
    final: Path,
    tokenizer_from: Path | None,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    advance: Callable[[int], None] | None,
) -> None:
    """Write a whole model into `temporary`, which becomes `final`.

    tokenizer_from: a folder of this layout whose tokenizer files are copied as they are (the `<image>` that was added
    on opening has no row there). Raises CheckpointError for what the original cannot hold.
    """
    language = {name: source for name, source in tensors.items() if not name.startswith("vision_tower.")}
    if config.text_config["model_type"] == "mpt":
        _drop_head(language)
    renamed = {_original_name(name, config): source for name, source in language.items()}
    write_safetensors(temporary, renamed, dtype=dtype, max_shard_bytes=max_shard_bytes, advance=advance)
    processor.save(temporary)
    processor.tokenizer.save(temporary, portable=False)  # the original opens it with the class that the file names
    write_tower(temporary, config, tensors, dtype=dtype, advance=advance)
    for extra in ("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "config.json"):
        (temporary / extra).unlink(missing_ok=True)
    if tokenizer_from is not None:
        for name in (*TOKENIZER_FILES, "tokenizer.json"):
            (temporary / name).unlink(missing_ok=True)
            if (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, temporary / name)
    data = original_config(config, tower=str((final / TOWER_FOLDER).absolute()), dtype=_main_dtype(language, dtype))
    write_text(temporary / "config.json", json.dumps(data, indent=2) + "\n")


def _drop_head(language: dict[str, Source]) -> None:
    """MPT's head is its embedding in the original's layout. Raises CheckpointError when it was trained apart."""
    head = language.pop(HEAD, None)
    if head is not None and not torch.equal(head.read(), language[embedding_name(language)].read()):
        raise CheckpointError(
            f"{head.file}: {head.key!r} differs from the embedding; the original ties MPT's head to it"
        )


def write_tower(
    folder: Path,
    config: LlavaConfig,
    tensors: Mapping[str, Source],
    *,
    dtype: torch.dtype | None,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write the vision tower alone into `folder`/vision_tower; the folder's preprocessor_config.json goes with it."""
    tower = folder / TOWER_FOLDER
    tower.mkdir()
    alone = {TOWER.restore(name) or name: s for name, s in tensors.items() if name.startswith("vision_tower.")}
    write_safetensors(tower, alone, dtype=dtype, advance=advance)
    write_text(tower / "config.json", json.dumps(dict(config.vision_config), indent=2) + "\n")
    shutil.copyfile(folder / "preprocessor_config.json", tower / "preprocessor_config.json")


def write_projector(
    temporary: Path,
    config: LlavaConfig,
    tensors: Mapping[str, Source],
    processor: Processor,
    *,
    final: Path,
    tower: str,
) -> None:
    """Write `mm_projector.bin` and its config.json, as stage 1 of the original leaves them, into `temporary`.

    With start and end tokens their two embedding rows are in the file too, and a newline row where the model has one.
    tower: the tower's path or hub id; empty when the model's format names none: then it is written too.
    """
    state = {
        _original_name(name, config): source.read()
        for name, source in tensors.items()
        if name.startswith("multi_modal_projector.") or name == "image_newline"
    }
    if not state:
        raise CheckpointError("the model has no projector weights to extract (projector 'identity')")
    if config.image_start_end:
        ids = [processor.tokenizer.token_id(token) for token in START_END]
        state["model.embed_tokens.weight"] = tensors[embedding_name(tensors)].read()[ids].clone()
    torch.save(state, temporary / PROJECTOR_FILE)
    if not tower:
        processor.save(temporary)
        write_tower(temporary, config, tensors, dtype=None)
        for path in temporary.iterdir():
            if path.is_file() and path.name != PROJECTOR_FILE:
                path.unlink()
        tower = str((final / TOWER_FOLDER).absolute())
    data = original_config(config, tower=tower, dtype=next(iter(state.values())).dtype)
    write_text(temporary / "config.json", json.dumps(data, indent=2) + "\n")


def _original_name(name: str, config: LlavaConfig) -> str:
    kind = str(config.text_config["model_type"])
    original = naming(kind, layered=config.projector.startswith("mlp")).restore(name)
    if original is None:
        raise CheckpointError(f"{name!r} has no name in the original's layout")
    return original


def original_config(config: LlavaConfig, *, tower: str, dtype: torch.dtype) -> dict[str, Any]:
    """config.json in the original's words. Raises CheckpointError for settings that it has no word for."""
    kind = str(config.text_config["model_type"])
    if kind not in FAMILIES:
        raise CheckpointError(f"the original's layout knows no {kind} language model; known: {', '.join(FAMILIES)}")
    if config.image_mode not in RATIOS:
        raise CheckpointError(f"the original has no image mode {config.image_mode!r}; known: {', '.join(RATIOS)}")
    if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select == "skip_first":
        raise CheckpointError("the original takes its features from one layer, with or without the class token")
    text = {k: v for k, v in config.text_config.items() if k not in ("model_type", "rope_parameters")}
    if kind == "mpt":
        text["tie_word_embeddings"] = True
    rope = config.text_config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        text["rope_scaling"] = {"type": rope["rope_type"], **{k: v for k, v in rope.items() if k != "rope_theta"}}
    model_type, architecture = FAMILIES[kind]
    ratio = RATIOS[config.image_mode]
    return {
        **text,
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "mm_vision_tower": tower,
        "mm_hidden_size": int(config.vision_config["hidden_size"]),
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": config.vision_feature_select,
        "mm_projector_type": config.projector,
        "mm_patch_merge_type": config.merge_type,
        "image_aspect_ratio": f"anyres_max_{config.anyres_max}" if config.anyres_max else ratio,
        # the original's pairs are (width, height)
        "image_grid_pinpoints": [[width, height] for height, width in config.image_grid_pinpoints],
        "mm_use_im_start_end": config.image_start_end,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": False,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_padding_side": "right",
        # nobody else reads this; here it keeps the template that config and tokenizer alone would not tell
        "llava": {"template": config.template, **{k: v for k, v in config.extra.items() if k == "boxes"}},
    }


def _main_dtype(tensors: Mapping[str, Source], dtype: torch.dtype | None) -> torch.dtype:
    return dtype or tensors[embedding_name(tensors)].dtype
