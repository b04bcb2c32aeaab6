"""Which activation checkpointing a run needs: the least that fits the device's memory.

Recomputing everything costs a third of the time (LLaVA's published runs all pay it), so it is chosen only where the
memory estimate asks for it. Each mode is tried on a copy of the model without values (train/estimate.py), on the
run's own largest micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from llava.data.batch import Batch
from llava.distributed import gather_rows, process_count
from llava.model.checkpointing import Checkpointing, set_checkpointing
from llava.model.llava import Llava
from llava.model.tree_support import find_tree_support
from llava.train.estimate import MicroBatch, OptimizerName, Sharding, count_state, estimate_memory
from llava.train.memory_trace import fake_copy
from llava.train.parallel import choose_mode
from llava.train.sections import Recipe
from llava.train.throughput import main_memory

_log = logging.getLogger(__name__)

# The estimate is within a quarter of what is measured, mostly above; other programs use memory too.
USABLE_SHARE = 0.85
# More numbers than any block keeps a token and width (22 measured with all weights trained); float32.
_BOUND_BYTES = 40 * 4
_MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")


def apply_recomputation(
    recipe: Recipe, model: Llava, batches: Sequence[Batch], *, device: torch.device, dtype: torch.dtype
) -> Checkpointing:
    """Set what run.activation_checkpointing says, or with `auto` the least that fits; returns what was set.

    batches: of one step, as the run will have them. Call it with the stage applied, before the model is spread. All
    processes set the same: the most that any of them needs.
    """
    run, optimizer = recipe.run, recipe.optim.optimizer
    wanted = run.activation_checkpointing
    mode: Checkpointing = "none" if wanted == "auto" else wanted
    usable = int(USABLE_SHARE * memory_of(device))
    if wanted == "auto":
        spread = choose_mode(run.parallel, model)
        sharding = Sharding("none" if spread == "one" else spread, process_count(), run.cpu_offload)
        bound = bound_memory(model, run.micro_batch_tokens, optimizer=optimizer, dtype=dtype)
        if batches and 0 < usable < bound:
            by_trees = find_tree_support(model.language_model).way == "layout"
            largest = largest_micro_batch(batches, run.micro_batch_tokens, by_trees=by_trees)
            needs = estimate_modes(model, largest, dtype=dtype, optimizer=optimizer, sharding=sharding)
            mode = least_recomputation(needs, usable)
            shown = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in needs.items())
            _log.info("activation checkpointing: %s (%s; %.1f GB usable)", mode, shown, usable / 1e9)
        mode = _MODES[max(int(index) for (index,) in gather_rows(_MODES.index(mode)))]
    set_checkpointing(model, mode)
    return mode


def least_recomputation(needs: dict[Checkpointing, int], usable: int) -> Checkpointing:
    """The first mode whose need (bytes) fits, else `full`, which then runs as far as the estimate is too high.

    >>> least_recomputation({"none": 90, "selective": 50, "full": 30}, 64)
    'selective'
    """
    return next((mode for mode in _MODES if needs[mode] <= usable), "full")


def memory_of(device: torch.device) -> int:
    """Bytes that a process may use: of the accelerator, or its share of main memory; 0 when nobody knows."""
    if device.type == "cpu":
        return main_memory() // process_count()
    module = torch.get_device_module(device)
    return int(module.mem_get_info(device)[1]) if hasattr(module, "mem_get_info") else 0


def estimate_modes(
    model: Llava, batch: MicroBatch, *, dtype: torch.dtype, optimizer: OptimizerName, sharding: Sharding
) -> dict[Checkpointing, int]:
    """Bytes a device of a step under each mode."""
    needs: dict[Checkpointing, int] = {}
    for mode in _MODES:
        fake, _ = fake_copy(model)
        set_checkpointing(fake, mode)
        made = estimate_memory(fake, batch, dtype=dtype, optimizer=optimizer, sharding=sharding)
        needs[mode] = made.total
    return needs


def bound_memory(model: Llava, tokens: int, *, optimizer: OptimizerName, dtype: torch.dtype) -> int:
    """Bytes that a step surely stays below without recomputing: cheap, to spare small models the estimate."""
    state = count_state(model, optimizer, dtype=dtype)
    config: Any = cast(Any, model.language_model).config
    kept = _BOUND_BYTES * tokens * int(config.hidden_size) * (int(config.num_hidden_layers) + 1)
    if any(parameter.requires_grad for parameter in model.vision_tower.parameters()):
        kept *= 2
    return state.weights + state.compute_weights + 2 * state.gradients + state.optimizer + kept


def largest_micro_batch(batches: Sequence[Batch], tokens: int, *, by_trees: bool = True) -> MicroBatch:
    """The largest of these batches, with its tokens, tiles and answers scaled up to `tokens` where it is smaller."""
    largest = max(batches, key=lambda batch: batch.input_ids.numel())
    shape = MicroBatch.of(largest, by_trees=by_trees)
    times = max(1, tokens // max(largest.input_ids.numel(), 1))
    if times == 1:
        return shape
    # rows are independent: as many copies of it as the budget holds, without a layout of their own
    return replace(
        shape,
        rows=shape.rows * times,
        answer_tokens=shape.answer_tokens * times,
        tiles=shape.tiles * times,
        layout=None,
    )
