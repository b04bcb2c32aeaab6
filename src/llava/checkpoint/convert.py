"""From any layout to any other: open, check, stream, re-open and compare, then move into place.

Nothing is written over, the source is only read, and an interrupted run leaves nothing half done: the temporary
folder beside the target is removed, or found and removed by the next run.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from llava.checkpoint import huggingface, original_writing, xtuner
from llava.checkpoint.delta import make_delta
from llava.checkpoint.folders import find_folder, replaced_folder
from llava.checkpoint.load import open_checkpoint
from llava.checkpoint.opened import HEAD, Opened, check_tensors, empty_model
from llava.checkpoint.original import PROJECTOR_FILE, read_base
from llava.checkpoint.weights import Source, close_files
from llava.errors import CheckpointError, UsageError, name_nearest

Target = Literal["hf", "original", "xtuner", "gguf"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did. num_compared: tensors re-opened and found equal; peak_bytes: of this process' memory."""

    target: Path
    format: str
    num_compared: int
    num_bytes: int
    peak_bytes: int
    start_bytes: int
    largest_tensor_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.target}: {self.format}, {self.num_bytes / 1e6:,.1f} MB in {self.seconds:.1f} s",
            f"  {self.num_compared} tensors re-opened and equal to their source",
            f"  peak memory {self.peak_bytes / 1e6:,.0f} MB ({(self.peak_bytes - self.start_bytes) / 1e6:,.0f} MB over "
            f"the start; the largest tensor has {self.largest_tensor_bytes / 1e6:,.1f} MB)",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


Advance = Callable[[int], None]
Begin = Callable[[int], Advance]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "hf",
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    template: str | None = None,
    dtype: str | None = None,
    number_format: str = "f16",
    class_token: str = "last",
    max_shard_bytes: int = SHARD_BYTES,
    begin: Begin | None = None,
) -> ConvertReport:
    """Write the model of one folder as another layout: "hf", "original", "xtuner" or "gguf".

    base, vision_tower, template: as in `load`; a LoRA is merged, a delta is added. dtype: of floating tensors; None
    keeps each as it is (merged LoRA weights are float32 then). number_format: of gguf, "f16", "f32" or "q8_0".
    class_token: of gguf, "last" for today's llama.cpp or "first" (see `gguf.plan_gguf`).
    begin: called with the bytes to come, gives the callback that progress is told to.
    Raises CheckpointError when the source does not fit its configuration or the target exists.
    """
    if to not in get_args(Target):
        raise UsageError(f"--to {to!r}: {name_nearest(to, get_args(Target))}")
    opened = _open_checked(source, base=base, vision_tower=vision_tower, template=template)
    place = _free_place(Path(target), opened.folder)
    if to == "gguf":
        return _to_gguf(opened, place, number_format, class_token, begin)
    chosen = _dtype(dtype)
    if to == "hf":
        job = _to_huggingface(opened, place, chosen, max_shard_bytes)
    elif to == "original":
        job = _to_original(opened, place, chosen, max_shard_bytes)
    else:
        job = _to_xtuner(opened, place, chosen, max_shard_bytes)
    return _run(opened, place, to, job, chosen, begin)


@dataclass(frozen=True)
class _Job:
    """How one layout is written and re-opened: `write` fills the temporary folder, `reopen` reads it back."""

    write: Callable[[Path, Advance | None], None]
    reopen: Callable[[Path], Mapping[str, Source]]
    expected: Mapping[str, Source]
    notes: tuple[str, ...] = ()


