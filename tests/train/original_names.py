"""Parameters of a model in memory under the names that the original LLaVA gives them."""

import re

_PROJECTOR_SLOT = re.compile(r"multi_modal_projector\.linear_(\d+)\.")


def original_name(name: str, *, linear: bool = False) -> str:
    """multi_modal_projector.linear_2.weight -> model.mm_projector.2.weight; a linear projector has no numbers."""
    if linear:
        name = name.replace("multi_modal_projector.linear_1.", "multi_modal_projector.")
    name = _PROJECTOR_SLOT.sub(lambda match: f"model.mm_projector.{2 * int(match[1]) - 2}.", name)
    name = name.replace("multi_modal_projector.", "model.mm_projector.")
    name = re.sub(r"^image_newline$", "model.image_newline", name)
    return name.removeprefix("language_model.")
