"""The model that a run starts from: an existing one of any layout, or a new one from two parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from llava.checkpoint.load import Loaded, build, load
from llava.prompt.processor import Processor
from llava.train.picture_mode import with_image_mode
from llava.train.sections import ModelSection, Recipe
from llava.train.selection import plan_storage


def open_model(recipe: Recipe, *, compute: torch.dtype = torch.float32, device: str | None = None) -> Loaded:
    """The recipe's model with its prompt settings, on `device` (the one that the recipe names when not given).

    Weights are float32, the optimizer's precision, but for those that never move: they are held as
    `selection.plan_storage` says, packed or in `compute`, from the moment they are read.
    """
    wanted = recipe.model
    held: dict[str, Any] = {
        "device": device or recipe.run.device,
        "dtype": "float32",
        "storage": lambda model: plan_storage(model, recipe.tune, compute),
    }
    if wanted.path is not None:
        loaded = load(wanted.path, base=wanted.base, **held)
        return _with_prompt_settings(loaded, wanted)
    assert wanted.language_model is not None and wanted.vision_tower is not None  # the recipe's validator saw to it
    choices: dict[str, Any] = {
        "template": wanted.template,
        "image_mode": wanted.image_mode,
        "image_grid_pinpoints": wanted.image_grid_pinpoints,
        "start_end_tokens": wanted.start_end_tokens,
        "vision_feature_layer": wanted.vision_feature_layer,
    }
    return build(
        wanted.language_model,
        wanted.vision_tower,
        projector=wanted.projector,
        seed=recipe.run.seed,
        match_embedding_scale=wanted.match_embedding_scale,
        **held,
        **{name: value for name, value in choices.items() if value is not None},
    )


def added_token_ids(processor: Processor) -> list[int]:
    """Tokens that LLaVA added to the vocabulary and that a prompt reads: `<im_start>` and `<im_end>`, where used.

    Not `<image>`: pictures are written over its embedding, and it is no answer, so no row of it is ever read.
    """
    if not processor.start_end_tokens:
        return []
    return [processor.tokenizer.token_id(token) for token in ("<im_start>", "<im_end>")]


def _with_prompt_settings(loaded: Loaded, wanted: ModelSection) -> Loaded:
    """Another template or image mode for an existing model; both are saved with it."""
    if wanted.image_mode is not None and (
        wanted.image_mode != loaded.model.config.image_mode or wanted.image_grid_pinpoints is not None
    ):
        loaded = with_image_mode(loaded, wanted.image_mode, pinpoints=wanted.image_grid_pinpoints)
    processor, model = loaded.processor, loaded.model
    if wanted.template is not None:
        processor = processor.with_template(wanted.template)
        model.config = model.config.with_changes(template=wanted.template)
    return replace(loaded, processor=processor)
