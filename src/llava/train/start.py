"""The model that a run starts from: an existing one of any layout, or a new one from two parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from llava.checkpoint.load import Loaded, build, load
from llava.errors import RecipeError
from llava.prompt.processor import Processor
from llava.train.sections import Recipe
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
        return _with_prompt_settings(loaded, template=wanted.template, image_mode=wanted.image_mode)
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
    return replace(loaded, processor=processor)
