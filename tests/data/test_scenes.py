"""The drawn world: scenes are functions of their seed, and say the truth about their pixels."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from llava.data.scene_repainting import repaint, shrink
from llava.data.scenes import COLOURS, REGIONS, SHAPES, SIZES, Scene, draw_masks, draw_scene, outline, render


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random("scenes under test")
    return [draw_scene(rng) for _ in range(200)]


def test_a_scene_and_its_pixels_are_functions_of_the_seed() -> None:
    first, again, other = (draw_scene(random.Random(seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    noisy = next(scene for seed in range(50) if (scene := draw_scene(random.Random(seed))).background.noise > 0)
    assert (render(noisy, noise_seed=1) == render(noisy, noise_seed=1)).all()
    assert (render(noisy, noise_seed=1) != render(noisy, noise_seed=2)).any()


def test_boxes_lie_around_their_pixels(scenes: list[Scene]) -> None:
    side = 256
    for scene in scenes:
        mask = np.asarray(draw_masks(scene, side=side))
        for number, item in enumerate(scene.objects, start=1):
            ys, xs = np.nonzero(mask == number)
            found = (xs.min() / side, ys.min() / side, (xs.max() + 1) / side, (ys.max() + 1) / side)
            assert found == pytest.approx(item.box, abs=1.5 / side), item


def test_objects_never_overlap_and_lie_inside_the_picture(scenes: list[Scene]) -> None:
    for scene in scenes:
        for number, item in enumerate(scene.objects):
            assert all(0 <= x <= 1 and 0 <= y <= 1 for x, y in outline(item)), item
            for other in scene.objects[:number]:
                assert math.hypot(item.x - other.x, item.y - other.y) > item.radius + other.radius


def test_no_two_objects_share_a_name_and_the_top_one_comes_first(scenes: list[Scene]) -> None:
    for scene in scenes:
        names = [item.name for item in scene.objects]
        assert len(set(names)) == len(names)
        tops = [item.box[1] for item in scene.objects]
        assert tops == sorted(tops)


def test_every_shape_colour_size_region_and_number_occurs(scenes: list[Scene]) -> None:
    objects = [item for scene in scenes for item in scene.objects]
    assert {item.shape for item in objects} == set(SHAPES)
    assert {item.colour for item in objects} == set(COLOURS)
    assert {item.size for item in objects} == set(SIZES)
    assert {item.region for item in objects} == set(REGIONS)
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}
    assert {len(draw_scene(random.Random(seed), num_objects=3).objects) for seed in range(5)} == {3}


def test_small_and_large_are_apart(scenes: list[Scene]) -> None:
    radii = {size: [i.radius for s in scenes for i in s.objects if i.size == size] for size in SIZES}
    assert max(radii["small"]) < 0.8 * min(radii["large"])


def test_an_object_shows_its_colour_at_its_centre_and_stands_out_from_the_background(scenes: list[Scene]) -> None:
    for number, scene in enumerate(scenes):
        pixels = render(scene, noise_seed=number).astype(float)
        for item in scene.objects:
            shown = pixels[int(item.y * 64), int(item.x * 64)]
            assert np.abs(shown - item.rgb).max() <= 5 * scene.background.noise + 1, item
            assert math.dist(item.rgb, scene.background.rgb) > 95


def test_a_scene_can_be_painted_at_any_side(scenes: list[Scene]) -> None:
    small, large = render(scenes[0], noise_seed=0), render(scenes[0], noise_seed=0, side=160)
    assert small.shape == (64, 64, 3)
    assert large.shape == (160, 160, 3)
    assert small.dtype == large.dtype == np.uint8


def test_the_second_renderer_paints_the_same_objects_in_the_same_places(scenes: list[Scene]) -> None:
    rng = random.Random(0)
    for scene in scenes[:20]:
        picture = repaint(scene, rng)
        assert picture.width in (224, 336, 640)
        pixels = np.asarray(picture).astype(int)
        background = pixels[0, 0]
        for item in scene.objects:
            shown = pixels[int(item.y * picture.height), int(item.x * picture.width)]
            assert np.abs(shown - background).sum() > 60, item
        assert shrink(picture).shape == (64, 64, 3)
