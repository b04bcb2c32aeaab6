"""May this run go on from that checkpoint? The lock on a run's folder, and what must be the same as before.

A checkpoint holds the whole recipe and fingerprints of what the recipe only names: the tokenizer's files, the
template, how pictures are prepared, and every frozen tensor; the loader adds that of the data files. A run that differs
in what is learnt is refused with the difference; where and how it runs may change.

Not covered: the bytes of picture files (a picture that is exchanged under its old name is not noticed), and two
machines on a file system without locks.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.errors import TrainingError
from llava.prompt.processor import Processor

_log = logging.getLogger(__name__)

# What may differ between a run and its continuation: where and how, never what is learnt.
FREE_TO_CHANGE = {
    ("description",),
    ("data", "workers"),
    ("data", "max_bad_share"),
    ("data", "token_cache"),
    ("run", "out"),
    ("run", "device"),
    ("run", "parallel"),
    ("run", "cpu_offload"),
    ("run", "activation_checkpointing"),
    ("run", "feature_cache"),
    ("run", "feature_cache_gb"),
    ("run", "track"),
    ("run", "micro_batch_tokens"),
    ("run", "log_every"),
    ("run", "save_every"),
    ("run", "keep"),
    ("run", "max_bad_steps"),
    ("run", "sample_every"),
    ("run", "sample_images"),
    ("run", "sample_questions"),
}
_WAY_OUT = "give back what it was, choose another run.out, or start anew with --restart"
_LOCK = ".lock"


# --- what must be the same ---------------------------------------------------------------------------------------


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: before -> now` of every value of two recipes that decides what is learnt."""
    found = []
    for section in sorted(set(before) | set(now)):
        old, new = before.get(section), now.get(section)
        if not isinstance(old, Mapping) or not isinstance(new, Mapping):
            if old != new and (section,) not in FREE_TO_CHANGE:
                found.append(f"{section}: {old!r} -> {new!r}")
            continue
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key) and (section, key) not in FREE_TO_CHANGE:
                found.append(f"{section}.{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return found


def take_fingerprints(model: nn.Module, processor: Processor) -> dict[str, dict[str, str]]:
    """What a recipe names but does not hold: kind -> name -> digest. `processor` is the one that the data goes through.

    The kinds: "tokenizer and picture settings" by file, "template", "frozen weights" by tensor.
    """
    with tempfile.TemporaryDirectory() as folder:
        processor.save(folder)
        files = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in sorted(Path(folder).iterdir())
            if path.is_file()
        }
    template = processor.template
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter: 7B in some seconds
        digests = dict(zip(frozen, pool.map(digest_tensor, frozen.values()), strict=True))
    return {
        "tokenizer and picture settings": files,
        "template": {template.name: hashlib.sha256(repr(template).encode()).hexdigest()[:16]},
        "frozen weights": digests,
    }


def digest_tensor(tensor: Tensor) -> str:
    """A digest of a tensor's bytes, type and shape; its layout in memory does not matter. About 2 GB/s a core."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    flat = tensor.detach().cpu().reshape(-1)
    if flat.stride(0) != 1:  # a single number of a larger tensor
        flat = flat.clone(memory_format=torch.contiguous_format)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def refuse_another_run(place: Path, facts: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise TrainingError naming what differs when a checkpoint's facts are not this run's.

    Both hold "recipe" (as plain values), "dtype" (what is computed in), "fingerprints" (take_fingerprints) and
    "versions". Another version of a library is worth a warning: the run goes on, though perhaps not to the same bit.
    """
    different = differences(facts["recipe"], now["recipe"])
    if different:
        raise TrainingError(f"{place} is of another recipe: {'; '.join(different[:3])}; {_WAY_OUT}")
    if facts["dtype"] != now["dtype"]:
        raise TrainingError(
            f"{place} was computed in {facts['dtype']}, this device would take {now['dtype']}; go on with a device as "
            "before, choose another run.out, or start anew with --restart"
        )
    for kind, here in now["fingerprints"].items():
        before = facts["fingerprints"].get(kind, {})
        changed = sorted(name for name in {*before, *here} if before.get(name) != here.get(name))
        if changed:
            shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise TrainingError(f"{place}: the {kind} of this run have changed since ({shown}); {_WAY_OUT}")
    for name, version in now["versions"].items():
        if facts["versions"].get(name) != version:
            _log.warning(
                "%s was made with %s %s, this is %s: the run goes on, but perhaps not to the same bit",
                *(place, name, facts["versions"].get(name), version),
            )


# --- one run a folder --------------------------------------------------------------------------------------------


@contextmanager
def held_folder(out_dir: Path) -> Iterator[None]:
    """The run's folder, made when it is not there, for this process alone; a process that dies lets go of it.

    Raises TrainingError when another run holds it. What a killed process left beside it is removed.
    """
    made = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        handle = _lock(out_dir / _LOCK)
    except OSError as error:
        raise TrainingError(f"{out_dir}: cannot write there ({error.strerror}); choose another run.out") from error
    try:
        _sweep(out_dir)
        yield
    finally:
        with suppress(OSError):
            (out_dir / _LOCK).unlink()
        os.close(handle)
        for folder in made:  # a run that was refused leaves no empty folder
            with suppress(OSError):
                folder.rmdir()


def _lock(path: Path) -> int:
    """An open handle that holds the lock at `path`."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        return os.open(path, os.O_RDWR | os.O_CREAT)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 64).decode(errors="replace").strip()
            os.close(handle)
            raise TrainingError(
                f"{path.parent}: another run is training into this folder ({holder or 'it is just starting'}); "
                "wait for it, stop it, or choose another run.out"
            ) from None
        except OSError as error:
            _log.warning("%s: this file system has no locks (%s); start no second run here", path, error.strerror)
            return handle
        # A run that ends removes its lock: what was locked here may be gone already.
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(handle).st_ino:
                os.truncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()}\n".encode(), 0)
                return handle
        os.close(handle)


def _sweep(out_dir: Path) -> None:
    """Remove what killed processes left half written: files in the folder, models beside it (checkpoint.folders)."""
    for path in out_dir.glob(".*.partial"):
        with suppress(OSError):
            path.unlink()
    for path in out_dir.absolute().parent.iterdir():
        rest = path.name.removeprefix(f".{out_dir.name}.")
        if rest == path.name or not rest.endswith(".partial"):
            continue
        process = rest.split("-", 1)[0]
        if process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
