"""Checkpoints that survive being killed at any moment, and resume to the same bit.

A checkpoint is a folder `step-00000200` with `state.safetensors`, `state.json` and `manifest.json` (size and sha256 of
each file). It is written under another name, flushed to the disk, and renamed: a folder with the right name is whole.
What is found damaged all the same (a flipped bit: neither safetensors nor torch.load notices one) is set aside by
name, and the one before it is taken. Only tensors and JSON: opening a checkpoint runs no code.

A checkpoint is made between optimizer steps only. That is complete: a step's micro-batches are a function of its
number, and no gradient lives longer than its step, so the accumulation phase is always zero. The learning rate is a
function of the step too, so the schedule has no state of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llava.errors import TrainingError
from llava.train.journal import UnsavedError, sync_path

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})")
_MANIFEST = "manifest.json"
_FILES = ("state.safetensors", "state.json")
FORMAT = 2


@dataclass(frozen=True)
class SavedState:
    """A checkpoint read back: tensors by name, and the facts that were given with them."""

    folder: Path
    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_state(root: Path, step: int, *, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint durably, then drop all but the newest `keep`. Nothing old goes before the new one is safe.

    Raises UnsavedError when it cannot be written; the earlier checkpoints are untouched then.
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
            sync_path(path)
        sync_path(partial)
        if final.exists():
            final.rename(_replaced(final))
        partial.rename(final)
        sync_path(root)
    except (OSError, SafetensorError) as error:
        _remove(partial)
        with suppress(OSError):
            _put_back(root)
        reason = getattr(error, "strerror", None) or str(error)
        raise UnsavedError(
            f"{final}: the checkpoint could not be written ({reason}); earlier ones are whole, "
            "so free some space or fix the folder and run the same command again"
        ) from error
    _remove(_replaced(final))
    for old in list_checkpoints(root)[keep:]:
        _discard(old)
    return final


def load_newest(root: Path) -> SavedState | None:
    """The newest whole checkpoint, None when there is none. Damaged ones are set aside under another name.

    Raises TrainingError when there were checkpoints and all are damaged: going on would be starting anew in silence.
    """
    _put_back(root)
    for rubbish in (*root.glob(".step-*.partial"), *root.glob(".step-*.old")):
        _remove(rubbish)
    for folder in list_checkpoints(root):
        problem = find_damage(folder)
        if problem is None:
            facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if facts.get("format") != FORMAT:
                raise TrainingError(
                    f"{folder}: a checkpoint of format {facts.get('format')}, this version writes {FORMAT}; go on with "
                    "the version that began the run, or start anew with --restart"
                )
            return SavedState(folder, int(facts["step"]), load_file(folder / "state.safetensors"), facts)
        aside = folder.with_name(f"damaged-{folder.name}")
        _remove(aside)
        folder.rename(aside)
        _log.warning("%s is damaged (%s); set aside as %s, the one before it is used", folder, problem, aside.name)
    damaged = sorted(path.name for path in root.glob("damaged-step-*"))
    if damaged:
        raise TrainingError(
            f"{root}: no whole checkpoint is left, only {', '.join(damaged)}; restore one from a copy under its old "
            "name, or start anew with --restart"
        )
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
        for name in _FILES:
            wanted = manifest[name]
            path = folder / name
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {wanted['bytes']}"
            if _digest(path) != wanted["sha256"]:
                return f"{name} does not have its sha256"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


# --- what is in it -----------------------------------------------------------------------------------------------


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
    return tensors | collect_generators(device)


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
    restore_generators(saved, device)


def seed_generators(seed: int) -> None:
    """Start every random generator that a checkpoint holds from one seed."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def collect_generators(device: torch.device) -> dict[str, Tensor]:
    """The state of the random generators: Python's, NumPy's, torch's on the CPU and on the device."""
    _, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    tensors = {
        "rng.python": torch.tensor(words, dtype=torch.int64),
        "rng.python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "rng.numpy": torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64),
        "rng.numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "rng.cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        tensors["rng.device"] = _device_rng(device).get_rng_state(device)
    return tensors


def restore_generators(saved: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what collect_generators took."""
    gauss = saved["rng.python.gauss"].tolist()
    random.setstate((3, tuple(saved["rng.python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = saved["rng.numpy"].tolist()
    cached = saved["rng.numpy.gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(saved["rng.cpu"])
    if "rng.device" in saved and device.type != "cpu":
        _device_rng(device).set_rng_state(saved["rng.device"], device)


def _device_rng(device: torch.device) -> Any:
    return getattr(torch, device.type)


# --- folders -----------------------------------------------------------------------------------------------------


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _put_back(root: Path) -> None:
    """Undo a replacement that was interrupted between its two renames; drop what one that succeeded left."""
    for replaced in root.glob(".step-*.replaced"):
        final = root / replaced.name.removeprefix(".").removesuffix(".replaced")
        if final.exists():
            _remove(replaced)
        else:
            replaced.rename(final)


def _discard(folder: Path) -> None:
    """Remove a checkpoint; renamed first, so that one whose removal is interrupted is not taken for a damaged one."""
    aside = folder.with_name(f".{folder.name}.old")
    try:
        folder.rename(aside)
    except OSError as error:
        _log.warning("%s: could not be removed (%s)", folder, error.strerror)
        return
    _remove(aside)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
