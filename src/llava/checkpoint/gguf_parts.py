"""What a LLaVA is called in llama.cpp: its keys and tensors, for the language model's file and for the mmproj file.

Names and meanings follow llama.cpp's `src/llama-arch.cpp` and `tools/mtmd/clip.cpp`. Limits of the latter that show
here: the projector is one or two layers with a GELU between them (in its tanh form), class tokens are always dropped,
and pictures are padded to a square. What it cannot hold is refused; what it holds differently is a note.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llava.checkpoint.names import COMPUTED
from llava.checkpoint.opened import EMBEDDING, HEAD
from llava.checkpoint.weights import Source
from llava.errors import CheckpointError
from llava.model.config import LlavaConfig

ClassToken = Literal["first", "last"]
KeyValue = bool | int | float | str | Sequence[Any]
# Language model families and llama.cpp's name for their layout. Only `llama` pairs neighbouring numbers in its rotary
# embedding, so only there the rows of q and k change places.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
LANGUAGE_TOP = {
    EMBEDDING: "token_embd.weight",
    "language_model.model.norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
LANGUAGE_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
POSITIONS = "embeddings.position_embedding.weight"
TOWER_TOP = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    POSITIONS: "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
TOWER_LAYER = {
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
# clip.cpp knows three activations; quick_gelu is its default
TOWER_ACTIVATIONS = {"quick_gelu": {}, "gelu": {"clip.use_gelu": True}, "gelu_pytorch_tanh": {"clip.use_gelu": True}}
LANGUAGE_BLOCK = re.compile(r"language_model\.model\.layers\.(\d+)\.(.+)\.(weight|bias)")
TOWER_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
TOWER_PREFIX = "vision_tower.vision_model."
# Parts of a tower that LLaVA does not use: it reads hidden states, before the final norm and the pooling head.
UNUSED_TOWER_PARTS = ("post_layernorm.", "head.")


@dataclass(frozen=True)
class Planned:
    """A tensor of a GGUF file: its name, shape (slowest axis first) and how to make it.

    exact: kept in 32 bits whatever the file's type, as llama.cpp wants norms, biases and position tables.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    origin: str
    exact: bool = False


@dataclass(frozen=True)
class Part:
    """One GGUF file's architecture, keys and tensors, and what llama.cpp does otherwise than the model."""

    architecture: str
    keys: Mapping[str, KeyValue]
    tensors: tuple[Planned, ...]
    notes: tuple[str, ...] = ()


