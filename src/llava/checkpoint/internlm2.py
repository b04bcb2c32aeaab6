"""InternLM2 as the Llama that it is: the same network with other names and one fused weight.

`attention.wqkv` holds, for each key/value head, its query heads, then the key, then the value. Nothing of the
folder's own Python files is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava.checkpoint.weights import Source
from llava.errors import CheckpointError

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
TOP = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.wo.bias": "self_attn.o_proj.bias",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def llama_config(data: Mapping[str, Any]) -> dict[str, Any]:
    """The Llama configuration of an InternLM2 config.json."""
    dropped = ("model_type", "auto_map", "architectures", "bias", "attn_implementation")
    kept = {key: value for key, value in data.items() if key not in dropped}
    return {**kept, "model_type": "llama", "attention_bias": bool(data.get("bias", False))}


def as_llama(raw: Mapping[str, Source], data: Mapping[str, Any], folder: Path) -> dict[str, Source]:
    """Tensors under Llama's names, the fused weight split; keys of a LLaVA (projector, tower) are passed on."""
    heads = int(data["num_attention_heads"])
    groups = int(data.get("num_key_value_heads", heads))
    head_dim = int(data["hidden_size"]) // heads
    out: dict[str, Source] = {}
    for key, source in raw.items():
        match = LAYER.fullmatch(key)
        if match is None:
            out[TOP.get(key, key)] = source
        elif match[2] in ("attention.wqkv.weight", "attention.wqkv.bias"):
            leaf = match[2].rpartition(".")[2]
            rows = (heads + 2 * groups) * head_dim
            if source.shape[0] != rows:
                raise CheckpointError(f"{source.file}: {key!r} has {source.shape[0]} rows, expected {rows}")
            for part in ("q", "k", "v"):
                count = heads if part == "q" else groups
                shape = (count * head_dim, *source.shape[1:])
                read = _part_reader(source, part, groups, heads // groups, head_dim)
                out[f"model.layers.{match[1]}.self_attn.{part}_proj.{leaf}"] = source.changed(read, shape=shape)
        else:
            out[f"model.layers.{match[1]}.{IN_LAYER.get(match[2], match[2])}"] = source
    return out


def _part_reader(source: Source, part: str, groups: int, queries: int, head_dim: int) -> Any:
    def read() -> torch.Tensor:
        value = source.read()
        rest = value.shape[1:]
        split = value.reshape(groups, queries + 2, head_dim, *rest)
        chosen = {"q": split[:, :queries], "k": split[:, -2], "v": split[:, -1]}[part]
        return chosen.reshape(-1, *rest).contiguous()

    return read
