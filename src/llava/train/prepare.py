"""Everything that a run needs, opened and checked before its first step, without training or writing anything."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llava.checkpoint.load import Loaded, build, load
from llava.data.loader import Loader
from llava.data.sources import ConversationSet
from llava.distributed import pick_device, pick_dtype, process_count, refuse_difference
from llava.errors import RecipeError
from llava.model.llava import Llava
from llava.prompt.processor import Processor
from llava.train.feeding import build_loader
from llava.train.feeding import open_conversations as open_conversations
from llava.train.journal import naming_unsaved
from llava.train.loop import Trainer
from llava.train.parallel import Parallel, choose_mode
from llava.train.progress import RunInfo
from llava.train.resume import take_fingerprints
from llava.train.sections import Recipe
from llava.train.stages import PartSummary, apply_stage, describe_stage
from llava.train.state import seed_generators

_log = logging.getLogger(__name__)


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
    loaded = open_model(recipe)
    summaries = apply_stage(loaded.model, recipe.tune)
    with naming_unsaved(Path(tempfile.gettempdir())):
        fingerprints = take_fingerprints(loaded.model, _data_processor(recipe, loaded))
    parallel = spread_model(recipe, loaded.model, device=device, dtype=dtype)
    loader = build_loader(recipe, loaded, conversations, out_dir=out_dir)
    refuse_difference("what the run starts from", repr((fingerprints, conversations.fingerprint)))
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
    for bad in loader.make(0).bad[:3]:
        _log.warning("%s: left out: %s", bad.origin, bad.reason)
    notes = {"fingerprints": fingerprints}
    return Prepared(recipe, out_dir, loaded, conversations, loader, trainer, summaries, dtype, notes)


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
    if not sharded:
        model.to(device)
    return Parallel(model, mode=mode, device=device, dtype=dtype, cpu_offload=run.cpu_offload)


def _data_processor(recipe: Recipe, loaded: Loaded) -> Processor:
    """The processor that the run's conversations go through."""
    template = recipe.data.template
    return loaded.processor if template is None else loaded.processor.with_template(template)


def _loading_device(recipe: Recipe) -> str:
    """Where weights are read to: a model that is sharded afterwards never lies on a device as a whole."""
    tune, run = recipe.tune, recipe.run
    in_4bit = {"qlora", "frozen_4bit"} & {tune.vision_tower, tune.projector, tune.language_model}
    if process_count() == 1 or run.parallel == "ddp" or in_4bit:
        return str(pick_device(run.device))
    return "cpu"


def open_model(recipe: Recipe) -> Loaded:
    """The model that the run starts from, in float32 (the optimizer's precision), with the recipe's prompt settings."""
    wanted, device = recipe.model, _loading_device(recipe)
    if wanted.path is not None:
        loaded = load(wanted.path, base=wanted.base, device=device, dtype="float32")
        return _with_prompt_settings(loaded, template=wanted.template, image_mode=wanted.image_mode)
    assert wanted.language_model is not None and wanted.vision_tower is not None  # the recipe's validator saw to it
    choices: dict[str, Any] = {
        "template": wanted.template,
        "image_mode": wanted.image_mode,
        "vision_feature_layer": wanted.vision_feature_layer,
    }
    return build(
        wanted.language_model,
        wanted.vision_tower,
        projector=wanted.projector,
        seed=recipe.run.seed,
        match_embedding_scale=wanted.match_embedding_scale,
        device=device,
        dtype="float32",
        **{name: value for name, value in choices.items() if value is not None},
    )


def _with_prompt_settings(loaded: Loaded, *, template: str | None, image_mode: str | None) -> Loaded:
    """Another template or image mode for an existing model; both are saved with it."""
    processor, model = loaded.processor, loaded.model
    if template is not None:
        processor = processor.with_template(template)
        model.config = model.config.with_changes(template=template)
    if image_mode is not None and image_mode != model.config.image_mode:
        if "anyres" in (image_mode, model.config.image_mode):
            raise RecipeError(
                f"model.image_mode: {image_mode!r} changes how many tokens a picture has; build a new model"
            )
        processor = Processor(
            processor.tokenizer,
            processor.template,
            image_settings=replace(processor.image_settings, mode=image_mode),  # type: ignore[arg-type]
            image_token_id=processor.image_token_id,
            start_end_tokens=processor.start_end_tokens,
            image_position=processor.image_position,
            text_after_image=processor.text_after_image,
            context_length=processor.context_length,
        )
        model.config = model.config.with_changes(image_mode=image_mode)
    return Loaded(model, processor, loaded.report)


def out_dir_of(recipe: Recipe) -> Path:
    """The run's folder. Raises RecipeError when none is named or a file is in its place."""
    if recipe.run.out is None:
        raise RecipeError("run.out is missing: name the run's folder, for example --out runs/mine")
    out_dir = Path(recipe.run.out)
    if out_dir.exists() and not out_dir.is_dir():
        raise RecipeError(f"run.out: {out_dir} is a file; name a folder")
    return out_dir
