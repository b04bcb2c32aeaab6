"""Tiny random models for the tests of this folder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llava.prompt.processor import Encoded

IMAGE_TOKEN_ID = 63
VOCABULARY = 64

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def sharpen(model: torch.nn.Module) -> Any:
    """Random weights three times as large: with the usual ones all logits are nearly equal."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model.eval()


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return sharpen(LlamaForCausalLM(LlamaConfig(**(_SHAPE | changes))))


def tiny_mistral(**changes: Any) -> MistralForCausalLM:
    torch.manual_seed(0)
    return sharpen(MistralForCausalLM(MistralConfig(**(_SHAPE | changes))))


def tiny_qwen2(**changes: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**(_SHAPE | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.normal_()  # they start at 0, where a forgotten bias would not show
    return sharpen(model)


class Seeing:
    """A language model with a stand-in for pictures: a tile of value v is two features, made of v alone."""

    def __init__(self, language_model: Any) -> None:
        self.language_model = language_model
        self.config = SimpleNamespace(image_token_id=IMAGE_TOKEN_ID)
        self.encoded_tiles: list[int] = []

    def embed(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        is_image = input_ids == IMAGE_TOKEN_ID
        if image_features is None:
            assert not is_image.any()
            return embeddings
        return embeddings.masked_scatter(is_image[..., None], image_features)

    def encode_images(self, pixel_values: Tensor, *, image_sizes: Any, tiles_per_image: Any) -> list[Tensor]:
        self.encoded_tiles.append(len(pixel_values))
        width = self.language_model.config.hidden_size
        waves = torch.arange(2 * width).reshape(2, width)
        rows = torch.cos(waves + 10 * pixel_values.mean(dim=(1, 2, 3))[:, None, None])  # (N, 2, D)
        return [tiles.flatten(0, 1) for tiles in rows.split(list(tiles_per_image))]


def random_ids(length: int, *, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Token ids without the image's."""
    return np.random.default_rng(seed).integers(3, IMAGE_TOKEN_ID, size=length)


def prompt(ids: Any, *, picture: float | None = None) -> Encoded:
    """An encoded prompt; with a picture its two placeholders come first."""
    ids = np.asarray(ids, dtype=np.int64)
    if picture is None:
        return Encoded(ids, np.full_like(ids, -100))
    ids = np.concatenate([[1, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID], ids])
    pixels = np.full((1, 3, 4, 4), picture, dtype=np.float32)
    return Encoded(ids, np.full_like(ids, -100), pixels, ((4, 4),), (1,), (2,))
