"""Writing what a run has learnt: a whole model, or adapters beside their base (`llava.checkpoint.tuned`).

Weights that did not move are taken from the files that they were read from, not from memory: there they may be packed
or rounded to the format of the products. So a stage 1 run leaves the language model's own bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava.checkpoint import huggingface
from llava.checkpoint.fingerprint import NEW, file_digest, fingerprint
from llava.checkpoint.folders import replaced_folder
from llava.checkpoint.names import common_name
from llava.checkpoint.opened import Opened
from llava.checkpoint.original import naming
from llava.checkpoint.original_writing import original_config
from llava.checkpoint.tuned import MANIFEST, PEFT_PREFIX, ROWS, TOWER_ADAPTER, TRAINED, Manifest, with_rows
from llava.checkpoint.weights import Source, held, write_safetensors, write_text
from llava.errors import CheckpointError
from llava.model.added_rows import added_rows
from llava.model.llava import Llava
from llava.model.lora import ADAPTER, lora_layers

if TYPE_CHECKING:
    from llava.model.config import LlavaConfig
    from llava.prompt.processor import Processor

MEMORY = Path("memory")
LANGUAGE, TOWER = "language_model.", "vision_tower."


def tuned_tensors(model: Llava, base: Mapping[str, Source]) -> dict[str, Source]:
    """Every tensor of a tuned model under its common name, adapters merged in float32, added rows in their places.

    base: what the model was made from; weights that did not move are read from there. Raises CheckpointError for a
    packed weight that base does not have.
    """
    trained = _trained_values(model)
    adapted = dict(lora_layers(model))
    out: dict[str, Source] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name or name.endswith(ROWS):
            continue
        common = common_name(name.replace(".base_layer.", "."), model)
        source = base.get(common)
        if name in trained:
            source = held(common, trained[name], file=MEMORY)
        elif source is None or source.file == NEW:
            if not parameter.is_floating_point():
                raise CheckpointError(f"cannot save {name!r}: it is packed, and the files it came from are not known")
            source = held(common, parameter.detach(), file=MEMORY)
        path = name.removesuffix(".base_layer.weight")
        out[common] = source if path not in adapted or path == name else _with_product(source, adapted, path, trained)
    for name, ids, _ in added_rows(model):
        common = common_name(name, model)
        rows = held(common, trained[name.removesuffix(".weight") + ROWS], file=MEMORY)
        out[common] = with_rows(out[common], tuple(ids.tolist()), rows)
    return out


def _trained_values(model: Llava) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _pair(path: str, trained: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of an adapted layer."""
    return trained[f"{path}.lora_A.{ADAPTER}.weight"], trained[f"{path}.lora_B.{ADAPTER}.weight"]


def _with_product(source: Source, adapted: Mapping[str, Any], path: str, trained: Mapping[str, Tensor]) -> Source:
    scale = float(adapted[path].scaling[ADAPTER])

    def read() -> Tensor:
        a, b = (side.detach().float().cpu() for side in _pair(path, trained))
        return source.read().float() + scale * (b @ a)

    return Source(source.shape, torch.float32, source.file, source.key, read)


