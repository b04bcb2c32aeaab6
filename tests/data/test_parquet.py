"""Parquet files: pictures inside and beside them, rows of every shape, read lazily by row group."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava.data.sources import ConversationSet, read_conversations
from llava.errors import DataError, MissingExtraError
from llava.prompt.conversation import Conversation
from tests.data.tiny_processor import record, write_lines, write_pictures

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TURNS = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "Red."}]
CHAT = [{"role": "user", "content": "<image>\nColour?"}, {"role": "assistant", "content": "Red."}]


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def shape(conversation: Conversation) -> list[tuple[str, str, int]]:
    return [(message.role, message.text, len(message.images)) for message in conversation.messages]


@pytest.fixture
def picture(tmp_path: Path) -> bytes:
    write_pictures(tmp_path)
    return (tmp_path / "good.png").read_bytes()


def test_pictures_are_paths_bytes_or_structs(tmp_path: Path, picture: bytes) -> None:
    columns: list[Any] = ["good.png", picture, {"bytes": picture, "path": "x.png"}, {"bytes": None, "path": "good.png"}]
    for number, value in enumerate(columns):
        for column, held in (("image", value), ("images", [value])):
            opened = read_conversations(write(tmp_path / f"{number}.parquet", [{column: held, "conversations": TURNS}]))
            (image,) = opened[0].images
            assert image.source in (tmp_path / "good.png", picture)
            assert shape(opened[0]) == [("user", "\nColour?", 1), ("assistant", "Red.", 0)]
            assert opened[0].origin == f"{tmp_path / f'{number}.parquet'}:0"


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": TURNS},
        {"conversations": json.dumps(TURNS)},
        {"conversations": [["<image>\nColour?", "Red."]]},
        {"messages": CHAT},
        {"messages": json.dumps(CHAT)},
        {"texts": [{"user": "Colour?", "assistant": "Red.", "source": "x"}]},
        {"texts": [{"user": "<image>\nColour?", "assistant": "Red."}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "\nColour?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
            ]
        },
    ],
)
def test_conversations_come_in_every_shape_in_use(tmp_path: Path, picture: bytes, row: dict[str, Any]) -> None:
    opened = read_conversations(write(tmp_path / "a.parquet", [{**row, "images": [{"bytes": picture, "path": None}]}]))
    assert shape(opened[0]) == [("user", "\nColour?", 1), ("assistant", "Red.", 0)]
    assert opened[0].images[0].source == picture


def test_a_caption_becomes_a_question_and_an_answer(tmp_path: Path, picture: bytes) -> None:
    for column in ("caption", "text"):
        opened = read_conversations(write(tmp_path / "a.parquet", [{"image": picture, column: " A red field. "}]))
        assert shape(opened[0]) == [("user", "", 1), ("assistant", "A red field.", 0)]


def test_rows_without_a_picture_are_text_only(tmp_path: Path, picture: bytes) -> None:
    plain = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
    rows = [
        {"images": [picture], "conversations": TURNS},
        {"images": [], "conversations": plain},
        {"images": None, "conversations": plain},
    ]
    opened = read_conversations(write(tmp_path / "a.parquet", rows))
    assert [len(conversation.images) for conversation in opened] == [1, 0, 0]
    assert list(opened.picture_index.sets) == [1, 0, 0]


@pytest.mark.parametrize("rows_in_group", [1, 3, 100])
def test_rows_are_found_across_row_groups_and_files(tmp_path: Path, picture: bytes, rows_in_group: int) -> None:
    for name, count in (("part-0.parquet", 7), ("part-1.parquet", 4)):
        rows = [{"image": picture, "caption": f"{name} {number}"} for number in range(count)]
        write(tmp_path / name, rows, row_group_size=rows_in_group)
    opened = read_conversations(f"{tmp_path}/part-*.parquet")
    expected = [f"part-0.parquet {n}" for n in range(7)] + [f"part-1.parquet {n}" for n in range(4)]
    assert [opened[i].messages[1].text for i in range(11)] == expected
    assert opened[-1].origin == f"{tmp_path / 'part-1.parquet'}:3"
    assert opened.picture_index.first.tolist() == [0], "one picture, by its bytes"


def test_only_a_few_row_groups_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.data.parquet._KEPT_BYTES", 4000)
    rows = [{"image": bytes([number]) * 1000, "caption": str(number)} for number in range(20)]
    opened = read_conversations(write(tmp_path / "a.parquet", rows, row_group_size=1))
    assert [opened[i].messages[1].text for i in (19, 0, 7, 19)] == ["19", "0", "7", "19"]
    assert 1 <= len(opened._groups._kept) <= 4  # type: ignore[attr-defined]


def test_a_bad_row_is_refused_when_it_is_read(tmp_path: Path, picture: bytes) -> None:
    rows = [
        {"image": picture, "conversations": TURNS},
        {"image": None, "conversations": TURNS},
        {"image": picture, "conversations": None},
    ]
    opened = read_conversations(write(tmp_path / "a.parquet", rows))
    assert opened[0].messages
    with pytest.raises(DataError, match=r"a.parquet:1: 0 pictures but 1 <image>"):
        opened[1]
    with pytest.raises(DataError, match=r"a.parquet:2: no conversation in it"):
        opened[2]


def test_a_text_that_is_not_utf_8_costs_its_row_alone(tmp_path: Path, picture: bytes) -> None:
    rows = [{"image": picture, "caption": f"number {number} \u00e4"} for number in range(70)]
    path = write(tmp_path / "a.parquet", rows, compression="none", use_dictionary=False, write_statistics=False)
    whole = path.read_bytes()
    assert whole.count("number 66 \u00e4".encode()) == 1
    path.write_bytes(whole.replace("number 66 \u00e4".encode(), b"number 66 \xff\xff"))
    opened = read_conversations(path)
    assert len(opened) == 70
    assert [opened[i].messages[1].text for i in (65, 67)] == ["number 65 \u00e4", "number 67 \u00e4"]
    with pytest.raises(DataError, match=r"a.parquet:66: a text in it is not UTF-8"):
        opened[66]


def test_files_that_are_no_parquet_or_hold_no_conversation_are_refused(tmp_path: Path, picture: bytes) -> None:
    whole = write(tmp_path / "a.parquet", [{"image": picture, "caption": "x"}]).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut.parquet: cannot be read as parquet"):
        read_conversations(tmp_path / "cut.parquet")
    with pytest.raises(DataError, match=r"b.parquet: no column with conversations .* found image, label"):
        read_conversations(write(tmp_path / "b.parquet", [{"image": picture, "label": 3}]))
    empty = pa.table({"caption": pa.array([], type=pa.string())})
    pq.write_table(empty, tmp_path / "c.parquet")
    with pytest.raises(DataError, match="no records in it"):
        read_conversations(tmp_path / "c.parquet")
    write_lines(tmp_path / "d.jsonl", record(None))
    with pytest.raises(DataError, match=r"d.jsonl: cannot be read as parquet"):
        read_conversations(tmp_path / "d.jsonl", format="parquet")
    with pytest.raises(DataError, match=r"none.parquet"):
        read_conversations(tmp_path / "none.parquet", format="parquet")


def test_pictures_are_one_group_whether_in_a_parquet_or_written_out_in_json(tmp_path: Path, picture: bytes) -> None:
    import base64

    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    lines = write_lines(tmp_path / "a.jsonl", record(url), record("good.png"))
    inside = write(tmp_path / "a.parquet", [{"image": picture, "caption": "x"}])
    beside = write(tmp_path / "b.parquet", [{"image": "good.png", "caption": "x"}])
    three = ConversationSet([read_conversations(path) for path in (lines, inside, beside)])
    assert three.group_by_picture(limit=8) == [(0, 2), (1, 3)]


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", [{"image": picture, "caption": "x"}])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'llava\[parquet\]'"):
        read_conversations(path)
