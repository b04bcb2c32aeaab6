"""Everything that a run needs, opened and checked before its first step, without training or writing anything."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava.checkpoint.load import Loaded
from llava.data.loader import Loader
from llava.data.sources import ConversationSet
from llava.distributed import pick_device, pick_dtype, refuse_difference
from llava.errors import RecipeError
from llava.train.feature_choice import open_feature_cache
from llava.train.feeding import build_loader, report_first_step
from llava.train.feeding import open_conversations as open_conversations
from llava.train.journal import naming_unsaved
from llava.train.loop import Trainer
from llava.train.placement import choose_loading_device, spread_model
from llava.train.progress import RunInfo
from llava.train.recompute import apply_recomputation
from llava.train.resume import take_fingerprints
from llava.train.sections import Recipe
from llava.train.stages import PartSummary, apply_stage, describe_stage
from llava.train.start import added_token_ids
from llava.train.start import open_model as open_model
from llava.train.state import seed_generators


@dataclass
class Prepared:
    """Everything that a run needs, opened and checked, before its first step."""

    recipe: Recipe
    out_dir: Path
    loaded: Loaded
    conversations: ConversationSet
    loader: Loader
    trainer: Trainer
    summaries: list[PartSummary]
    dtype: torch.dtype
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def info(self) -> RunInfo:
        return RunInfo(
            out_dir=self.out_dir,
            table=describe_stage(self.summaries),
            total_steps=self.loader.plan.total_steps,
            first_step=self.loader.position,
            conversations=len(self.conversations),
            device=self.trainer.parallel.describe(),
            dtype=str(self.dtype).removeprefix("torch."),
        )


def prepare_run(recipe: Recipe) -> Prepared:
    """Open and check all that a recipe names."""
    out_dir = out_dir_of(recipe)
    device = pick_device(recipe.run.device)
    dtype = pick_dtype(device, recipe.run.dtype)
    conversations = open_conversations(recipe)
    for name in recipe.run.sample_images:
        if not Path(name).is_file():
            raise RecipeError(f"run.sample_images: {name}: no such file")
    seed_generators(recipe.run.seed)
    loaded = open_model(recipe, compute=dtype, device=choose_loading_device(recipe))
    summaries = apply_stage(
        loaded.model,
        recipe.tune,
        optim=recipe.optim,
        seed=recipe.run.seed,
        compute=dtype,
        added_ids=added_token_ids(loaded.processor),
    )
    template = recipe.data.template
    processor = loaded.processor if template is None else loaded.processor.with_template(template)
    with naming_unsaved(Path(tempfile.gettempdir())):
        fingerprints = take_fingerprints(loaded.model, processor)  # of whole weights, so before they are spread
    refuse_difference("what the run starts from", repr((fingerprints, conversations.fingerprint)))
    loader = build_loader(recipe, loaded, conversations, out_dir=out_dir)
    first = loader.make(0)
    recomputed = apply_recomputation(recipe, loaded.model, first.micro_batches, device=device, dtype=dtype)
    visits = loader.plan.epoch_at(loader.plan.total_steps - 1) if loader.plan.total_steps else 0.0
    features = open_feature_cache(
        recipe, loaded.model, first.micro_batches, visits=visits, out_dir=out_dir, dtype=dtype
    )
    if features is not None:
        loader.key_pictures()
    parallel = spread_model(recipe, loaded.model, device=device, dtype=dtype)
    parallel.step_loss.pictures.cache = features
    trainer = Trainer(
        loaded.model,
        optim=recipe.optim,
        total_steps=loader.plan.total_steps,
        dtype=dtype,
        max_bad_steps=recipe.run.max_bad_steps,
        parallel=parallel,
        seed=recipe.run.seed,
    )
    # The first step's errors come before the first checkpoint, not after an hour of loading.
    report_first_step(recipe, conversations, first)
    notes = {"fingerprints": fingerprints, "activation_checkpointing": recomputed}
    return Prepared(recipe, out_dir, loaded, conversations, loader, trainer, summaries, dtype, notes)


def out_dir_of(recipe: Recipe) -> Path:
    """The run's folder. Raises RecipeError when none is named or a file is in its place."""
    if recipe.run.out is None:
        raise RecipeError("run.out is missing: name the run's folder, for example --out runs/mine")
    out_dir = Path(recipe.run.out)
    if out_dir.exists() and not out_dir.is_dir():
        raise RecipeError(f"run.out: {out_dir} is a file; name a folder")
    return out_dir