def plan_language_model(tensors: Mapping[str, Source], config: LlavaConfig) -> Part:
    """Keys and tensors of the language model. tensors: the whole model's, by common name.

    Raises CheckpointError for a family, rotary scaling or tensor that llama.cpp's layout cannot hold.
    """
    text = config.text_config
    family = str(text["model_type"])
    if family not in ARCHITECTURES:
        raise CheckpointError(
            f"GGUF: language model of type {family!r}; written are {', '.join(ARCHITECTURES)}. Convert with --to hf "
            "and use llama.cpp's own convert_hf_to_gguf.py for the language model"
        )
    arch = ARCHITECTURES[family]
    heads, groups = (
        int(text["num_attention_heads"]),
        int(text.get("num_key_value_heads") or text["num_attention_heads"]),
    )
    width = int(text["hidden_size"])
    head = int(text.get("head_dim") or width // heads)
    rope_keys, rope_tensors = _plan_rope(text, arch, head)
    keys: dict[str, KeyValue] = {
        f"{arch}.vocab_size": _rows(tensors),
        f"{arch}.context_length": int(text["max_position_embeddings"]),
        f"{arch}.embedding_length": width,
        f"{arch}.block_count": int(text["num_hidden_layers"]),
        f"{arch}.feed_forward_length": int(text["intermediate_size"]),
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": groups,
        f"{arch}.attention.layer_norm_rms_epsilon": float(text["rms_norm_eps"]),
        f"{arch}.attention.key_length": head,
        f"{arch}.attention.value_length": head,
        f"{arch}.rope.dimension_count": head,
        **rope_keys,
    }
    tied = bool(text.get("tie_word_embeddings"))
    planned = list(rope_tensors)
    for name, source in tensors.items():
        if not name.startswith("language_model.") or COMPUTED.search(name) or (tied and name == HEAD):
            continue
        target, order = _language_name(name, source), None
        if arch == "llama" and ".self_attn.q_proj." in name:
            order = heads
        elif arch == "llama" and ".self_attn.k_proj." in name:
            order = groups
        planned.append(_planned(target, source, order))
    return Part(arch, keys, tuple(planned), _language_notes(text))


def _rows(tensors: Mapping[str, Source]) -> int:
    if EMBEDDING not in tensors:
        raise CheckpointError(f"GGUF: the checkpoint has no {EMBEDDING!r}; it is not a whole model")
    return tensors[EMBEDDING].shape[0]


def _language_name(name: str, source: Source) -> str:
    if name in LANGUAGE_TOP:
        return LANGUAGE_TOP[name]
    match = LANGUAGE_BLOCK.fullmatch(name)
    if match is None or match[2] not in LANGUAGE_LAYER:
        raise CheckpointError(f"{source.file}: {source.key!r} has no place in llama.cpp's layout of this family")
    return f"blk.{match[1]}.{LANGUAGE_LAYER[match[2]]}.{match[3]}"


def _planned(name: str, source: Source, rotary_heads: int | None = None) -> Planned:
    exact = len(source.shape) == 1
    if rotary_heads is None:
        return Planned(name, source.shape, source.read, source.key, exact)
    return Planned(name, source.shape, lambda: pair_rotary(source.read(), rotary_heads), source.key, exact)


def pair_rotary(value: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection (weight or bias) in llama.cpp's order.

    Hugging Face turns number i of a head together with number i + head/2; llama.cpp's `llama` turns 2i with 2i + 1.
    value: (heads * head, ...). Returns the same shape.
    """
    half = value.shape[0] // heads // 2
    return value.reshape(heads, 2, half, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def _plan_rope(text: Mapping[str, Any], arch: str, head: int) -> tuple[dict[str, KeyValue], list[Planned]]:
    """Rotary settings; Llama 3's scaling becomes a tensor of factors, linear scaling a key."""
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or text.get("rope_theta") or 10000.0)
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    keys: dict[str, KeyValue] = {f"{arch}.rope.freq_base": theta}
    if kind == "default":
        return keys, []
    if kind == "linear":
        return {**keys, f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": float(rope["factor"])}, []
    if kind == "llama3":
        factors = llama3_factors(rope, theta=theta, head=head)
        value = torch.tensor(factors, dtype=torch.float32)
        return keys, [Planned("rope_freqs.weight", (len(factors),), lambda: value, "rope_parameters", exact=True)]
    raise CheckpointError(f"GGUF: rotary scaling {kind!r}; written are default, linear and llama3")


def llama3_factors(rope: Mapping[str, Any], *, theta: float, head: int) -> list[float]:
    """What each rotary frequency is divided by in Llama 3.1's scaling, one for each pair of a head's numbers."""
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context = float(rope["original_max_position_embeddings"])
    out = []
    for pair in range(head // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head)
        if wavelength < context / high:
            out.append(1.0)
        elif wavelength > context / low:
            out.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return out


def _language_notes(text: Mapping[str, Any]) -> tuple[str, ...]:
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    if window and int(window) < int(text["max_position_embeddings"]):
        return (f"llama.cpp's layout has no sliding window here: answers differ beyond {window} tokens",)
    return ()


def plan_mmproj(
    tensors: Mapping[str, Source],
    config: LlavaConfig,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    class_token: ClassToken,
) -> Part:
    """Keys and tensors of tower and projector. mean, std: a picture's normalisation, (3,) each, for pixels 0 to 1.

    class_token: where llama.cpp puts a CLIP tower's class token, see `plan_gguf`.

    Raises CheckpointError for what clip.cpp cannot hold: other towers than CLIP and SigLIP, kept class tokens,
    projectors of three layers or more, the identity.
    """
    vision = config.vision_config
    if vision["model_type"] not in ("clip_vision_model", "siglip_vision_model"):
        raise CheckpointError(f"GGUF: vision tower {vision['model_type']!r}; llama.cpp's LLaVA takes CLIP or SigLIP")
    if config.tower_has_cls != bool(config.skipped_tokens):
        raise CheckpointError(
            f"GGUF: vision_feature_select {config.vision_feature_select!r}; llama.cpp's LLaVA uses every patch and "
            "never the class token"
        )
    if config.projector not in ("linear", "mlp2x_gelu"):
        raise CheckpointError(f"GGUF: projector {config.projector!r}; llama.cpp's LLaVA takes linear or mlp2x_gelu")
    activation = str(vision.get("hidden_act", "quick_gelu"))
    if activation not in TOWER_ACTIVATIONS:
        raise CheckpointError(f"GGUF: tower activation {activation!r}; llama.cpp has {', '.join(TOWER_ACTIVATIONS)}")
    layers = _feature_layers(config)
    # clip.cpp's own default is the state before its last block, so one block more than is run is written where there
    # is one: readers that do not know `feature_layer` then take the same state.
    blocks = min(max(layers) + 1, int(vision["num_hidden_layers"]))
    keys: dict[str, KeyValue] = {
        "clip.has_vision_encoder": True,
        "clip.has_text_encoder": False,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.vision.image_size": config.image_size,
        "clip.vision.patch_size": int(vision["patch_size"]),
        "clip.vision.embedding_length": int(vision["hidden_size"]),
        "clip.vision.feed_forward_length": int(vision["intermediate_size"]),
        "clip.vision.projection_dim": config.text_width,
        "clip.vision.block_count": blocks,
        "clip.vision.attention.head_count": int(vision["num_attention_heads"]),
        "clip.vision.attention.layer_norm_epsilon": float(vision["layer_norm_eps"]),
        "clip.vision.image_mean": [float(value) for value in mean],
        "clip.vision.image_std": [float(value) for value in std],
        "clip.vision.feature_layer": sorted(layers),
        "clip.use_gelu": False,
        **TOWER_ACTIVATIONS[activation],
    }
    if config.image_mode == "anyres":
        # llama.cpp reads (width, height) pairs
        keys["clip.vision.image_grid_pinpoints"] = [n for h, w in config.image_grid_pinpoints for n in (w, h)]
        keys["clip.vision.mm_patch_merge_type"] = config.merge_type
    positions = -1 if config.tower_has_cls and class_token == "last" else 0
    if config.tower_has_cls:
        keys["llava.class_token"] = class_token  # nobody reads it; it tells files apart
    swapped = int(vision["intermediate_size"]) == int(vision["hidden_size"])
    planned = [
        tensor
        for name, source in tensors.items()
        if name.startswith(TOWER_PREFIX)
        for tensor in _plan_tower_tensor(name.removeprefix(TOWER_PREFIX), source, blocks, swapped, positions)
    ]
    planned += _plan_projector(tensors, config, layers)
    if "image_newline" in tensors:
        planned.append(_planned("v.image_newline", tensors["image_newline"]))
    return Part("clip", keys, tuple(planned), _picture_notes(config, class_token))


def _feature_layers(config: LlavaConfig) -> tuple[int, ...]:
    """The chosen hidden states as numbers from 0, in the configuration's order."""
    given = config.vision_feature_layer
    states = int(config.vision_config["num_hidden_layers"]) + 1
    layers = tuple(layer % states for layer in ((given,) if isinstance(given, int) else given))
    if min(layers) == 0 or len(set(layers)) < len(layers):
        raise CheckpointError(f"GGUF: vision_feature_layer {given}; llama.cpp takes outputs of blocks, each once")
    return layers


def _plan_tower_tensor(name: str, source: Source, blocks: int, swapped: bool, positions: int) -> Iterable[Planned]:
    """positions: by how much the table of positions is rotated, so that each token finds its own."""
    if name == POSITIONS and positions:
        yield Planned(TOWER_TOP[name], source.shape, lambda: source.read().roll(positions, 0), source.key, exact=True)
        return
    if name in TOWER_TOP:
        exact = "patch_embedding" not in name or len(source.shape) == 1
        yield Planned(TOWER_TOP[name], source.shape, source.read, source.key, exact)
        return
    if COMPUTED.search(name) or name.startswith(UNUSED_TOWER_PARTS):
        return
    match = TOWER_BLOCK.fullmatch(name)
    if match is None or match[2] not in TOWER_LAYER:
        raise CheckpointError(f"{source.file}: {source.key!r} has no place in llama.cpp's vision tower")
    if int(match[1]) < blocks:
        target = TOWER_LAYER[match[2]]
        # Files of old converters had up and down exchanged. clip.cpp tells them by the widths and exchanges them back,
        # so with equal widths it does it to every file.
        if swapped and target.startswith("ffn_"):
            target = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}[target]
        yield _planned(f"v.blk.{match[1]}.{target}.{match[3]}", source)


def _plan_projector(tensors: Mapping[str, Source], config: LlavaConfig, layers: tuple[int, ...]) -> list[Planned]:
    first, second = (f"multi_modal_projector.linear_{n}" for n in (1, 2))
    needed = [f"{first}.weight", f"{first}.bias"]
    if config.projector == "mlp2x_gelu":
        needed += [f"{second}.weight", f"{second}.bias"]
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise CheckpointError(f"GGUF: the checkpoint has no {missing[0]!r}")
    weight, bias = tensors[needed[0]], tensors[needed[1]]

    def read_weight() -> Tensor:
        """The first layer with its columns in llama.cpp's order of feature layers, which is ascending."""
        blocks = weight.read().chunk(len(layers), dim=1)
        return torch.cat([blocks[index] for index in sorted(range(len(layers)), key=lambda i: layers[i])], dim=1)

    if config.projector == "mlp2x_gelu":
        return [
            Planned("mm.0.weight", weight.shape, read_weight, weight.key),
            _planned("mm.0.bias", bias),
            _planned("mm.2.weight", tensors[needed[2]]),
            _planned("mm.2.bias", tensors[needed[3]]),
        ]
    # clip.cpp puts a GELU behind the first layer even when there is no second. gelu(x) - gelu(-x) = x exactly, so one
    # linear layer is written as two of double width.
    width, vision = weight.shape

    def read_both() -> Tensor:
        value = read_weight()
        return torch.cat([value, -value])

    def read_biases() -> Tensor:
        value = bias.read()
        return torch.cat([value, -value])

    def difference() -> Tensor:
        eye = torch.eye(width)
        return torch.cat([eye, -eye], dim=1)

    return [
        Planned("mm.0.weight", (2 * width, vision), read_both, weight.key),
        Planned("mm.0.bias", (2 * width,), read_biases, bias.key, exact=True),
        Planned("mm.2.weight", (width, 2 * width), difference, "identity"),
        Planned("mm.2.bias", (width,), lambda: torch.zeros(width), "zeros", exact=True),
    ]


def _picture_notes(config: LlavaConfig, class_token: ClassToken) -> tuple[str, ...]:
    notes = []
    if config.tower_has_cls:
        builds = {"last": "builds with that defect", "first": "builds without it (before May 2025, or mended)"}
        notes.append(
            "llama.cpp misplaces a CLIP tower's class token (its issue 25814): some answers differ from ours; these "
            f"files are for {builds[class_token]}"
        )
    if config.image_mode in ("crop", "squash"):
        notes.append(f"llama.cpp pads pictures to a square; this model was made for image mode {config.image_mode!r}")
    if config.image_mode == "anyres" and config.merge_type != "flat":
        notes.append(
            f"llama.cpp puts a picture's tiles one after another; merge type {config.merge_type!r} is not followed"
        )
    if config.image_start_end:
        notes.append("write <im_start> and <im_end> around the picture yourself: llama.cpp does not")
    return tuple(notes)
