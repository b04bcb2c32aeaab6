"""COCO captions, CSV tables and folders of pictures become conversations."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.data.caption_readers import CAPTION_PROMPT, read_coco_captions, read_csv, read_picture_folder
from llava.data.source_readers import detect_reader
from llava.errors import DataError, LlavaError, UsageError


def turns(record: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in record["conversations"]]


def write_coco(folder: Path) -> Path:
    images = [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 8, "file_name": "8.jpg"}]
    captions = [(1, 7, "A cat. "), (2, 8, "A dog."), (3, 7, "The same cat.")]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, image, text in captions]
    path = folder / "captions_val.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_each_coco_caption_is_a_record_with_its_picture(tmp_path: Path) -> None:
    records = [record for _, record in read_coco_captions(write_coco(tmp_path))]
    assert [(record["id"], record["image"]) for record in records] == [
        ("1", "000000000007.jpg"),
        ("2", "8.jpg"),
        ("3", "000000000007.jpg"),
    ]
    assert turns(records[0]) == [f"<image>\n{CAPTION_PROMPT}", "A cat."]


def test_one_caption_a_picture_can_be_asked_for(tmp_path: Path) -> None:
    records = [record for _, record in read_coco_captions(write_coco(tmp_path), captions="first", prompt="What?")]
    assert [turns(record) for record in records] == [["<image>\nWhat?", "A cat."], ["<image>\nWhat?", "A dog."]]


def test_a_file_of_boxes_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}))
    with pytest.raises(DataError, match="no caption; is this a file of boxes"):
        list(read_coco_captions(path))


def test_columns_with_usual_names_are_found(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('file_name,caption,id\na.jpg,"A, quoted\nand long",x1\n,Text only.,x2\n')
    found = list(read_csv(path))
    assert [origin for origin, _ in found] == [f"{path}:2", f"{path}:4"]
    (first, second) = (record for _, record in found)
    assert (first["id"], first["image"]) == ("x1", "a.jpg")
    assert turns(first) == ["<image>\nDescribe the picture.", "A, quoted\nand long"]
    assert "image" not in second
    assert turns(second) == ["Describe the picture.", "Text only."]


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("\ufeffwhere\tq\ta\tanswer\nx.png\tHow many?\t2\tno\n", encoding="utf-8")
    ((_, record),) = read_csv(path, image="where", question="q", answer="a")
    assert record["image"] == "x.png"
    assert turns(record) == ["<image>\nHow many?", "2"]


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("image,words\na,b\n", {}, "t.csv:1: which column is the answer.*found image, words"),
        ("image,answer\na,b\n", {"answer": "label"}, "t.csv:1: no column 'label'; found image, answer"),
        ("image,answer\na,b\nc\n", {}, "t.csv:3: 1 cells in a table of 2 columns"),
        ('image,answer\na,"b\n', {}, "not CSV"),
        ("", {}, "empty; the first row must name the columns"),
        ("image,answer\na,b\n", {"colour": "x"}, "colour: options are image, question, answer, id"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path: Path, text: str, options: dict[str, str], says: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(LlavaError, match=says):
        list(read_csv(path, **options))


def write_folder(folder: Path) -> Path:
    for name in ("b.jpg", "a.png", "cats/c.JPG"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file, format="PNG")
        file.with_suffix(".txt").write_text(f"About {file.stem}.\n")
    (folder / "notes.md").write_text("not a picture")
    return folder


def test_a_folder_of_pictures_with_texts_beside_them(tmp_path: Path) -> None:
    records = [record for _, record in read_picture_folder(write_folder(tmp_path / "in"), prompt="What?")]
    assert [record["image"] for record in records] == ["a.png", "b.jpg", "cats/c.JPG"]
    assert turns(records[2]) == ["<image>\nWhat?", "About c."]


def test_a_picture_without_a_text_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    (folder / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b.jpg: no b.txt beside it; write one, or give answer=folder"):
        list(read_picture_folder(folder))


def test_folders_names_can_be_the_answers(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "tabby_cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "tabby_cat" / "1.png")
    ((_, record),) = read_picture_folder(folder, answer="folder")
    assert turns(record)[1] == "tabby cat"
    with pytest.raises(UsageError, match="answer=name"):
        list(read_picture_folder(folder, answer="name"))


def test_readers_are_known_by_what_lies_there(tmp_path: Path) -> None:
    assert detect_reader(Path(__file__).parent.parent / "golden" / "scienceqa") == "scienceqa"
    assert detect_reader(write_folder(tmp_path / "in")) == "folder"
    assert detect_reader(tmp_path / "t.csv") == "csv"
    assert detect_reader(tmp_path / "mix.json") is None
