"""What a language model's attention can be trusted with, found out by trying it on a tiny model of the same family.

transformers has some hundred families, and whether one hands a layout on to the attention function, honours a mask of
four dimensions, positions that restart, or a sliding window is nowhere written down. So a random model of two layers
is built from the family's own configuration, a tree and a short text go through it, and the result is compared with
the same sequences one by one. A family that fails the first way is tried on the next:

    layout   trees, attention by trees (exact, no mask)
    mask     trees, a (B, 1, T, T) mask
    rows     no trees, plain packing with a mask (MPT's ALiBi counts columns)
    none     one conversation a row
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from llava.model.language import run_language_model, sliding_window_of
from llava.model.last_block import last_block_only_at, position_wise_modules
from llava.model.tree_attention import NAME, TreeLayout, TreeRefusalError, register

_log = logging.getLogger(__name__)

Way = Literal["layout", "mask", "rows", "none"]
_WIDEST_HEADS = 4
_PROBE_WINDOW = 4
_TOLERANCE = 1e-4  # float32 rounding is 1e-6 here; a branch that sees the other one is off by a tenth and more


@dataclass(frozen=True)
class TreeSupport:
    """The best way that is exact, and for every better one why it is not. last_block: whether the last block may be
    computed at chosen positions only (model/last_block.py)."""

    way: Way
    reasons: tuple[str, ...] = ()
    last_block: bool = False

    @property
    def trees(self) -> bool:
        """Whether conversations may share a prefix."""
        return self.way in ("layout", "mask")


def enable_tree_attention(language_model: nn.Module) -> bool:
    """Let this language model attend by trees when `tree_layout` is given; False when its family cannot.

    Without a layout it goes on as before (sdpa). The choice is made on the model's own configuration object.
    """
    config: Any = cast(Any, language_model).config
    if find_tree_support(language_model).way != "layout":
        return False
    register()
    config._attn_implementation = NAME
    return True


def find_tree_support(language_model: nn.Module) -> TreeSupport:
    """What this model's family can do; tried once a configuration. Says in the log what is slower than it could be."""
    config: Any = cast(Any, language_model).config
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("sdpa", NAME, "eager", None):
        return TreeSupport("none", (f"attention is {implementation}",))
    written = {key: value for key, value in config.to_dict().items() if key not in _IRRELEVANT}
    text = json.dumps(written, sort_keys=True, default=str)
    return _tried(cast(Hashable, type(config)), text, "eager" if implementation == "eager" else "sdpa")


_IRRELEVANT = ("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "quantization_config")


@lru_cache(maxsize=64)
def _tried(config_class: Any, written: str, implementation: str) -> TreeSupport:
    reasons: list[str] = []
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        try:
            model = _tiny(config_class.from_dict(json.loads(written)), implementation)
        # Any of a hundred families' constructors: whatever it raises, the answer is that nothing was shown.
        except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, ImportError, IndexError) as error:
            return _logged(config_class, TreeSupport("none", (f"no tiny model of it can be built ({error})",)))
        ways: tuple[Way, ...] = ("layout", "mask", "rows") if implementation == "sdpa" else ("mask", "rows")
        for way in ways:
            failure = _failure(model, way)
            if failure is None:
                return _logged(config_class, TreeSupport(way, tuple(reasons), _picks_positions(model)))
            reasons.append(f"{way}: {failure}")
    return _logged(config_class, TreeSupport("none", tuple(reasons)))


def _logged(config_class: type[Any], support: TreeSupport) -> TreeSupport:
    meaning = {
        "mask": "attention uses a mask, so rows stay short",
        "rows": "conversations on a picture do not share its tokens: plain packing",
        "none": "one conversation a row, padded",
    }
    if support.way in meaning:
        family = getattr(config_class, "model_type", config_class.__name__)
        _log.info("%s: %s (%s)", family, meaning[support.way], "; ".join(support.reasons))
    return support


