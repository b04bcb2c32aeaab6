"""Checkpoints that survive being killed at any moment, and resume to the same bit.

A checkpoint is a folder `step-00000200` with `state.safetensors`, `state.json` and `manifest.json` (size and sha256 of
each file). It is written under another name, flushed to the disk, and renamed: a folder with the right name is whole.
What is found damaged all the same (a flipped bit: neither safetensors nor torch.load notices one) is set aside by
name, and the one before it is taken. Only tensors and JSON: opening a checkpoint runs no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llava.errors import TrainingError

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})")
_MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class SavedState:
    """A checkpoint read back: tensors by name, and the facts that were given with them."""

    folder: Path
    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_state(root: Path, step: int, *, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint durably, then drop all but the newest `keep`. Nothing old goes before the new one is safe.

    Raises TrainingError when it cannot be written; the earlier checkpoints are untouched then.
    """
    final = root / f"step-{step:08d}"
    partial = root / f".{final.name}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        partial.mkdir()
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial / "state.safetensors"
        )
        text = json.dumps({"format": FORMAT, "step": step, **facts}, indent=1)
        (partial / "state.json").write_text(text, encoding="utf-8")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in sorted(partial.iterdir())
        }
        (partial / _MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
        for path in partial.iterdir():
            _sync(path)
        _sync(partial)
        _remove(final)
        partial.rename(final)
        _sync(root)
    except (OSError, SafetensorError) as error:
        _remove(partial)
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainingError(
            f"{final}: the checkpoint could not be written ({reason}); earlier ones are whole, "
            "so free some space or fix the folder and run the same command again"
        ) from error
    for old in list_checkpoints(root)[keep:]:
        _remove(old)
    return final


def load_newest(root: Path) -> SavedState | None:
    """The newest whole checkpoint, None when there is none. Damaged ones are set aside under another name."""
    for partial in root.glob(".step-*.partial"):
        _remove(partial)
    for folder in list_checkpoints(root):
        problem = find_damage(folder)
        if problem is None:
            facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return SavedState(folder, int(facts["step"]), load_file(folder / "state.safetensors"), facts)
        aside = folder.with_name(f"damaged-{folder.name}")
        _remove(aside)
        folder.rename(aside)
        _log.warning("%s is damaged (%s); set aside as %s, the one before it is used", folder, problem, aside.name)
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None when all agree with the manifest."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        for name in ("state.safetensors", "state.json"):
            wanted = manifest[name]
            path = folder / name
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {wanted['bytes']}"
            if _digest(path) != wanted["sha256"]:
                return f"{name} does not have its sha256"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def collect_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Tensor]:
    """Everything that the next step depends on: trained weights, optimizer moments, random generators.

    Frozen weights are not written: they are those of the model that the run started from.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tensors[f"model.{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors["rng.cpu"] = torch.get_rng_state()
    if device.type != "cpu":
        tensors["rng.device"] = _device_rng(device).get_rng_state(device)
    return tensors


def restore_tensors(
    saved: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """Put back what collect_tensors took. Raises TrainingError when the trained parameters are not the saved ones."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name.removeprefix("model.") for name in saved if name.startswith("model.")}
    if wanted != set(trained):
        odd = sorted(wanted ^ set(trained))
        raise TrainingError(f"the checkpoint holds other trained weights than this run: {', '.join(odd[:4])} ...")
    with torch.no_grad():
        for name, parameter in trained.items():
            tensor = saved[f"model.{name}"]
            if tensor.shape != parameter.shape:
                raise TrainingError(f"{name}: {tuple(tensor.shape)} in the checkpoint, {tuple(parameter.shape)} here")
            parameter.copy_(tensor)
    for key, tensor in saved.items():
        if key.startswith("optimizer."):
            _, kind, name = key.split(".", 2)
            place = trained[name].device if tensor.ndim else torch.device("cpu")
            # AdamW's fused step counter lives beside its parameter.
            place = trained[name].device if kind == "step" else place
            optimizer.state[trained[name]][kind] = tensor.to(place)
    torch.set_rng_state(saved["rng.cpu"])
    if "rng.device" in saved and device.type != "cpu":
        _device_rng(device).set_rng_state(saved["rng.device"], device)


def write_durably(path: Path, text: str) -> None:
    """Write a text beside `path`, flush it and rename it over `path`: whole, or not there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.replace(path)


def _device_rng(device: torch.device) -> Any:
    return getattr(torch, device.type)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
