"""What a run will be, before it is: `llava train RECIPE --check`.

    report = check_run(recipe)                     # opens data and model, saves and re-opens a small checkpoint
    report = plan_run(recipe, on=named_device("h100"), processes=8)       # from configurations alone

Memory is estimated for each way of recomputing activations (train/estimate.py), hours from needed FLOPs and a share of
the device's peak (train/throughput.py), tokens are counted over a sample of the steps. Nothing is trained, and nothing
is left behind. Not covered: how long the first pictures take to arrive, and a disk that fills up while the run goes on.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from llava.data.batch import Batch
from llava.errors import TrainingError
from llava.model.checkpointing import Checkpointing, set_checkpointing
from llava.model.llava import Llava
from llava.model.tree_support import find_tree_support
from llava.train.estimate import MemoryEstimate, MicroBatch, Sharding, estimate_memory
from llava.train.memory_trace import fake_copy
from llava.train.parallel import DDP_LIMIT
from llava.train.prepare import Prepared, out_dir_of, prepare_run
from llava.train.recompute import USABLE_SHARE, largest_micro_batch, least_recomputation
from llava.train.saving import bytes_to_save, leaves_adapter
from llava.train.sections import Recipe
from llava.train.shapes import shape_model
from llava.train.stages import PartSummary, describe_stage
from llava.train.state import load_newest, save_state
from llava.train.throughput import ASSUMED_MFU, Cost, Device, Work, hours, this_device

MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")
SAMPLED_CONVERSATIONS = 512
_SPARE_BYTES = 64 << 20

# Of published data sets, by file name: conversations, and mean text tokens and answer tokens of one (LLaVA-1.5's own
# composition; what `plan_run` reckons with where no data is here).
KNOWN_DATA: dict[str, tuple[int, int, int]] = {
    "blip_laion_cc_sbu_558k.json": (558_128, 22, 20),
    "chat.json": (595_375, 22, 20),
    "llava_instruct_158k.json": (157_712, 250, 190),
    "llava_instruct_80k.json": (80_000, 250, 190),
    "llava_v1_5_mix665k.json": (665_298, 274, 140),
}
_UNKNOWN_DATA = (0, 274, 140)


@dataclass(frozen=True)
class Counted:
    """What a whole run computes. conversations: read per epoch, 0 when nobody knows; counted: how many of the run's
    were looked at, the rest is in proportion; padding: share of all positions; assumed: where no data was read."""

    work: Work
    conversations: int
    steps: int
    counted: int
    trained: int
    padding: float
    assumed: str | None = None

    @property
    def is_exact(self) -> bool:
        """Whether every conversation of the run was looked at."""
        return self.assumed is None and self.counted >= self.trained


@dataclass(frozen=True)
class Report:
    """What `--check` found. memory: by way of recomputing activations; chosen: the one that the run would take;
    usable: bytes of a device that a step may use (0: unknown); hours: 0.0 when there is no data to reckon with."""

    out_dir: Path | None
    table: Sequence[tuple[str, ...]]
    counted: Counted
    batch: MicroBatch
    memory: dict[Checkpointing, MemoryEstimate]
    chosen: Checkpointing
    device: Device
    sharding: Sharding
    usable: int
    flops: float
    hours: float
    mfu: float
    dtype: str
    disk_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the chosen way fits the device."""
        return not self.usable or self.memory[self.chosen].total <= self.usable


def check_run(
    recipe: Recipe,
    *,
    on: Device | None = None,
    processes: int = 1,
    mfu: float = ASSUMED_MFU,
    sample: int = SAMPLED_CONVERSATIONS,
) -> Report:
    """Open everything that the recipe names, count, estimate, and save and re-open a small checkpoint in its place.

    on: reckon for this device instead of the one at hand. sample: conversations to count over, 0 for all.
    Raises what a run would raise before its first step; the run's folder is left as it was found.
    """
    changes: dict[str, object] = {
        "activation_checkpointing": "none"
    }  # chosen below, for the device that is asked about
    if on is not None and recipe.run.dtype == "auto":
        changes["dtype"] = "bfloat16"
    out_dir = out_dir_of(recipe)
    with tempfile.TemporaryDirectory(prefix="llava-check-") as aside:
        # What a run writes on the way (a list of bad samples, say) goes aside.
        run = recipe.run.model_copy(update={**changes, "out": aside})
        prepared = prepare_run(recipe.model_copy(update={"run": run}))
        counted, batches = _count(prepared, sample)
    needed = disk_bytes(prepared.loaded.model, left=bytes_to_save(recipe, prepared.loaded), keep=recipe.run.keep)
    check_disk(out_dir, needed)
    _try_saving(out_dir)
    device = on or this_device(prepared.trainer.device, prepared.dtype)
    by_trees = find_tree_support(prepared.loaded.model.language_model).way == "layout"
    return _report(
        recipe,
        prepared.loaded.model,
        prepared.summaries,
        counted,
        largest_micro_batch(batches, 0, by_trees=by_trees) if batches else MicroBatch(1, 8, 0, 0),
        out_dir=out_dir,
        device=device,
        on_accelerator=on is not None or prepared.trainer.device.type != "cpu",
        processes=processes,
        mfu=mfu,
        dtype=prepared.dtype,
        disk_bytes=needed,
    )


