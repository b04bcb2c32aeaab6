"""Where a run's weights go: read to, and spread over the processes at hand, as its recipe says."""

from __future__ import annotations

import torch

from llava.distributed import pick_device, process_count
from llava.errors import RecipeError
from llava.model.llava import Llava
from llava.train.parallel import Parallel, choose_mode
from llava.train.sections import Recipe


def choose_loading_device(recipe: Recipe) -> str:
    """Where weights are read to: a model that is sharded afterwards never lies on a device as a whole."""
    tune, run = recipe.tune, recipe.run
    in_4bit = {"qlora", "frozen_4bit"} & {tune.vision_tower, tune.projector, tune.language_model}
    if process_count() == 1 or run.parallel == "ddp" or in_4bit:
        return str(pick_device(run.device))
    return "cpu"


def spread_model(recipe: Recipe, model: Llava, *, device: torch.device, dtype: torch.dtype) -> Parallel:
    """Wrap a model that is ready to learn for the processes at hand. Raises RecipeError for what they cannot do."""
    run = recipe.run
    mode = choose_mode(run.parallel, model)
    sharded = mode in ("zero2", "zero3")
    if sharded and run.sample_every and run.sample_images:
        raise RecipeError(
            f"run.sample_every: under {mode} no process holds the whole model to answer with; set run.parallel to ddp, "
            "or run.sample_every to null and ask the finished model with `llava chat`"
        )
    if run.cpu_offload and not sharded:
        raise RecipeError(
            f"run.cpu_offload goes with several processes and run.parallel zero2 or zero3, not with {mode!r}; "
            "set run.cpu_offload to false"
        )
    if sharded and recipe.optim.optimizer == "adamw_8bit":
        raise RecipeError(f"optim.optimizer: adamw_8bit cannot hold the parts that {mode} cuts weights in; use adamw")
    if mode == "ddp":
        model.to(device)
    return Parallel(model, mode=mode, device=device, dtype=dtype, cpu_offload=run.cpu_offload)
