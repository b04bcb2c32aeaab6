"""The language model's part of the forward pass: transformers' own class, with the traps of packed rows closed.

With `attention_mask=None` and position ids that restart, transformers 5 guesses that rows are packed, and branches of a
tree lose their picture; with an all-ones mask instead, packed samples silently see each other. So restarted positions
are refused without a (B, 1, T, T) mask or a tree layout. And with such a mask its models drop their sliding window, so
the window is put back here.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from llava.model.tree_attention import TreeLayout


def run_language_model(
    language_model: nn.Module,
    embeddings: Tensor,
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool = False,
    tree_layout: TreeLayout | None = None,
) -> Tensor:
    """Hidden states after the final norm of a ...ForCausalLM, (B, T, D); arguments as in `Llava.forward`."""
    config: Any = cast(Any, language_model).config
    decoder: Any = cast(Any, language_model).base_model
    mask: Tensor | Mapping[str, Tensor] | None = attention_mask
    extra: dict[str, Any] = {}
    if tree_layout is not None:
        # Who sees whom is in the layout. A mask of four dimensions, whatever its size, keeps transformers from
        # making one of its own out of the restarted positions.
        nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeddings.device)
        mask = _as_taken(nothing, nothing, config)
        extra["tree_layout"] = tree_layout
    else:
        if position_ids is not None:
            refuse_unmasked_restarts(position_ids, attention_mask)
        if attention_mask is not None and attention_mask.dim() == 4:
            mask = prepare_mask(attention_mask, position_ids, config, embeddings.dtype)
    if position_ids is not None and _takes_positions(cast(Hashable, type(decoder))):
        extra["position_ids"] = position_ids
    output = decoder(
        inputs_embeds=embeddings, attention_mask=mask, past_key_values=past_key_values, use_cache=use_cache, **extra
    )
    return cast(Tensor, output[0])


def build_language_model(text_config: Mapping[str, Any]) -> nn.Module:
    """A ...ForCausalLM of this configuration on the default device, weights not loaded."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    values = {key: value for key, value in text_config.items() if key != "model_type"}
    config = CONFIG_MAPPING[text_config["model_type"]](**values)
    chosen = attention_implementation(config)
    return cast(nn.Module, AutoModelForCausalLM.from_config(config, attn_implementation=chosen))


def attention_implementation(config: Any) -> Literal["sdpa", "eager"]:
    """sdpa, which takes boolean masks as they are, or eager for the families that transformers has no sdpa for."""
    from transformers import AutoModelForCausalLM

    family: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return "sdpa" if getattr(family, "_supports_sdpa", False) else "eager"


def refuse_unmasked_restarts(position_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise ValueError when positions restart inside a row and no (B, 1, T, S) mask says who may see whom.

    position_ids: (B, T); attention_mask: None, (B, S) or (B, 1, T, S). Padding (0 in a (B, S) mask) does not count.
    """
    if position_ids.shape[1] < 2 or (attention_mask is not None and attention_mask.dim() == 4):
        return
    broken = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if attention_mask is not None:
        real = attention_mask[:, -position_ids.shape[1] :].bool()
        broken = broken & real[:, 1:] & real[:, :-1]
    if bool(broken.any()):
        raise ValueError(
            "position_ids restart inside a row, so the row is packed: pass attention_mask as (B, 1, T, T) bool "
            "(Batch.attention_mask()); without it packed samples see each other or lose their picture"
        )


def prepare_mask(
    allowed: Tensor, position_ids: Tensor | None, config: Any, dtype: torch.dtype
) -> Tensor | Mapping[str, Tensor]:
    """An explicit mask in the form that this language model takes, with its sliding window put back.

    allowed: (B, 1, T, S) bool. The window counts positions, not columns: a branch's tokens are as near to the shared
    prefix as they would be in a row of their own. Returns bool for sdpa, an additive float mask for eager attention,
    and a mapping by layer type where layers differ.
    """
    window = sliding_window_of(config)
    if window is None or position_ids is None or int(position_ids.max()) < window:
        narrowed = allowed
    else:
        if allowed.shape[-1] != allowed.shape[-2]:
            raise ValueError("an explicit mask over cached tokens is not supported with a sliding window")
        distance = position_ids[:, None, :, None] - position_ids[:, None, None, :]  # (B, 1, T, T)
        narrowed = allowed & (distance < window)
    if config.model_type == "mpt":
        _refuse_trees_for_alibi(allowed, position_ids)
    if getattr(config, "_attn_implementation", "sdpa") == "eager":
        lowest = torch.finfo(dtype).min
        allowed, narrowed = (
            torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
            for mask in (allowed, narrowed)
        )
    return _as_taken(allowed, narrowed, config)


def _as_taken(full: Tensor, narrowed: Tensor, config: Any) -> Tensor | Mapping[str, Tensor]:
    """One mask, or one by layer type where layers differ."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds == {"full_attention", "sliding_attention"}:
        return {"full_attention": full, "sliding_attention": narrowed}
    if kinds == {"full_attention"} or sliding_window_of(config) is None:
        return full
    return narrowed


def sliding_window_of(config: Any) -> int | None:
    """How many positions back a token sees in the layers that have a window; None when none has."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return cast(int | None, getattr(config, "sliding_window", None))


@lru_cache(maxsize=32)
def _takes_positions(decoder: Any) -> bool:
    """Of a decoder's class; MPT's and other ALiBi decoders count columns and take no positions."""
    return "position_ids" in inspect.signature(decoder.forward).parameters


def _refuse_trees_for_alibi(allowed: Tensor, position_ids: Tensor | None) -> None:
    """Raise ValueError for trees on MPT: its ALiBi counts columns, so only plain packing is exact."""
    if position_ids is None:
        return
    offset = torch.arange(position_ids.shape[1], device=position_ids.device)[None] - position_ids  # (B, T)
    different = offset[:, :, None] != offset[:, None, :]  # constant inside a sample
    if bool((allowed[:, 0] & different).any()):
        raise ValueError("MPT's ALiBi counts columns, so branches cannot share a prefix; pack without trees")
