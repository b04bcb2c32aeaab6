"""Each picture is encoded once a step, and nothing about learning changes by it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava.data.batch import Batch
from llava.data.loader import Layout, lay_out
from llava.data.packing import Tree, number_pictures
from llava.errors import RecipeError
from llava.model.llava import Llava
from llava.train.feature_cache import FeatureCache, identify_tower
from llava.train.feature_choice import estimate_cache, open_feature_cache
from llava.train.picture_features import PictureFeatures
from llava.train.sections import Recipe
from llava.train.step_loss import StepLoss
from tests.train.tiny_training import IMAGE_ID, build_tiny_llava, grow, make_conversation, separately


def make_groups() -> list[list]:  # type: ignore[type-arg]
    """Two pictures with three conversations each, in two groups a picture, one text."""
    rng = np.random.default_rng(0)
    groups = [
        [make_conversation(rng, picture=p, question=n + 1) for n in range(count)] for p, count in ((1, 2), (2, 2))
    ]
    groups += [[make_conversation(rng, picture=p)] for p in (1, 2)]
    return [*groups, [make_conversation(rng, picture=None)]]


def batches_of(trees: list[Tree], *, micro_batch_tokens: int, keyed: bool = False) -> list[Batch]:
    return list(lay_out(trees, Layout(64, 24, micro_batch_tokens, IMAGE_ID, 0, picture_keys=keyed)))


class Tiles:
    """Counts the tiles that the tower sees."""

    def __init__(self, model: Llava) -> None:
        self.count = self.calls = 0
        tower: Any = model.vision_tower
        getattr(tower, "vision_model", tower).embeddings.register_forward_hook(self._note)

    def _note(self, module: object, given: tuple[Tensor, ...], made: object) -> None:
        self.count += len(given[0])
        self.calls += 1


def frozen_model() -> Llava:
    model = build_tiny_llava()
    model.vision_tower.requires_grad_(False)
    return model


def gradients(model: Llava, batches: list[Batch], features: PictureFeatures | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    step_loss = StepLoss(model, dtype=torch.float32)
    if features is not None:
        step_loss.pictures = features
    step_loss.pictures.begin_step(batches)
    torch.stack([step_loss(batch) for batch in batches]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 48, 24])
@pytest.mark.parametrize("shared", [True, False])
def test_a_picture_is_encoded_once_a_step(micro_batch_tokens: int, shared: bool) -> None:
    """In one micro-batch or in many, in a tree with its other conversations or in trees of their own."""
    groups = make_groups()
    batches = batches_of(grow(groups) if shared else separately(groups), micro_batch_tokens=micro_batch_tokens)
    assert (len(batches) > 1) is (micro_batch_tokens < 10_000)
    model = frozen_model()
    tiles = Tiles(model)
    gradients(model, batches)
    assert tiles.count == 2


def test_a_tower_that_learns_encodes_a_picture_once_a_micro_batch() -> None:
    batches = batches_of(separately(make_groups()), micro_batch_tokens=48)
    model = build_tiny_llava()
    tiles = Tiles(model)
    gradients(model, batches)
    assert tiles.count == sum(len(set(batch.picture_numbers)) for batch in batches) > 2


@pytest.mark.parametrize("tower_learns", [True, False])
@pytest.mark.parametrize("micro_batch_tokens", [10_000, 24])
def test_gradients_are_those_of_encoding_every_time(micro_batch_tokens: int, tower_learns: bool) -> None:
    model = build_tiny_llava().double()
    model.vision_tower.requires_grad_(tower_learns)
    groups = make_groups()
    expected: dict[str, Tensor] = {}
    for group in groups:
        for one in group:
            for name, gradient in gradients(model, batches_of(separately([[one]]), micro_batch_tokens=64)).items():
                expected[name] = expected.get(name, 0) + gradient
    made = gradients(model, batches_of(grow(groups), micro_batch_tokens=micro_batch_tokens))
    assert made.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((made[name] - gradient).norm()) <= 1e-6 * float(gradient.norm()) + 1e-10, name


def test_pictures_that_differ_in_one_pixel_are_two() -> None:
    trees = separately(make_groups()[:1])
    trees[1].pixel_values.flags.writeable = True
    other = trees[1].pixel_values.copy()
    other[0, 2, 7, 7] += 1e-3
    changed = [trees[0], Tree(trees[1].prefix_ids, trees[1].branches, other, trees[1].image_sizes, (1,))]
    assert [tree.picture_numbers for tree in number_pictures(trees)] == [(0,), (0,)]
    assert [tree.picture_numbers for tree in number_pictures(changed)] == [(0,), (1,)]


def test_equal_pixels_of_another_original_size_are_another_picture() -> None:
    """Anyres cuts the padding away by the original size."""
    tree = separately(make_groups()[:1])[0]
    other = Tree(tree.prefix_ids, tree.branches, tree.pixel_values, ((4, 8),), tree.tiles_per_image)
    assert [one.picture_numbers for one in number_pictures([tree, other])] == [(0,), (1,)]


def make_cache(model: Llava, folder: Path) -> FeatureCache:
    return FeatureCache(folder, identity=identify_tower(model, dtype=torch.float32), limit_bytes=1 << 24)


def test_with_features_on_disk_the_tower_is_not_called_again_and_gradients_are_the_same_to_the_bit(
    tmp_path: Path,
) -> None:
    model = frozen_model()
    groups = make_groups()
    wide = batches_of(grow(groups), micro_batch_tokens=10_000, keyed=True)
    narrow = batches_of(separately(groups), micro_batch_tokens=24, keyed=True)
    fresh = [
        gradients(model, batches, PictureFeatures(model, cache=make_cache(model, tmp_path / str(n))))
        for n, batches in enumerate((wide, narrow))
    ]
    tiles = Tiles(model)
    cache = make_cache(model, tmp_path / "0")
    for batches, expected in zip((wide, narrow), fresh, strict=True):
        made = gradients(model, batches, PictureFeatures(model, cache=cache))
        for name, gradient in expected.items():
            assert torch.equal(made[name], gradient), name
    assert tiles.count == 0


def make_recipe(**run: object) -> Recipe:
    sections = {"model": {"path": "a"}, "data": {"files": ["b"]}, "optim": {"learning_rate": 1e-3}, "run": run}
    return Recipe.model_validate(sections)


def test_auto_keeps_features_only_where_that_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen_model()
    batches = batches_of(grow(make_groups()), micro_batch_tokens=10_000)
    arguments = {"out_dir": tmp_path, "dtype": torch.float32}
    assert open_feature_cache(make_recipe(), model, batches, visits=3.0, **arguments) is None  # a tiny tower
    monkeypatch.setattr("llava.train.feature_choice._LEAST_TILE_FLOPS", 1.0)
    monkeypatch.setattr("llava.train.feature_choice._LEAST_SAVING", 1e-3)
    assert open_feature_cache(make_recipe(), model, batches, visits=1.0, **arguments) is None  # one epoch
    cache = open_feature_cache(make_recipe(), model, batches, visits=3.0, **arguments)
    assert cache is not None and cache.folder.is_relative_to(tmp_path / "features")
    assert open_feature_cache(make_recipe(feature_cache="off"), model, batches, visits=3.0, **arguments) is None
    saving = [estimate_cache(model, batches, visits=v, dtype=torch.float32).saving for v in (1.0, 2.0, 4.0)]
    assert saving[0] == 0 < saving[1] < saving[2] == pytest.approx(1.5 * saving[1])


def test_a_cache_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = build_tiny_llava()
    model.vision_tower.requires_grad_(False)
    with pytest.raises(RecipeError, match=r"run.feature_cache: .*file: Not a directory; choose another folder"):
        open_feature_cache(
            make_recipe(feature_cache=str(tmp_path / "file")),
            model, [], visits=3.0, out_dir=tmp_path, dtype=torch.float32,
        )  # fmt: skip


def test_a_tower_that_learns_has_no_features_to_keep(tmp_path: Path) -> None:
    model = build_tiny_llava()
    arguments = {"visits": 3.0, "out_dir": tmp_path, "dtype": torch.float32}
    assert open_feature_cache(make_recipe(), model, [], **arguments) is None
    with pytest.raises(RecipeError, match="the vision tower learns"):
        open_feature_cache(make_recipe(feature_cache=str(tmp_path)), model, [], **arguments)
