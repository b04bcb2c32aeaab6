"""Language models as the engine sees them: prefill prompts that share a beginning, then one token a step for each.

Two implementations of `Decoder`. `LeanDecoder` (in lean.py) has its own step for Llama-like models and runs many
answers at once. `PlainDecoder` here runs any causal language model of transformers through its own forward, one answer
at a time, with the model's own cache: right for sliding windows, recurrent layers and whatever comes next, but slower.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llava.inference.prefix_cache import Stored


@dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """Prompts that begin alike. A prompt's own part, its suffix, has at least one token.

    prefix_ids: (P,) int64, P may be 0. suffix_ids: one (S,) int64 a prompt. max_new_tokens: for each prompt, how many
    tokens it may grow by. known: what was computed for the first `known_length` tokens of the prefix at another time.
    image_features: (F, D) for the F placeholders behind those, None without. Placeholders stand in the prefix, unless
    the group has one prompt only.
    """

    prefix_ids: Tensor
    image_features: Tensor | None
    suffix_ids: tuple[Tensor, ...]
    max_new_tokens: tuple[int, ...]
    known: Stored | None = None
    known_length: int = 0


class Decoder(Protocol):
    """What the engine needs of a model. An answer under way is known by a number that the engine chose, its branch."""

    device: torch.device
    context_length: int
    bytes_per_token: int
    """Memory that one token of one prompt takes in the key-value cache."""

    def prefill(self, group: Group, branches: Sequence[int]) -> Tensor:
        """Read a group's prompts, one branch each; returns the logits (len(branches), V) of their first new tokens."""

    def step(self, branches: Sequence[int], token_ids: Sequence[int]) -> Tensor:
        """Add one token to each branch; returns the logits (len(branches), V) of their next ones."""

    def keep(self, branch: int) -> Stored | None:
        """A copy of what was computed for a branch, for later prompts that begin like it; None where that is not to be
        had. Of a branch that shares its row it is the beginning that all branches of the row share.
        """

    def fork(self, source: int, target: int) -> None:
        """Make a new branch that has read and said what `source` has. `source` has a row to itself."""

    def free(self, branches: Sequence[int]) -> None:
        """Forget branches and give their memory back."""


class LlavaLike(Protocol):
    """The parts of `llava.model.llava.Llava` that are used here."""

    config: Any
    language_model: Any

    def embed(self, input_ids: Tensor, image_features: Tensor | None) -> Tensor:
        """(B, T) ids and (F, D) features -> (B, T, D)."""

    def encode_images(
        self, pixel_values: Tensor, *, image_sizes: Sequence[tuple[int, int]], tiles_per_image: Sequence[int]
    ) -> list[Tensor]:
        """(N, 3, H, W) tiles -> one (F_i, D) a picture."""


class PlainDecoder:
    """Any causal language model, through its own forward and its own cache, one branch at a time."""

    def __init__(self, model: LlavaLike) -> None:
        self._model = model
        self._caches: dict[int, Any] = {}
        config = model.language_model.config
        self._lookup: nn.Module = model.language_model.get_input_embeddings()
        self.device: torch.device = model.language_model.get_input_embeddings().weight.device
        self.context_length = context_length(config)
        self.bytes_per_token = bytes_per_token(config, next(model.language_model.parameters()).element_size())

    def prefill(self, group: Group, branches: Sequence[int]) -> Tensor:
        prefix_cache: Any = None
        if group.known is not None:
            prefix_cache = copy.deepcopy(group.known.state)
            surplus = group.known.length - group.known_length
            if surplus:
                prefix_cache.crop(-surplus)
        unread = group.prefix_ids[group.known_length :]
        if len(branches) == 1:
            ids = torch.cat([unread, group.suffix_ids[0]])
            embeddings = self._model.embed(ids[None], group.image_features)
            return self._forward(branches[0], prefix_cache, embeddings)
        if len(unread) > 0:
            embeddings = self._model.embed(unread[None], group.image_features)
            self._forward(branches[0], prefix_cache, embeddings)
            prefix_cache = self._caches.pop(branches[0])
        rows = []
        for branch, suffix in zip(branches, group.suffix_ids, strict=True):
            embeddings = self._model.embed(suffix[None], None)
            rows.append(self._forward(branch, copy.deepcopy(prefix_cache), embeddings))
        return torch.cat(rows)

    def step(self, branches: Sequence[int], token_ids: Sequence[int]) -> Tensor:
        embedded = self._lookup(torch.tensor(token_ids, device=self.device)[:, None, None])  # (N, 1, 1, D)
        rows = [
            self._forward(branch, self._caches[branch], row) for branch, row in zip(branches, embedded, strict=True)
        ]
        return torch.cat(rows)

    def keep(self, branch: int) -> Stored | None:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache: Any = self._caches[branch]
        # Only a cache of whole keys and values can be cut back to where two prompts part (not a window, not a state).
        if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None
        length = cache.get_seq_length()
        return Stored(copy.deepcopy(cache), length, length * self.bytes_per_token)

    def fork(self, source: int, target: int) -> None:
        self._caches[target] = copy.deepcopy(self._caches[source])

    def free(self, branches: Sequence[int]) -> None:
        for branch in branches:
            self._caches.pop(branch, None)

    def _forward(self, branch: int, cache: Any, embeddings: Tensor) -> Tensor:
        """Logits (1, V) after the last of embeddings (1, T, D); the grown cache becomes the branch's."""
        output = self._model.language_model(
            inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        self._caches[branch] = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits


def context_length(config: Any) -> int:
    """How many tokens a language model's prompt and answer may have together; a large number where it sets no limit."""
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return 2**31


def bytes_per_token(config: Any, element_size: int) -> int:
    """Memory of one token's keys and values in all layers."""
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * key_value_heads * head_dim * element_size)