def _tiny(config: Any, implementation: str) -> nn.Module:
    """A random model of two layers (as many as there are kinds of layers) with everything else as in the original."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    own = vars(config)  # what is computed from it cannot be set
    kinds = own.get("layer_types")
    if kinds:
        # one layer of each kind, in the order in which they first come
        config.layer_types = [kind for place, kind in enumerate(kinds) if kind not in kinds[:place]]
    config.num_hidden_layers = len(config.layer_types) if kinds else 2
    heads = int(config.num_attention_heads)
    kept = next(n for n in range(min(heads, _WIDEST_HEADS), 0, -1) if heads % n == 0)
    own_width = own.get("head_dim")
    if getattr(config, "num_key_value_heads", None):
        groups = heads // int(config.num_key_value_heads)
        config.num_key_value_heads = max(1, kept // groups)
    config.hidden_size = int(config.hidden_size) // heads * kept
    if own_width:
        config.head_dim = own_width
    config.num_attention_heads = kept
    config.vocab_size = 16
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    for name in ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"):
        if isinstance(own.get(name), int):
            setattr(config, name, 2 * config.hidden_size)
    if "word_embed_proj_dim" in own:  # OPT
        config.word_embed_proj_dim = config.hidden_size
    if sliding_window_of(config) is not None:
        config.sliding_window = _PROBE_WINDOW
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation)
    model = cast(nn.Module, made)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # families start with weights so small that attention hardly shows
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def _failure(model: nn.Module, way: Way) -> str | None:
    """Why the tiny model cannot be run this way; None when it gives what separate sequences give."""
    config: Any = cast(Any, model).config
    prefix, lengths = (0, (7, 4, 6)) if way == "rows" else (5, (4, 3, 6))
    inputs = torch.randn(1, prefix + sum(lengths), config.hidden_size)
    try:
        expected = _separately(model, inputs, prefix, lengths)
        made = _together(model, inputs, prefix, lengths, way)
    except TreeRefusalError as refusal:
        return str(refusal)
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    off = float((made - expected).abs().max() / expected.abs().max())
    return None if off < _TOLERANCE else f"{off:.1e} off separate sequences"


def _picks_positions(model: nn.Module) -> bool:
    """Whether the tiny model's last block gives the same at chosen positions when it is computed there only."""
    config: Any = cast(Any, model).config
    inputs, chosen = torch.randn(2, 6, config.hidden_size), torch.tensor([1, 4, 5, 9])
    if not position_wise_modules(model):
        return False
    try:
        with torch.no_grad():
            expected = run_language_model(model, inputs).flatten(0, 1)[chosen]
            with last_block_only_at(model, chosen):
                made = run_language_model(model, inputs).flatten(0, 1)[chosen]
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError):
        return False
    return float((made - expected).abs().max() / expected.abs().max()) < _TOLERANCE


def _separately(model: nn.Module, inputs: Tensor, prefix: int, lengths: tuple[int, ...]) -> Tensor:
    """Hidden states of the two branches and of the last sequence, each alone."""
    model.eval()
    parts = []
    cursor = prefix
    for place, length in enumerate(lengths):
        own = inputs[:, cursor : cursor + length]
        beginning = inputs[:, : prefix if place < len(lengths) - 1 else 0]
        with torch.no_grad():
            alone = run_language_model(model, torch.cat([beginning, own], 1))
        parts.append(alone[:, beginning.shape[1] :])
        cursor += length
    return torch.cat(parts, 1)


def _together(model: nn.Module, inputs: Tensor, prefix: int, lengths: tuple[int, ...], way: Way) -> Tensor:
    """The same in one row: a tree of all but the last, then the last."""
    *branches, last = lengths
    if prefix:
        trees = [0] * (prefix + sum(branches)) + [1] * last
        within = [0] * prefix + [n for n, length in enumerate(branches, 1) for _ in range(length)] + [1] * last
        positions = [*range(prefix), *(prefix + i for n in branches for i in range(n)), *range(last)]
    else:
        trees = [n for n, length in enumerate(lengths) for _ in range(length)]
        within = [1] * sum(lengths)
        positions = [i for n in lengths for i in range(n)]
    tree_ids, branch_ids = torch.tensor([trees]), torch.tensor([within])
    arguments: dict[str, Any] = {"position_ids": torch.tensor([positions])}
    if way == "layout":
        arguments["tree_layout"] = TreeLayout.from_ids(np.array([trees]), np.array([within]))
        register()
        cast(Any, model).config._attn_implementation = NAME
    else:
        same = tree_ids[:, :, None] == tree_ids[:, None, :]
        near = (branch_ids[:, None, :] == 0) | (branch_ids[:, :, None] == branch_ids[:, None, :])
        arguments["attention_mask"] = (same & near & torch.ones(same.shape[1:], dtype=torch.bool).tril())[:, None]
    try:
        with torch.no_grad():
            model.train()  # attention dropout shows itself, and is refused, in training only
            if way == "layout":
                run_language_model(model, inputs, **arguments)
            model.eval()
            return run_language_model(model, inputs, **arguments)[:, prefix:]
    finally:
        if way == "layout":
            cast(Any, model).config._attn_implementation = "sdpa"
