"""Rows of questions on a scene that stands in the context as text or as a grid."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llava.data.scene_turns import Turn
from llava.data.scenes import SHAPES, draw_scene
from llava.quickstart.scene_text import FORMATS, GRID, NUM_GRID_FEATURES, RowWriter, write_grid, write_scene
from llava.quickstart.tokenizer_building import build_tokenizer

WRITER = RowWriter(build_tokenizer())


@pytest.mark.parametrize("form", FORMATS)
def test_labels_are_the_answers_and_positions_go_on_from_the_context_in_every_turn(form: str) -> None:
    rng = random.Random(form)
    for _ in range(20):
        row = WRITER.write_row(draw_scene(rng, num_objects=3), form, rng, max_tokens=288)
        assert 200 < len(row.input_ids) <= 288
        context = int((row.branch_ids == 0).sum())
        assert (row.position_ids[:context] == np.arange(context)).all()
        assert (row.labels[:context] == -100).all()
        assert int(row.branch_ids.max()) == len(row.kinds)
        for branch in range(1, len(row.kinds) + 1):
            places = row.branch_ids == branch
            assert (row.position_ids[places] == context + np.arange(places.sum())).all()
            labels = row.labels[places]
            assert labels[-1] == WRITER.eos
            assert labels[0] == -100
        marked = row.labels != -100
        assert (row.labels[marked] == row.input_ids[marked]).all()


def test_a_row_reads_as_the_template_has_it() -> None:
    scene = draw_scene(random.Random(0), num_objects=1)
    name = scene.objects[0].name
    row = WRITER.write_turns(scene, "names", [Turn("count_all", "How many?", "1")], random.Random(0))
    text = WRITER.tokenizer.decode(row.input_ids.tolist(), skip_special_tokens=False)
    assert text == f"<s> USER: {name}. \nHow many? ASSISTANT: 1</s>"


def test_forms_tell_what_they_promise() -> None:
    scene = draw_scene(random.Random(1), num_objects=2)
    item = scene.objects[0]
    box = "[" + ", ".join(f"{value:.2f}" for value in item.box) + "]"
    assert write_scene(scene, "names").startswith(f"{item.name}. ")
    assert write_scene(scene, "places").startswith(f"{item.size} {item.name} {item.region}. ")
    assert write_scene(scene, "boxes").startswith(f"{item.size} {item.name} {item.region} {box}. ")
    assert write_scene(scene, "bare_boxes").startswith(f"{item.name} {box}. ")


def test_the_grid_names_an_object_where_it_lies_and_nothing_elsewhere() -> None:
    rng = random.Random(2)
    for _ in range(20):
        scene = draw_scene(rng)
        grid = write_grid(scene)
        assert grid.shape == (GRID * GRID, NUM_GRID_FEATURES)
        for item in scene.objects:
            place = grid[int(item.y * GRID) * GRID + int(item.x * GRID)]
            assert place[1 : 1 + len(SHAPES)].argmax() == SHAPES.index(item.shape)
        covered = sum(3.2 * item.radius**2 for item in scene.objects)
        assert (grid[:, 0] == 0).mean() > 1 - 2.5 * covered - 0.2