def _to_huggingface(opened: Opened, place: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> _Job:
    processor = opened.processor()
    config, tensors = huggingface.prepare(huggingface.with_processor(opened.config, processor), opened.tensors)
    notes = []
    if re.fullmatch(r"mlp([13-9]|\d\d+)x_gelu", config.projector):
        notes.append(f"stock classes have two projector layers, so a {config.projector} model opens here only")
    if config.image_mode == "anyres" and config.merge_type != "spatial_unpad":
        notes.append(f"stock LLaVA-NeXT merges tiles as spatial_unpad, this model as {config.merge_type}")
    if config.vocab_size != opened.config.vocab_size:
        notes.append(
            f"<image> got a row: vocabulary {opened.config.vocab_size} to {config.vocab_size}, new rows the mean"
        )

    def write(temporary: Path, advance: Advance | None) -> None:
        huggingface.fill(
            temporary, config, tensors, processor, dtype=dtype, max_shard_bytes=max_shard_bytes, advance=advance
        )

    return _Job(write, huggingface.read_tensors, tensors, tuple(notes))


def _to_original(opened: Opened, place: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> _Job:
    processor = opened.processor()
    copied = opened.folder if opened.format.startswith("original") and opened.tokenizer_is_its_own else None

    def write(temporary: Path, advance: Advance | None) -> None:
        original_writing.write_model(
            temporary,
            opened.config,
            opened.tensors,
            processor,
            final=place,
            tokenizer_from=copied,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            advance=advance,
        )

    def reopen(temporary: Path) -> Mapping[str, Source]:
        return open_checkpoint(temporary, vision_tower=temporary / original_writing.TOWER_FOLDER).tensors

    tied = opened.config.text_config["model_type"] == "mpt"
    expected = {name: source for name, source in opened.tensors.items() if not (tied and name == HEAD)}
    return _Job(write, reopen, expected)


def _to_xtuner(opened: Opened, place: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> _Job:
    processor = opened.processor()

    def write(temporary: Path, advance: Advance | None) -> None:
        xtuner.write_model(
            temporary,
            opened.config,
            opened.tensors,
            processor,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            advance=advance,
        )

    def reopen(temporary: Path) -> Mapping[str, Source]:
        return open_checkpoint(temporary).tensors

    tied = opened.config.text_config.get("tie_word_embeddings")
    expected = {name: source for name, source in opened.tensors.items() if not (tied and name == HEAD)}
    return _Job(write, reopen, expected)


def _to_gguf(opened: Opened, place: Path, number_format: str, class_token: str, begin: Begin | None) -> ConvertReport:
    from llava.checkpoint.gguf import plan_gguf, verify_gguf, write_gguf

    start, began = _reset_peak(), time.monotonic()
    plan = plan_gguf(
        opened.tensors,
        opened.config,
        processor=opened.processor(),
        name=place.name,
        number_format=number_format,  # type: ignore[arg-type]  # checked by plan_gguf
        class_token=class_token,  # type: ignore[arg-type]
    )
    _refuse_full_disk(place, plan.num_bytes)
    with replaced_folder(place) as temporary:
        write_gguf(temporary, plan, advance=begin(plan.num_bytes) if begin else None)
        compared = verify_gguf(temporary, plan)
    return _report(opened, place, "gguf", compared, start, began, plan.notes)


def _run(
    opened: Opened, place: Path, name: str, job: _Job, dtype: torch.dtype | None, begin: Begin | None
) -> ConvertReport:
    start, began = _reset_peak(), time.monotonic()
    total = sum(_written_bytes(source, dtype) for source in job.expected.values())
    _refuse_full_disk(place, total)
    with replaced_folder(place) as temporary:
        job.write(temporary, begin(total) if begin else None)
        compared = compare(job.expected, job.reopen(temporary), dtype=dtype)
    return _report(opened, place, name, compared, start, began, job.notes)


def make_delta_folder(source: str | Path, base: str | Path, target: str | Path) -> ConvertReport:
    """Write target - base in the original's layout and float16, for `llava convert --delta` to add again."""
    opened = _open_checked(source)
    place = _free_place(Path(target), opened.folder)
    under = read_base(find_folder(base))
    changed = replace(opened, tensors=make_delta(opened.tensors, under.tensors))
    job = _to_original(changed, place, torch.float16, SHARD_BYTES)
    return _run(changed, place, "delta in the original's layout", job, torch.float16, None)


def extract_projector(
    source: str | Path,
    target: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
) -> ConvertReport:
    """Write a model's projector alone, as the original's stage 1 leaves it: mm_projector.bin and config.json."""
    opened = _open_checked(source, base=base, vision_tower=vision_tower)
    place = _free_place(Path(target), opened.folder)
    tower = opened.tower_name
    processor = opened.processor()
    expected = {
        k: v for k, v in opened.tensors.items() if k.startswith("multi_modal_projector.") or k == "image_newline"
    }

    def write(temporary: Path, advance: Advance | None) -> None:
        original_writing.write_projector(temporary, opened.config, opened.tensors, processor, final=place, tower=tower)

    def reopen(temporary: Path) -> Mapping[str, Source]:
        from llava.checkpoint.original import projector_tensors

        return projector_tensors(temporary / PROJECTOR_FILE, rounded=False).tensors

    return _run(opened, place, "projector", _Job(write, reopen, expected), None, None)


def compare(expected: Mapping[str, Source], written: Mapping[str, Source], *, dtype: torch.dtype | None = None) -> int:
    """Compare every tensor bit by bit, as it was to be written; returns how many.

    Raises CheckpointError naming the first that is missing, too many, or differs.
    """
    for name in written:
        if name not in expected:
            raise CheckpointError(f"{written[name].file}: holds {written[name].key!r}, which was not to be written")
    for name, source in expected.items():
        if name not in written:
            raise CheckpointError(f"{name!r} of {source.file} was not written; convert again")
        value = source.read()
        value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        found = written[name].read()
        same = value.dtype == found.dtype and value.shape == found.shape
        if not same or not torch.equal(_bytes(value), _bytes(found)):
            raise CheckpointError(
                f"{written[name].file}: {written[name].key!r} differs from {source.key!r}; convert again"
            )
    return len(expected)


def _bytes(value: torch.Tensor) -> torch.Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def _open_checked(source: str | Path, **options: Any) -> Opened:
    opened = open_checkpoint(source, **options)
    check_tensors(opened, empty_model(opened.config))
    return opened


def _free_place(target: Path, source: Path) -> Path:
    """The target, if nothing is there and it is not inside the source; leavings of an interrupted run are removed."""
    target = Path(target).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target}: is there already; choose another place or remove it")
    inside = target.absolute()
    if inside == source.absolute() or source.absolute() in inside.parents:
        raise UsageError(f"{target}: is inside {source}, which is only read; choose another place")
    for left in target.parent.glob(f".{target.name}.*.partial"):
        pid = left.name.removesuffix(".partial").rpartition(".")[2].split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    return target


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _refuse_full_disk(place: Path, needed: int) -> None:
    parent = next(folder for folder in [place, *place.absolute().parents] if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{place}: needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there; choose another disk"
        )


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise UsageError(f"--dtype {name!r}: {name_nearest(name, DTYPES)}")
    return DTYPES[name]


def _written_bytes(source: Source, dtype: torch.dtype | None) -> int:
    kept = dtype is None or not source.dtype.is_floating_point
    return source.num_bytes if kept else source.num_bytes // source.dtype.itemsize * dtype.itemsize  # type: ignore[union-attr]


def _report(
    opened: Opened, place: Path, name: str, compared: int, start: int, began: float, notes: tuple[str, ...]
) -> ConvertReport:
    close_files()
    return ConvertReport(
        target=place,
        format=name,
        num_compared=compared,
        num_bytes=sum(path.stat().st_size for path in place.rglob("*") if path.is_file()),
        peak_bytes=_peak_bytes(),
        start_bytes=start,
        largest_tensor_bytes=max(source.num_bytes for source in opened.tensors.values()),
        seconds=time.monotonic() - began,
        notes=(*opened.notes, *notes),
    )


def _reset_peak() -> int:
    """Start measuring the peak from here where the system can (Linux); returns the memory in use now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak_bytes()
    return _status_bytes("VmRSS") or _peak_bytes()


def _peak_bytes() -> int:
    measured = _status_bytes("VmHWM")
    if measured:
        return measured
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(field: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    match = re.search(rf"{field}:\s+(\d+) kB", text)
    return int(match[1]) * 1024 if match else 0
