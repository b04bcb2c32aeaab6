"""Whether a run keeps its tower's features on disk: where the recipe says so, or where it is estimated to pay."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llava.data.batch import Batch
from llava.distributed import process_count
from llava.errors import RecipeError
from llava.model.llava import Llava
from llava.train.feature_cache import FeatureCache, identify_tower
from llava.train.parallel import choose_mode
from llava.train.sections import Recipe
from llava.train.throughput import Cost, Work

_log = logging.getLogger(__name__)

#: The folder of `run.feature_cache: auto` within the run's; it goes when the run is finished.
FOLDER = "features"
# A picture is encoded alone for the cache and its features are read from disk: about a millisecond each.
_LEAST_TILE_FLOPS = 1e9
_LEAST_SAVING = 0.05


@dataclass(frozen=True)
class CacheEstimate:
    """What keeping features would do.

    visits: how often the run sees each picture; saving: the share of the run's needed FLOPs that goes away; tile_flops,
    tile_bytes: of the tower, one tile's.
    """

    visits: float
    saving: float
    tile_flops: float
    tile_bytes: int

    @property
    def pays(self) -> bool:
        """Several epochs, a tower that counts beside the language model, and is slower than a disk."""
        return self.saving >= _LEAST_SAVING and self.tile_flops >= _LEAST_TILE_FLOPS


def estimate_cache(model: Llava, batches: Sequence[Batch], *, visits: float, dtype: torch.dtype) -> CacheEstimate:
    """From one step's batches; the model's stage is applied."""
    cost, work = Cost.of_model(model), Work.of(batches)
    total = cost.of(work)
    share = cost.tile * work.tiles / total if total else 0.0
    saving = share * (1 - 1 / visits) if visits > 1 else 0.0
    numbers = model.config.features_per_tile * model.config.vision_width
    return CacheEstimate(visits, saving, cost.tile, numbers * torch.finfo(dtype).bits // 8)


def open_feature_cache(
    recipe: Recipe,
    model: Llava,
    batches: Sequence[Batch],
    *,
    visits: float,
    out_dir: Path,
    dtype: torch.dtype,
) -> FeatureCache | None:
    """The cache that the run uses, None for none. batches: one step's; visits: how often the run sees each picture.

    Raises RecipeError when a folder is named although the tower learns.
    """
    wanted = recipe.run.feature_cache
    learns = any(parameter.requires_grad for parameter in model.vision_tower.parameters())
    if wanted == "off" or (wanted == "auto" and learns):
        return None
    if learns:
        raise RecipeError(
            f"run.feature_cache: {wanted}: the vision tower learns in this run, so its features change with every "
            "step; set run.feature_cache to off, or tune.vision_tower to frozen"
        )
    if choose_mode(recipe.run.parallel, model) in ("zero2", "zero3"):
        if wanted != "auto":
            _log.warning("run.feature_cache: not used, every process has to run a sharded tower as often as the others")
        return None
    estimate = estimate_cache(model, batches, visits=visits, dtype=dtype)
    if wanted == "auto" and not estimate.pays:
        return None
    folder = out_dir / FOLDER if wanted == "auto" else Path(wanted)
    _log.info(
        "tower features are kept in %s: %.0f %% less work over %.1f epochs, %.1f MB a tile, at most %g GB",
        folder,
        100 * estimate.saving,
        visits,
        estimate.tile_bytes / 1e6,
        recipe.run.feature_cache_gb,
    )
    limit = int(recipe.run.feature_cache_gb * 1e9 / process_count())
    try:
        return FeatureCache(folder, identity=identify_tower(model, dtype=dtype), limit_bytes=limit)
    except OSError as error:
        raise RecipeError(
            f"run.feature_cache: {folder}: {error.strerror}; choose another folder, or set it to off"
        ) from error
