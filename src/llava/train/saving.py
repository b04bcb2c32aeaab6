"""What a run leaves in its folder: a whole model, or, where the language model's weights stay, adapters on a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llava.checkpoint import huggingface
from llava.checkpoint.load import Loaded
from llava.checkpoint.names import common_name
from llava.checkpoint.tuned import MANIFEST
from llava.checkpoint.tuned_writing import tuned_tensors, write_tuned
from llava.train.sections import Recipe, TuneSection
from llava.train.selection import is_frozen
from llava.train.stages import PartSummary


def leaves_adapter(tune: TuneSection) -> bool:
    """Whether a run's folder holds adapters beside a base: there is a LoRA, and the language model's weights stay.

    Any other run leaves a whole model, a LoRA of its tower or projector merged.
    """
    low_rank = ("lora", "qlora")
    stays = is_frozen(tune.language_model) or tune.language_model in low_rank
    return stays and (tune.language_model in low_rank or tune.vision_tower in low_rank)


def bytes_to_save(recipe: Recipe, loaded: Loaded) -> int:
    """How much `save_run` will write: trained weights in float32, a whole model's others as its files have them."""
    trained = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
    learnt = sum(4 * p.numel() for p in trained.values())
    if leaves_adapter(recipe.tune) or loaded.opened is None:
        return learnt
    moved = {common_name(name, loaded.model) for name in trained}
    return learnt + sum(source.num_bytes for name, source in loaded.opened.tensors.items() if name not in moved)


def save_run(
    recipe: Recipe,
    loaded: Loaded,
    folder: Path,
    *,
    summaries: Sequence[PartSummary],
    versions: Mapping[str, str],
) -> Path:
    """Write the run's model into its folder, which then opens with `llava.load`; returns the folder.

    Of a sharded model on process 0, once it is whole there.
    """
    assert loaded.opened is not None, "the run's model was opened by load or build"
    if leaves_adapter(recipe.tune):
        return write_tuned(
            loaded.model,
            loaded.processor,
            folder,
            opened=loaded.opened,
            parts=[vars(summary) for summary in summaries],
            recipe=recipe.model_dump(mode="json"),
            versions=versions,
        )
    tensors = tuned_tensors(loaded.model, loaded.opened.tensors)
    written = huggingface.write(loaded.model.config, tensors, loaded.processor, folder)
    for left in (MANIFEST, "adapter_config.json", "adapter_model.safetensors"):  # of an earlier run in this folder
        (folder / left).unlink(missing_ok=True)
    return written