def plan_run(recipe: Recipe, *, on: Device, processes: int = 1, mfu: float = ASSUMED_MFU) -> Report:
    """The same from configurations alone: no weights, no data, no disk. Lengths are those of published data sets.

    Conversations are taken to share no picture, so that data whose pictures are asked about often needs less.
    """
    dtype = torch.float16 if recipe.run.dtype == "float16" else torch.bfloat16
    dtype = torch.float32 if recipe.run.dtype == "float32" else dtype
    model, summaries = shape_model(recipe, dtype=dtype)
    conversations, text, answers = _known_lengths(recipe)
    config = model.config
    tiles = 1 + 4 * (config.image_mode == "anyres")  # a square picture of 672 pixels and its overview
    tokens = min(tiles * config.features_per_tile + text, recipe.data.max_tokens)
    at_once = max(1, recipe.run.micro_batch_tokens // tokens)
    batch = MicroBatch(rows=at_once, tokens=tokens, answer_tokens=at_once * answers, tiles=at_once * tiles)
    per_epoch = conversations or 100_000
    trained = math.ceil(per_epoch * recipe.optim.epochs)
    steps = math.ceil(trained / recipe.optim.batch_conversations)
    if recipe.optim.max_steps is not None and recipe.optim.max_steps < steps:
        steps = recipe.optim.max_steps
        trained = steps * recipe.optim.batch_conversations
    one = Work(tokens, answers, tiles, tokens * (tokens + 1) // 2)
    known = (
        f"{conversations:,} conversations" if conversations else "no data known by these names, 100,000 conversations"
    )
    assumed = f"{known} of {tokens:,} tokens ({tiles} x {config.features_per_tile} of a picture), {answers} of answers"
    counted = Counted(one.times(trained), conversations, steps, 0, trained, 0.0, assumed)
    return _report(
        recipe,
        model,
        summaries,
        counted,
        batch,
        out_dir=None,
        device=on,
        on_accelerator=True,
        processes=processes,
        mfu=mfu,
        dtype=dtype,
        disk_bytes=disk_bytes(model, left=_planned_bytes(recipe, model), keep=recipe.run.keep),
    )


def _report(
    recipe: Recipe,
    model: Llava,
    summaries: Sequence[PartSummary],
    counted: Counted,
    batch: MicroBatch,
    *,
    out_dir: Path | None,
    device: Device,
    on_accelerator: bool,
    processes: int,
    mfu: float,
    dtype: torch.dtype,
    disk_bytes: int,
) -> Report:
    sharding = choose_sharding(recipe, model, processes)
    micro_batches = counted.work.tokens / max(counted.steps, 1) / max(batch.rows * batch.tokens, 1) / processes
    memory: dict[Checkpointing, MemoryEstimate] = {}
    for mode in MODES:
        fake, _ = fake_copy(model, always=True)
        set_checkpointing(fake, mode)
        memory[mode] = estimate_memory(
            fake,
            batch,
            dtype=dtype,
            optimizer=recipe.optim.optimizer,
            sharding=sharding,
            accumulates=micro_batches > 1,
            on_accelerator=on_accelerator,
        )
    usable = int(USABLE_SHARE * device.memory) // (1 if on_accelerator else processes)
    asked = recipe.run.activation_checkpointing
    fitting = least_recomputation({mode: made.total for mode, made in memory.items()}, usable) if usable else "none"
    flops = Cost.of_model(model).of(counted.work)
    return Report(
        out_dir=out_dir,
        table=describe_stage(summaries),
        counted=counted,
        batch=batch,
        memory=memory,
        chosen=fitting if asked == "auto" else asked,
        device=device,
        sharding=sharding,
        usable=usable,
        flops=flops,
        hours=hours(flops, device, processes=processes, mfu=mfu),
        mfu=mfu,
        dtype=str(dtype).removeprefix("torch."),
        disk_bytes=disk_bytes,
    )


def choose_sharding(recipe: Recipe, model: Llava, processes: int) -> Sharding:
    """What `run.parallel` will come to on so many processes (train/parallel.py decides it when they are there)."""
    if processes == 1:
        return Sharding()
    mode = recipe.run.parallel
    if mode == "auto":
        learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
        mode = "ddp" if learns <= DDP_LIMIT else "zero3"
    return Sharding(mode, processes, recipe.run.cpu_offload)


# --- counting ------------------------------------------------------------------------------------------------------


def _count(prepared: Prepared, sample: int) -> tuple[Counted, list[Batch]]:
    """Count over steps spread evenly through the run, until `sample` conversations were seen (0: all of them)."""
    loader = prepared.loader
    plan, per_step = loader.plan, prepared.recipe.optim.batch_conversations
    wanted = plan.total_steps if sample == 0 else max(1, min(plan.total_steps, math.ceil(sample / per_step)))
    steps = sorted({round(index * (plan.total_steps - 1) / max(wanted - 1, 1)) for index in range(wanted)})
    work, seen, positions = Work(0, 0, 0, 0), 0, 0
    largest: list[Batch] = []
    for step in steps:
        made = loader.make(step)
        work += Work.of(made.micro_batches)
        seen += len(made.conversations)
        positions += sum(batch.input_ids.numel() for batch in made.micro_batches)
        # The largest is all that the memory estimate looks at; keeping every batch would take memory itself.
        largest = [max([*largest, *made.micro_batches], key=lambda batch: batch.input_ids.numel())]
    every = len(steps) == plan.total_steps
    trained = seen if every else round(seen / len(steps) * plan.total_steps)
    return (
        Counted(
            work=work if every else work.times(plan.total_steps / len(steps)),
            conversations=len(prepared.conversations),
            steps=plan.total_steps,
            counted=seen,
            trained=trained,
            padding=1 - work.tokens / max(positions, 1),
        ),
        largest,
    )


def _known_lengths(recipe: Recipe) -> tuple[int, int, int]:
    """(conversations, text tokens, answer tokens of one) of the recipe's data, where its files are well known."""
    names = [PurePosixPath(name).name for name in (*recipe.data.files, *(s.file for s in recipe.data.sources))]
    known = [KNOWN_DATA.get(name, _UNKNOWN_DATA) for name in names]
    count = sum(row[0] for row in known)
    if not count:
        return (0, 22, 20) if recipe.data.template == "plain" else _UNKNOWN_DATA
    text, answers = (round(sum(row[0] * row[place] for row in known) / count) for place in (1, 2))
    return count, text, answers


# --- the disk ------------------------------------------------------------------------------------------------------


def disk_bytes(model: Llava, *, left: int, keep: int) -> int:
    """Bytes of what a run leaves in its folder and of all the checkpoints that exist at once."""
    # Weights and two moments of what is trained; one checkpoint more than is kept exists while a new one is written.
    state_bytes = 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return left + (keep + 1) * state_bytes + _SPARE_BYTES


def _planned_bytes(recipe: Recipe, model: Llava) -> int:
    """What a run leaves: adapters alone, or a whole model."""
    parameters = [p for p in model.parameters() if p.requires_grad or not leaves_adapter(recipe.tune)]
    return sum(p.numel() * p.element_size() for p in parameters)


def check_disk(out_dir: Path, needed: int) -> None:
    """Refuse a run whose model and checkpoints would not fit on the disk."""
    # A run that goes on writes over what it has.
    held = sum(path.stat().st_size for path in out_dir.rglob("*") if path.is_file())
    free = shutil.disk_usage(_existing(out_dir)).free + held
    if free < needed:
        raise TrainingError(
            f"{out_dir}: the run needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "free some space, choose another run.out, or lower run.keep"
        )


def _try_saving(out_dir: Path) -> None:
    """Save and re-open a small checkpoint where the run will save its own, and leave the place as it was."""
    missing = [folder for folder in (out_dir.absolute(), *out_dir.absolute().parents) if not folder.exists()]
    tensors = {"probe": torch.arange(4096, dtype=torch.float32)}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".preflight-", dir=out_dir) as place:
            save_state(Path(place), 1, tensors=tensors, facts={"probe": True}, keep=1)
            found = load_newest(Path(place))
    except OSError as error:
        raise TrainingError(f"{out_dir}: cannot write there ({error.strerror}); choose another run.out") from error
    finally:
        for folder in missing:
            with suppress(OSError):  # somebody else put something there, or it was never made
                folder.rmdir()
    if found is None or not torch.equal(found.tensors["probe"], tensors["probe"]):
        raise TrainingError(f"{out_dir}: a checkpoint written there reads back otherwise; look after the disk")


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
