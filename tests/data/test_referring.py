"""RefCOCO's phrases and boxes become XTuner's conversations."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from llava.data.referring import IDENTIFY, REFER, read_referring, to_hundredths
from llava.errors import DataError, UsageError

TRAIN = [
    {
        "id": "refcoco-unc-000000000001-left_cat",
        "image": "coco/train2017/000000000001.jpg",
        "sents": "left cat",
        "bbox": [40, 30, 170, 160],
        "height": 480,
        "width": 640,
    }
]


def read(path: Path, **options: str) -> list[dict[str, Any]]:
    return [record for _, record in read_referring(path, **options)]


def test_a_phrase_is_written_in_every_wording_of_both_tasks(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(TRAIN))
    records = read(path)
    assert len(records) == 14
    assert {record["id"] for record in records} == {TRAIN[0]["id"]}
    assert {record["image"] for record in records} == {TRAIN[0]["image"]}
    asked = [record["conversations"][0]["value"] for record in records]
    told = [record["conversations"][1]["value"] for record in records]
    assert asked[1] == "[refer] give me the location of left cat\n<image>"
    assert told[:7] == ["{<6><6><32><39>}"] * 7
    assert asked[8] == "[identify] what object is in this location {<6><6><32><39>}\n<image>"
    assert told[7:] == ["left cat"] * 7
    assert asked == [
        *(f"{wording.format('left cat')}\n<image>" for wording in REFER),
        *(f"{wording.format('{<6><6><32><39>}')}\n<image>" for wording in IDENTIFY),
    ]


def test_a_task_and_the_number_of_wordings_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(TRAIN))
    (record,) = read(path, task="identify", wordings="1")
    assert record["conversations"][0]["value"] == "[identify] {<6><6><32><39>}\n<image>"


def test_a_limit_draws_the_same_records_each_time_and_keeps_their_order(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{**TRAIN[0], "id": str(n)} for n in range(20)]))
    some = read(path, task="refer", limit="30")
    assert some == read(path, task="refer", limit="30")
    assert len(some) == 30
    assert [int(record["id"]) for record in some] == sorted(int(record["id"]) for record in some)
    assert some != read(path, task="refer", limit="30", seed="1")
    assert len(read(path, task="refer", limit="70000")) == 140


@pytest.mark.parametrize(
    ("box", "size", "corners"),
    [
        ([40, 30, 170, 160], (640, 480), (6, 6, 32, 39)),
        ([0, 0, 640, 480], (640, 480), (0, 0, 100, 100)),
        ([29, 58, 1, 1], (100, 100), (29, 58, 30, 59)),  # x / width * 100 would give 28 and 57
        ([10.5, 0.4, 700, 500], (640, 480), (1, 0, 100, 100)),
    ],
)
def test_corners_are_hundredths_rounded_down(
    box: list[float], size: tuple[int, int], corners: tuple[int, int, int, int]
) -> None:
    assert to_hundredths(box, width=size[0], height=size[1]) == corners


def test_minigpt4s_evaluation_files_name_the_picture_in_the_id(tmp_path: Path) -> None:
    path = tmp_path / "refcoco_val.json"
    entry = {
        "img_id": "COCO_train2014_000000580957_0",
        "sents": "bowl",
        "bbox": [0, 0, 5, 5],
        "height": 10,
        "width": 10,
    }
    path.write_text(json.dumps([entry]))
    (record,) = read(path, task="refer", wordings="1")
    assert record["image"] == "000000580957.jpg"
    assert record["id"] == "000000580957-bowl"


def test_a_box_without_the_pictures_size_is_in_hundredths_already(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"id": "1", "image": "a.jpg", "sents": "cat", "bbox": [6, 6, 32, 39]}]))
    assert read(path, task="refer")[0]["conversations"][1]["value"] == "{<6><6><32><39>}"


def write_refs(folder: Path, refs: Any = None) -> Path:
    folder.mkdir()
    refs = refs or [
        {"ref_id": 1, "ann_id": 5, "image_id": 9, "split": "train", "sentences": [{"raw": "left cat"}, {"raw": "cat"}]},
        {"ref_id": 2, "ann_id": 6, "image_id": 9, "split": "train", "sentences": [{"raw": "cat"}]},
        {"ref_id": 3, "ann_id": 5, "image_id": 9, "split": "testA", "sentences": [{"raw": "the cat"}]},
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    annotations = [{"id": 5, "bbox": [40, 30, 170, 160]}, {"id": 6, "bbox": [0, 0, 64, 48]}]
    images = [{"id": 9, "height": 480, "width": 640}]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


def test_the_authors_folder_is_read_and_a_phrase_twice_on_a_picture_counts_once(tmp_path: Path) -> None:
    folder = write_refs(tmp_path / "refcoco")
    records = read(folder, task="refer", wordings="1")
    assert [record["id"] for record in records] == ["refcoco-unc-000000000009-left_cat", "refcoco-unc-000000000009-cat"]
    assert {record["image"] for record in records} == {"000000000009.jpg"}
    assert len(read(folder, split="test")) == 14
    with pytest.raises(UsageError, match="has no phrase of it"):
        read(folder, split="val")


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def test_a_pickle_that_names_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"refs\(unc\).p: the pickle names .*mkdir; only plain data is read"):
        read(write_refs(tmp_path / "refcoco", [Evil()]))
    assert not Path("owned").exists()


def test_what_is_no_pickle_is_one_line(tmp_path: Path) -> None:
    folder = write_refs(tmp_path / "refcoco")
    (folder / "refs(unc).p").write_bytes(b"garbage")
    with pytest.raises(DataError, match="not a refs file"):
        read(folder)


@pytest.mark.parametrize(
    ("options", "says"), [({"task": "find"}, "one of refer, identify, both"), ({"wordings": "9"}, "from 1 to 7")]
)
def test_options_are_checked(tmp_path: Path, options: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read(tmp_path, **options)


def test_a_record_without_its_fields_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([*TRAIN, {"sents": "a", "bbox": [1, 2, 3]}]))
    with pytest.raises(DataError, match=r"record 1\): bbox must be four numbers"):
        read(path)
