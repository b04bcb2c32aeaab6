"""The vision tower: pictures cut in tiles to patch features.

The tower is transformers' own class (CLIPVisionModel, SiglipVisionModel, ...) as a child module, never subclassed
or patched. For the families with a plain stack of blocks only the blocks up to the chosen layer are run; any other
family goes through its own forward with hidden states returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from llava.errors import CheckpointError

# Towers whose hidden states are embeddings, (pre_layrnorm), then one state per block.
PLAIN_STACKS = ("clip_vision_model", "siglip_vision_model")


def build_tower(vision_config: Mapping[str, Any]) -> nn.Module:
    """A vision tower of this configuration, on the current default device, weights not loaded."""
    from transformers import CONFIG_MAPPING, AutoModel

    values = {key: value for key, value in vision_config.items() if key != "model_type"}
    config = CONFIG_MAPPING[vision_config["model_type"]](**values)
    return cast(nn.Module, AutoModel.from_config(config, attn_implementation="sdpa"))


def select_features(
    tower: nn.Module, pixel_values: Tensor, *, layer: int | tuple[int, ...], skipped_tokens: int
) -> Tensor:
    """The tower's hidden state(s) at `layer`, without its first `skipped_tokens` tokens.

    pixel_values: (N, 3, H, W). Returns (N, P, Dv), the chosen layers' states side by side on the width.
    Frozen towers run without recording gradients. Raises CheckpointError for a layer that the tower lacks.
    """
    layers = (layer,) if isinstance(layer, int) else layer
    frozen = not any(parameter.requires_grad for parameter in tower.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        states = _hidden_states(tower, pixel_values.to(_dtype_of(tower)), layers)
        chosen = torch.cat(states, dim=-1) if len(states) > 1 else states[0]
        return chosen[:, skipped_tokens:]


def _hidden_states(tower: nn.Module, pixel_values: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
    config: Any = tower.config
    num_states = int(config.num_hidden_layers) + 1
    wanted = [index + num_states if index < 0 else index for index in layers]
    if any(not 0 <= index < num_states for index in wanted):
        raise CheckpointError(
            f"vision_feature_layer {list(layers)}: the tower has hidden states 0 to {num_states - 1} "
            f"(or -{num_states} to -1)"
        )
    if config.model_type not in PLAIN_STACKS:
        every = tower(pixel_values, output_hidden_states=True).hidden_states
        return [cast(Tensor, every[index]) for index in wanted]
    stack: Any = getattr(tower, "vision_model", tower)
    hidden = stack.embeddings(pixel_values)
    if hasattr(stack, "pre_layrnorm"):
        hidden = stack.pre_layrnorm(hidden)
    states = {0: hidden}
    for index, block in enumerate(stack.encoder.layers[: max(wanted)], start=1):
        output = block(hidden, None)
        hidden = output[0] if isinstance(output, tuple) else output
        states[index] = hidden
    return [states[index] for index in wanted]


def _dtype_of(tower: nn.Module) -> torch.dtype:
    for parameter in tower.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    raise CheckpointError("the vision tower has no parameters")
