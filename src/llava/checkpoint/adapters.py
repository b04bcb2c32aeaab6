"""LoRA adapters as peft writes them (adapter_config.json, adapter_model.safetensors or .bin), merged one by one.

A merged weight is W + scale * B @ A in float32, whatever the files hold, so merging loses nothing; the original's
merge in float16 moves logits by up to 7e-3. Not covered: DoRA, and adapters on embeddings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava.checkpoint.weights import Source, read_folder
from llava.errors import CheckpointError

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
LORA_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight$")


@dataclass(frozen=True)
class LoraPair:
    """One adapted weight: a (r, in), b (out, r), and the factor of their product."""

    a: Source
    b: Source
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA folder read: its settings, and pairs by the name of the module that they adapt (as in the file)."""

    folder: Path
    settings: Mapping[str, Any]
    pairs: Mapping[str, LoraPair]
    others: Mapping[str, Source]
    rename: Callable[[str], str | None] = lambda name: name  # a weight's name in the file to the common one


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a peft adapter."""
    return (folder / "adapter_config.json").is_file()


def read_adapter(folder: Path) -> Adapter:
    """Read a LoRA folder. Raises CheckpointError for a half pair, or a kind of adapter that is not plain LoRA."""
    path = folder / "adapter_config.json"
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA" or settings.get("use_dora"):
        raise CheckpointError(
            f"{path}: adapter of kind {'DoRA' if settings.get('use_dora') else kind}; only LoRA is known"
        )
    sides: dict[str, dict[str, Source]] = {}
    others = {}
    for key, source in read_folder(folder, names=ADAPTER_FILES).items():
        match = LORA_KEY.match(key)
        if match is None:
            others[key] = source
        else:
            sides.setdefault(match["module"], {})[match["side"]] = source
    pairs = {}
    for module, found in sides.items():
        if set(found) != {"A", "B"}:
            have = next(iter(found.values()))
            lacking = "B" if "A" in found else "A"
            raise CheckpointError(
                f"{have.file}: {have.key!r} has no lora_{lacking} beside it; the adapter is incomplete"
            )
        rank = found["A"].shape[0]
        if found["B"].shape[1] != rank:
            raise CheckpointError(
                f"{found['B'].file}: {found['B'].key!r} has shape {list(found['B'].shape)}, expected [out, {rank}]"
            )
        pairs[module] = LoraPair(found["A"], found["B"], _scale(settings, module, rank))
    if not pairs:
        raise CheckpointError(f"{folder}: an adapter without a single lora_A / lora_B pair")
    return Adapter(folder, settings, pairs, others)


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r of one module, with peft's patterns and rank-stabilised variant."""
    alpha = _by_pattern(settings.get("alpha_pattern") or {}, module, settings.get("lora_alpha", 8))
    expected = _by_pattern(settings.get("rank_pattern") or {}, module, settings.get("r", rank))
    if expected != rank:
        raise CheckpointError(f"adapter_config.json: r is {expected} for {module!r}, but its file has rank {rank}")
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def merged(tensors: Mapping[str, Source], adapter: Adapter, rename: Callable[[str], str | None]) -> dict[str, Source]:
    """Tensors (common names) with an adapter's pairs added to the weights that `rename` finds for their modules.

    Raises CheckpointError when a pair's weight is not there or has another shape.
    """
    out = dict(tensors)
    for module, pair in adapter.pairs.items():
        name = rename(f"{module}.weight")
        target = out.get(name) if name is not None else None
        if target is None or name is None:
            raise CheckpointError(
                f"{pair.a.file}: {pair.a.key!r} adapts {module!r}, which the base does not have; is it the right base?"
            )
        shape = (pair.b.shape[0], pair.a.shape[1])
        if target.shape != shape:
            raise CheckpointError(
                f"{pair.a.file}: {pair.a.key!r} adapts a weight of shape {list(shape)}, but {target.key!r} in "
                f"{target.file} has {list(target.shape)}; is it the right base?"
            )
        out[name] = _merged_source(target, pair)
    return out


def _merged_source(target: Source, pair: LoraPair) -> Source:
    def read() -> torch.Tensor:
        return target.read().float() + pair.scale * (pair.b.read().float() @ pair.a.read().float())

    return Source(target.shape, torch.float32, target.file, target.key, read)
