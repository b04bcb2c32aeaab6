"""Names of parameters in each format, as literal tables with their inverses.

The common spelling is the one that published Hugging Face LLaVA folders use ("classic"): `language_model.model.*`,
`language_model.lm_head.*`, `multi_modal_projector.linear_N.*`, `vision_tower.vision_model.*`, `image_newline`. Every
reader renames to it, every writer from it, and the model in memory is matched against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from llava.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class Renaming:
    """Prefixes of one format beside the common ones; the first that fits is exchanged, the rest of the name is kept."""

    table: tuple[tuple[str, str], ...]

    def rename(self, name: str) -> str | None:
        """The common name of a name of this format, None when no prefix fits."""
        return next((new + name[len(old) :] for old, new in self.table if name.startswith(old)), None)

    def restore(self, name: str) -> str | None:
        """The name in this format of a common name: the inverse of `rename`."""
        return next((old + name[len(new) :] for old, new in self.table if name.startswith(new)), None)

    def spelled(self, name: str, keys: Iterable[str]) -> str:
        """The inverse of `rename` where several spellings are known: the one that the other `keys` are written in."""
        fitting = [(old, old + name[len(new) :]) for old, new in self.table if name.startswith(new)]
        keys = list(keys)
        used = [(old, spelled) for old, spelled in fitting if any(key.startswith(old) for key in keys)]
        if used:
            return max(used, key=lambda pair: len(pair[0]))[1]
        return fitting[0][1] if fitting else name

    def rename_all(self, tensors: Mapping[str, T]) -> tuple[dict[str, T], list[str]]:
        """A dict under common names, and the names that no prefix fits. Two names that become one are an error."""
        out: dict[str, T] = {}
        unknown = []
        for name, value in tensors.items():
            common = self.rename(name)
            if common is None:
                unknown.append(name)
            elif common in out:
                raise CheckpointError(f"two keys mean {common!r}, one of them {name!r}; the checkpoint is ambiguous")
            else:
                out[common] = value
        return out, unknown


# Hugging Face LLaVA folders, as published and as stock transformers 5 saves them.
HUGGINGFACE = Renaming(
    (
        ("language_model.model.", "language_model.model."),
        ("language_model.lm_head.", "language_model.lm_head."),
        ("multi_modal_projector.", "multi_modal_projector."),
        ("vision_tower.vision_model.", "vision_tower.vision_model."),
        ("vision_tower.", "vision_tower.vision_model."),
        ("image_newline", "image_newline"),
        # the names in memory of transformers 5, which other tools write as they are
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.image_newline", "image_newline"),
    )
)

# The original LLaVA and its language models in Hugging Face names. Projector slots are Sequential numbers in the mlp
# (even: linear, odd: GELU); the linear projector has none.
ORIGINAL = Renaming(
    (
        ("model.mm_projector.weight", "multi_modal_projector.linear_1.weight"),
        ("model.mm_projector.bias", "multi_modal_projector.linear_1.bias"),
        *((f"model.mm_projector.{2 * n}.", f"multi_modal_projector.linear_{n + 1}.") for n in range(8)),
        ("model.image_newline", "image_newline"),
        ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.vision_tower.vision_tower.", "vision_tower.vision_model."),
        ("model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    )
)

# The same on MPT, whose decoder is called `transformer` and whose head is always its embedding.
ORIGINAL_MPT = Renaming(
    tuple((old.replace("model.", "transformer.", 1), new) for old, new in ORIGINAL.table if old != "lm_head.")
)

# The two again without the linear projector's names: a projector of several layers is written with its slots.
MULTI_LAYER_PROJECTOR = {
    is_mpt: Renaming(tuple(row for row in table.table if row[0].rpartition(".")[2] not in ("weight", "bias")))
    for is_mpt, table in ((False, ORIGINAL), (True, ORIGINAL_MPT))
}

# A language model alone.
LANGUAGE_MODEL = Renaming(
    (
        ("model.", "language_model.model."),
        ("transformer.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    )
)

# A vision tower alone: a whole CLIP or SigLIP, its vision half, or that without the level between.
TOWER = Renaming(
    (
        ("vision_model.", "vision_tower.vision_model."),
        ("embeddings.", "vision_tower.vision_model.embeddings."),
        ("pre_layrnorm.", "vision_tower.vision_model.pre_layrnorm."),
        ("encoder.", "vision_tower.vision_model.encoder."),
        ("post_layernorm.", "vision_tower.vision_model.post_layernorm."),
        ("head.", "vision_tower.vision_model.head."),
    )
)

# What a whole CLIP or SigLIP has beside its vision tower.
NOT_OF_THE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")

# Tables that are computed, not learnt; old checkpoints hold them.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids|attn\.attn_bias|masked_bias)$")


def refuse_strangers(raw: Mapping[str, Any], unknown: Iterable[str], what: str) -> None:
    """Raise CheckpointError for the first unknown key that is not a computed table. raw: sources by key."""
    strangers = [name for name in unknown if not COMPUTED.search(name)]
    if strangers:
        source = raw[strangers[0]]
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise CheckpointError(
            f"{source.file}: unexpected key {strangers[0]!r} of shape {list(source.shape)}{more}; no name of {what}"
        )


def common_name(name: str, model: Any) -> str:
    """The common name of a parameter of `Llava` in memory.

    transformers' versions differ in the tower's `vision_model.` level, and families in the name of the decoder
    (`model`, MPT's `transformer`).
    """
    if name.startswith("vision_tower."):
        rest = name.removeprefix("vision_tower.").removeprefix("vision_model.")
        return f"vision_tower.vision_model.{rest}"
    prefix = f"language_model.{model.language_model.base_model_prefix}."
    if name.startswith(prefix):
        return "language_model.model." + name.removeprefix(prefix)
    return name
