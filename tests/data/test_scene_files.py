"""Drawn scenes on disk are an ordinary LLaVA data set, the same however they were written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from llava.data.scene_files import SceneFiles, draw_numbered_scene, picture_name, write_records, write_scenes
from llava.data.scenes import render


def test_the_files_are_a_function_of_the_seed_and_not_of_the_processes(tmp_path: Path) -> None:
    one = write_scenes(tmp_path / "one", 510, 7, processes=1)
    two = write_scenes(tmp_path / "two", 510, 7, processes=2)
    other = write_scenes(tmp_path / "other", 3, 8, processes=1)
    assert _content(one) == _content(two)
    assert one.conversations.read_text()[:300] != other.conversations.read_text()[:300]


def test_every_record_names_a_picture_that_shows_its_scene(tmp_path: Path) -> None:
    files = write_scenes(tmp_path, 4, 0, processes=1)
    records = json.loads(files.conversations.read_text())
    assert {record["image"] for record in records} == {picture_name(number) for number in range(4)}
    for number in range(4):
        scene = draw_numbered_scene(0, number)
        with Image.open(files.image_root / picture_name(number)) as picture:
            assert picture.size == (64, 64)
            assert (np.asarray(picture) == render(scene, noise_seed=number)).all()
        assert [r for r in records if r["image"] == picture_name(number)] == write_records(scene, number, 0)[0]


def test_a_record_is_a_question_on_the_picture_and_its_answer(tmp_path: Path) -> None:
    files = write_scenes(tmp_path, 30, 1, processes=1)
    records = json.loads(files.conversations.read_text())
    assert len({record["id"] for record in records}) == len(records) > 30 * 9
    lengths = {len(record["conversations"]) for record in records}
    assert lengths == {2, 4}
    for record in records:
        said = record["conversations"]
        assert [turn["from"] for turn in said] == ["human", "gpt"] * (len(said) // 2)
        assert said[0]["value"].startswith("<image>\n")
        assert all("<image>" not in turn["value"] for turn in said[1:])
    captions = json.loads(files.captions.read_text())
    assert len(captions) == 60
    assert all(len(record["conversations"]) == 2 for record in captions)


def test_a_data_set_that_is_whole_is_not_drawn_again_and_another_seed_is(tmp_path: Path) -> None:
    files = write_scenes(tmp_path, 2, 0, processes=1)
    (files.image_root / picture_name(0)).unlink()
    calls: list[tuple[int, int]] = []
    write_scenes(tmp_path, 2, 0, processes=1, progress=lambda done, total: calls.append((done, total)))
    assert not (files.image_root / picture_name(0)).exists()
    assert calls == [(2, 2)]
    write_scenes(tmp_path, 2, 5, processes=1)
    assert (files.image_root / picture_name(0)).exists()


def _content(files: SceneFiles) -> list[bytes]:
    pictures = sorted(files.image_root.rglob("*.png"))
    assert len(pictures) == files.num_scenes
    return [path.read_bytes() for path in (files.conversations, files.captions, *pictures)]
