"""The features of a batch's pictures, each encoded once a step.

A frozen tower gives the same features whichever micro-batch a picture stands in, so those of a picture that stands in
several are kept until its last one; with a cache on disk (train/feature_cache.py), for later epochs too. A tower that
learns encodes a picture once in each micro-batch: the activations of another one's are gone when it comes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from llava.data.batch import Batch
from llava.model.llava import Llava
from llava.train.feature_cache import FeatureCache


class PictureFeatures:
    """Encodes the pictures of batches. cache: of a frozen tower's features; None for none."""

    def __init__(self, model: Llava, *, cache: FeatureCache | None = None) -> None:
        self.cache = cache
        self._model = model
        self._uses: Counter[int] = Counter()
        self._kept: dict[int, Tensor] = {}

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Look at all batches of a step, to know which pictures stand in several."""
        self._kept.clear()
        self._uses = Counter(number for batch in batches for number in batch.picture_numbers)

    def of(self, batch: Batch) -> list[Tensor]:
        """The projected features of each picture in reading order, one (F_i, D) tensor each."""
        assert batch.pixel_values is not None
        pixels, counts = batch.pixel_values, batch.tiles_per_image
        shared = [self._uses[number] > 1 or number in self._kept for number in batch.picture_numbers]
        if not self._is_frozen() or (self.cache is None and not any(shared)):
            distinct = self._model.encode_images(pixels, image_sizes=batch.image_sizes, tiles_per_image=counts)
        else:
            features = self._tower_features(batch, torch.split(pixels, list(counts)))
            distinct = self._model.encode_images(
                image_sizes=batch.image_sizes, tiles_per_image=counts, tower_features=torch.cat(features)
            )
        for number in batch.picture_numbers:
            self._uses[number] -= 1
            if self._uses[number] <= 0:
                self._kept.pop(number, None)
        return [distinct[place] for place in batch.picture_of]

    def _tower_features(self, batch: Batch, pictures: Sequence[Tensor]) -> list[Tensor]:
        """What the tower gives for each distinct picture, (n, P, Dv): kept, from disk, or encoded now."""
        found = [self._known(batch, place) for place in range(len(pictures))]
        missing = [place for place, features in enumerate(found) if features is None]
        if self.cache is None and missing:
            made = self._model.encode_tower(torch.cat([pictures[place] for place in missing]))
            parts = torch.split(made, [len(pictures[place]) for place in missing])
            for place, features in zip(missing, parts, strict=True):
                found[place] = features
        elif self.cache is not None:
            for place in missing:
                # One picture at a time: matrix products round by the size of the batch, and what is on disk must be
                # what would be computed now, in whatever company.
                features = self._model.encode_tower(pictures[place])
                self.cache.put(batch.picture_keys[place], features)
                found[place] = features
        whole = [features for features in found if features is not None]
        for number, features in zip(batch.picture_numbers, whole, strict=True):
            if self._uses[number] > 1:
                self._kept[number] = features
        return whole

    def _known(self, batch: Batch, place: int) -> Tensor | None:
        kept = self._kept.get(batch.picture_numbers[place])
        if kept is not None or self.cache is None:
            return kept
        features = self.cache.get(batch.picture_keys[place])
        return None if features is None else features.to(self._model.device, non_blocking=True)

    def _is_frozen(self) -> bool:
        """Whether nothing of the tower learns; with a sharded tower every process has to run it as often as others."""
        parameters = list(self._model.vision_tower.parameters())
        return not any(parameter.requires_grad or hasattr(parameter, "to_local") for parameter in parameters)