def write_tuned(
    model: Llava,
    processor: Processor,
    folder: str | Path,
    *,
    opened: Opened,
    parts: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Path:
    """Write the folder that `llava.checkpoint.tuned` describes; the language model's own weights are not in it.

    opened: the base, as it was opened for the run. parts: what was trained, a mapping a part; recipe, versions: kept
    in the manifest. A projector's LoRA is merged: the projector is small, and no other reader knows of one. Returns
    the folder, which is replaced as a whole.
    """
    trained = _trained_values(model)
    config = huggingface.with_processor(model.config, processor)
    others = _other_tensors(model, opened, trained, config)
    rows = list(added_rows(model))
    has_tower_adapter = any(path.startswith(TOWER) for path, _ in lora_layers(model))
    with replaced_folder(Path(folder)) as temporary:
        _write_adapter(temporary, model, LANGUAGE, opened, trained)
        if has_tower_adapter:
            (temporary / TOWER_ADAPTER).mkdir()
            _write_adapter(temporary / TOWER_ADAPTER, model, TOWER, opened, trained)
        if others:
            torch.save(others, temporary / TRAINED)
        files = {str(path.relative_to(temporary)): file_digest(path) for path in sorted(temporary.rglob("*.*"))}
        processor.save(temporary)
        for_original = not has_tower_adapter and not rows and not any(".vision_tower." in key for key in others)
        write_text(temporary / "config.json", json.dumps(_config_json(config, opened, for_original), indent=2) + "\n")
        manifest = Manifest(
            base=opened.origin,
            weights=fingerprint(opened.tensors),
            config=config.to_dict(),
            trained=tuple(parts),
            added_ids=tuple(rows[0][1].tolist()) if rows else (),
            files=files,
            recipe=recipe,
            versions=versions,
        )
        write_text(temporary / MANIFEST, manifest.to_json())
    return Path(folder)


def _other_tensors(
    model: Llava, opened: Opened, trained: Mapping[str, Tensor], config: LlavaConfig
) -> dict[str, Tensor]:
    """Trained tensors that are no adapter of the language model's or the tower's, and every tensor of a new part.

    By the original's names behind peft's prefix. Values are copies: what is trained goes on changing.
    """
    table = naming(str(config.text_config["model_type"]), layered=config.projector.startswith("mlp"))
    names = {
        common_name(name, model): value
        for name, value in trained.items()
        if ".lora_" not in name and ".base_layer." not in name
    }
    whole = tuned_tensors(model, opened.tensors)
    for common, source in whole.items():
        new = common in opened.tensors and opened.tensors[common].file == NEW
        if new or (common.startswith("multi_modal_projector.") and source.read is not opened.tensors[common].read):
            names[common] = source.read()
    out = {}
    for common, value in sorted(names.items()):
        original = table.restore(common)
        if original is None:
            raise CheckpointError(f"{common!r} has no name in the original's layout")
        out[PEFT_PREFIX + original] = value.detach().cpu().contiguous().clone()
    return out


def _write_adapter(folder: Path, model: Llava, head: str, opened: Opened, trained: Mapping[str, Tensor]) -> None:
    """adapter_config.json and adapter_model.safetensors of one part; nothing where it has no adapter."""
    layers = {path: layer for path, layer in lora_layers(model) if path.startswith(head)}
    if not layers:
        return
    tensors, first = {}, next(iter(layers.values()))
    for path in layers:
        for side, value in zip("AB", _pair(path, trained), strict=True):
            key = f"{PEFT_PREFIX}{path.removeprefix(head)}.lora_{side}.weight"
            tensors[key] = held(key, value, file=MEMORY)
    alpha = float(first.lora_alpha[ADAPTER])
    origin = opened.origin
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head == LANGUAGE else None,
        "base_model_name_or_path": origin.get("path")
        or origin["language_model" if head == LANGUAGE else "vision_tower"],
        "r": int(first.r[ADAPTER]),
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": float(getattr(first.lora_dropout[ADAPTER], "p", 0.0)),
        # whole paths: on another base, or on a whole LLaVA, peft finds none of them and says so
        "target_modules": [path.removeprefix(head) for path in layers],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    (written,) = write_safetensors(folder, tensors, max_shard_bytes=1 << 62)
    written.rename(folder / "adapter_model.safetensors")
    write_text(folder / "adapter_config.json", json.dumps(settings, indent=2) + "\n")


def _config_json(config: LlavaConfig, opened: Opened, for_original: bool) -> dict[str, Any]:
    """config.json in the original's words where it could open the folder on the same base, else in Hugging Face's."""
    if for_original and opened.tower_name:
        try:
            return original_config(config, tower=opened.tower_name, dtype=torch.float32)
        except CheckpointError:  # a family or a setting that the original has no word for
            return config.to_dict()
    return config.to_dict()
