"""The LLaVA module: pictures and tokens in, hidden states out.

Three children (`vision_tower`, `multi_modal_projector`, `language_model`) and, for tiled pictures with rows marked,
one learnt row `image_newline`. Tower and language model are transformers' own classes. The placeholders are already
expanded in `input_ids`, one `image_token_id` for each feature row, so `forward` is one masked write. What
transformers 5 makes of packed rows, and which of its traps are closed, is in model/language.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from llava.errors import PromptError
from llava.model.config import LlavaConfig
from llava.model.language import build_language_model, run_language_model
from llava.model.merge import merge_tiles, new_newline
from llava.model.projector import build_projector
from llava.model.tree_attention import TreeLayout
from llava.model.vision import build_tower, select_features


class Llava(nn.Module):
    """A LLaVA. Build it with `from_parts` (modules in hand) or `from_config` (weights to be loaded after)."""

    def __init__(
        self, vision_tower: nn.Module, multi_modal_projector: nn.Module, language_model: nn.Module, config: LlavaConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = vision_tower
        self.multi_modal_projector = multi_modal_projector
        self.language_model = language_model
        self.image_newline: nn.Parameter | None = None
        if config.has_newline:
            with torch.device("cpu"):
                newline = new_newline(config.text_width)
            self.image_newline = nn.Parameter(newline.data.to(self.device, self.dtype))

    @classmethod
    def from_parts(
        cls,
        vision_tower: nn.Module,
        language_model: nn.Module,
        config: LlavaConfig,
        *,
        projector: nn.Module | None = None,
    ) -> Llava:
        """Put a tower and a ...ForCausalLM together, with a new projector unless one is given."""
        chosen = projector or build_projector(config.projector, config.vision_width, config.text_width)
        return cls(vision_tower, chosen, language_model, config)

    @classmethod
    def from_config(cls, config: LlavaConfig) -> Llava:
        """A LLaVA of this shape on the default device; the weights are whatever the classes start with."""
        tower = build_tower(config.vision_config)
        return cls.from_parts(tower, build_language_model(config.text_config), config)

    @property
    def embed_tokens(self) -> nn.Embedding:
        """The language model's token embedding."""
        return cast(nn.Embedding, cast(Any, self.language_model).get_input_embeddings())

    @property
    def lm_head(self) -> nn.Module:
        """The language model's output layer, (..., D) to (..., V)."""
        return cast(nn.Module, cast(Any, self.language_model).get_output_embeddings())

    @property
    def decoder(self) -> nn.Module:
        """The language model without its output layer."""
        return cast(nn.Module, cast(Any, self.language_model).base_model)

    @property
    def device(self) -> torch.device:
        """Where the token embeddings live."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the token embeddings."""
        return self.embed_tokens.weight.dtype

    def encode_images(
        self,
        pixel_values: Tensor | None = None,
        *,
        image_sizes: Sequence[tuple[int, int]] = (),
        tiles_per_image: Sequence[int] = (),
        tower_features: Tensor | None = None,
    ) -> list[Tensor]:
        """Features of each picture, as they stand in the token row.

        pixel_values: (N, 3, H, W), all tiles of all pictures in reading order; image_sizes: the pictures' original
        (height, width); tiles_per_image: how many of the N tiles each picture has (one each when not given);
        tower_features: (N, P, Dv), what `encode_tower` gave for them, instead of pixel_values.
        Returns one (F_i, D) tensor a picture. Raises PromptError when the counts disagree.
        """
        given = pixel_values if tower_features is None else tower_features
        assert given is not None, "neither pixels nor features"
        counts = list(tiles_per_image) or [1] * given.shape[0]
        if sum(counts) != given.shape[0]:
            raise PromptError(
                f"{given.shape[0]} tiles, but tiles_per_image {counts} sums to {sum(counts)}; "
                "pass the processor's values together"
            )
        features = self.project(self.encode_tower(given) if tower_features is None else tower_features)  # (N, P, D)
        if self.config.merge_type == "flat":
            return [tiles.flatten(0, 1) for tiles in torch.split(features, counts)]
        if len(image_sizes) != len(counts):
            raise PromptError(
                f"{len(counts)} pictures but {len(image_sizes)} image_sizes; pass one (height, width) each"
            )
        return [
            merge_tiles(tiles, size, self.config, newline=self.image_newline)
            for tiles, size in zip(torch.split(features, counts), image_sizes, strict=True)
        ]

    def encode_tiles(self, pixel_values: Tensor) -> Tensor:
        """Projected features of each tile, (N, 3, H, W) to (N, P, D)."""
        return self.project(self.encode_tower(pixel_values))

    def encode_tower(self, pixel_values: Tensor) -> Tensor:
        """The tower's features of each tile, (N, 3, H, W) to (N, P, Dv)."""
        return select_features(
            self.vision_tower,
            pixel_values.to(self.device),
            layer=self.config.vision_feature_layer,
            skipped_tokens=self.config.skipped_tokens,
        )

    def project(self, features: Tensor) -> Tensor:
        """The projector on the tower's features, (N, P, Dv) to (N, P, D)."""
        for parameter in self.multi_modal_projector.parameters():
            if parameter.is_floating_point():  # 4 bit weights are bytes
                features = features.to(parameter.dtype)
                break
        return cast(Tensor, self.multi_modal_projector(features))

    def touch_vision(self) -> Tensor:
        """A zero that depends on every vision parameter, for a training step without pictures.

        In a distributed run each rank must use the same parameters in each step: add this to the embeddings or the
        loss when a rank's batch has no picture. Returns a scalar 0 of the embeddings' dtype.
        """
        size = self.config.image_size
        blank = torch.zeros(1, 3, size, size, device=self.device)
        touched = self.encode_tiles(blank).sum()
        if self.image_newline is not None:
            touched = touched + self.image_newline.sum()
        return (touched * 0).to(self.dtype)

    def embed(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Token embeddings with the image features written over their placeholders.

        input_ids: (B, T), `image_token_id` at the placeholders (any integer, also outside the embedding's rows);
        image_features: (F, D), all pictures of the batch in reading order. Returns (B, T, D).
        Raises PromptError when F is not the number of placeholders.
        """
        is_image = input_ids == self.config.image_token_id
        embeddings = cast(Tensor, self.embed_tokens(input_ids.masked_fill(is_image, 0)))
        if image_features is None:
            if bool(is_image.any()):
                raise PromptError(f"{int(is_image.sum())} image placeholders but no picture; pass pixel_values")
            return embeddings
        return place_image_features(embeddings, image_features, is_image)

    def forward(
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        image_sizes: Sequence[tuple[int, int]] = (),
        tiles_per_image: Sequence[int] = (),
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        image_features: Tensor | None = None,
        tree_layout: TreeLayout | None = None,
    ) -> Tensor:
        """Hidden states of the last layer after the final norm, (B, T, D); `logits` turns them into scores.

        input_ids, position_ids: (B, T). attention_mask: (B, S) with 1 at real tokens (S counts the cached ones too),
        or (B, 1, T, S) bool with True where a row's token may attend; rows whose positions restart need the latter.
        past_key_values: a transformers Cache, filled in place. image_features: (F, D), instead of pixel_values.
        tree_layout: instead of the mask, once llava.model.tree_support.enable_tree_attention said yes.
        """
        if use_cache and past_key_values is None:
            raise ValueError("use_cache=True needs a Cache in past_key_values: it is filled in place")
        if image_features is None and pixel_values is not None and pixel_values.shape[0] > 0:
            encoded = self.encode_images(pixel_values, image_sizes=image_sizes, tiles_per_image=tiles_per_image)
            image_features = torch.cat(encoded)
        embeddings = self.embed(input_ids, image_features)
        return self.decode(
            embeddings,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            tree_layout=tree_layout,
        )

    def decode(
        self,
        embeddings: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        tree_layout: TreeLayout | None = None,
    ) -> Tensor:
        """The language model on embeddings (B, T, D); arguments and result as in `forward`."""
        return run_language_model(
            self.language_model,
            embeddings,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            tree_layout=tree_layout,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (..., D) to (..., V)."""
        return cast(Tensor, self.lm_head(hidden))


def place_image_features(embeddings: Tensor, features: Tensor, is_image: Tensor) -> Tensor:
    """Write image features over their placeholder tokens.

    embeddings: (B, T, D) token embeddings; features: (F, D), all pictures of the batch in reading order; is_image:
    (B, T) bool with exactly F True. Returns (B, T, D) in embeddings' dtype.
    Raises PromptError when the counts differ. After Liu et al. 2023 (arXiv:2304.08485), section 4.1.
    """
    num_placeholders = int(is_image.sum())
    if num_placeholders != features.shape[0]:
        raise PromptError(
            f"{num_placeholders} image placeholders in the tokens but {features.shape[0]} image features; "
            "the tokens and the pictures must come from the same processor call"
        )
    return embeddings.masked_scatter(is_image[..., None], features.to(embeddings))
