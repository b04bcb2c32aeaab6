"""Another way of looking for an existing model: padded where it was cropped, or tiles where it had one.

LLaVA-1.5 crops pictures in its first stage and pads them in its second; LLaVA-1.6 goes on from such a first stage with
tiles (`anyres`). The choice is saved with the model. Not covered: tiles of another size, and the way back to one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from llava.checkpoint.load import Loaded
from llava.errors import RecipeError
from llava.model.config import ImageMode
from llava.model.merge import new_newline
from llava.prompt.processor import Processor


def with_image_mode(loaded: Loaded, mode: ImageMode, *, pinpoints: Sequence[Sequence[int]] | None = None) -> Loaded:
    """The model with another image mode; `anyres` gives a model of one tile a fresh image_newline.

    pinpoints: (height, width) of the canvases of `anyres`, in pixels; needed unless the model has some. Raises
    RecipeError when they are missing or not whole tiles, or when a model of tiles is to be one of a single tile.
    """
    model, processor = loaded.model, loaded.processor
    before = model.config
    points = tuple((int(height), int(width)) for height, width in pinpoints or before.image_grid_pinpoints)
    if mode != "anyres":
        if before.image_mode == "anyres":
            raise RecipeError(
                f"model.image_mode: {mode!r}: this model looks at tiles; build a new model for pictures of one tile"
            )
        points = ()
    elif not points:
        raise RecipeError(
            "model.image_mode: 'anyres' needs model.image_grid_pinpoints, for example [[672, 336], [336, 672]]"
        )
    uneven = [point for point in points if point[0] % before.image_size or point[1] % before.image_size]
    if uneven:
        raise RecipeError(
            f"model.image_grid_pinpoints: {list(uneven[0])}: not whole tiles of the tower's {before.image_size} pixels"
        )
    merge = "spatial_unpad" if mode == "anyres" and before.merge_type == "flat" else before.merge_type
    model.config = before.with_changes(image_mode=mode, image_grid_pinpoints=points, merge_type=merge)
    if model.config.has_newline and model.image_newline is None:
        model.image_newline = nn.Parameter(new_newline(before.text_width).data.to(model.device, model.dtype))
    settings = replace(processor.image_settings, mode=mode, pinpoints=points, merge=merge)
    looking_so = Processor(
        processor.tokenizer,
        processor.template,
        image_settings=settings,
        image_token_id=processor.image_token_id,
        start_end_tokens=processor.start_end_tokens,
        image_position=processor.image_position,
        text_after_image=processor.text_after_image,
        context_length=processor.context_length,
    )
    return replace(loaded, processor=looking_so)
