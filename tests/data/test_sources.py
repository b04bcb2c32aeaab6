"""Conversation files: found, indexed, read lazily, refused with their line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llava.data.json_files as json_files
from llava.data.sources import ConversationSet, read_conversations
from llava.errors import DataError


def record(text: str = "Hello?", *, image: str | None = None) -> dict[str, object]:
    mark = "<image>\n" if image else ""
    made: dict[str, object] = {
        "id": "1",
        "conversations": [{"from": "human", "value": mark + text}, {"from": "gpt", "value": "Yes."}],
    }
    return {**made, "image": image} if image else made


def write_list(path: Path, records: list[dict[str, object]], **options: object) -> Path:
    path.write_text(json.dumps(records, **options), encoding="utf-8")  # type: ignore[arg-type]
    return path


def write_lines(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def test_a_list_and_its_lines_hold_the_same_conversations(tmp_path: Path) -> None:
    records = [record("One?"), record("Zwei, bitte: äöü 漢字 🙂", image="a.png"), record("Three\nlines\n?")]
    as_list = read_conversations(write_list(tmp_path / "a.json", records, ensure_ascii=False, indent=1))
    as_lines = read_conversations(write_lines(tmp_path / "a.jsonl", records))
    assert [c.messages for c in as_list] == [c.messages for c in as_lines]
    assert len(as_list) == 3


def test_the_origin_names_file_and_line(tmp_path: Path) -> None:
    lines = read_conversations(write_lines(tmp_path / "a.jsonl", [record(), record()]))
    assert lines[1].origin == f"{tmp_path / 'a.jsonl'}:2"
    indented = read_conversations(write_list(tmp_path / "a.json", [record(), record()], indent=1))
    place = (tmp_path / "a.json").read_text().splitlines().index(" {", 2) + 1
    assert indented[1].origin == f"{tmp_path / 'a.json'}:{place} (record 1)"


def test_pictures_are_found_under_the_image_root_or_beside_the_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [record(image="x/y.png")])
    assert read_conversations(path)[0].images[0].source == tmp_path / "x/y.png"
    assert read_conversations(path, image_root="pics")[0].images[0].source == Path("pics/x/y.png")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../b.png", "..\\b.png", "C:\\b.png", "a\0b"])
def test_a_picture_outside_the_image_root_is_refused(tmp_path: Path, name: str) -> None:
    opened = read_conversations(write_lines(tmp_path / "a.jsonl", [record(image=name)]))
    with pytest.raises(DataError, match=r"a.jsonl:1: picture .* leaves the image folder"):
        opened[0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', 3),
        ('[\n{"a": 1}\n{"a": 2}]', 3),
        ('[{"a": 1},\n', 2),
        ('[{"a": 1}]\n]', 2),
        ("[", 1),
        ('[{"a": "', 1),
    ],
)
def test_a_broken_list_names_its_line(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rf"a.json:{line}: not a JSON list"):
        read_conversations(tmp_path / "a.json")


def test_a_broken_line_among_good_ones_is_a_broken_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record()) + "\n\n{oops\n" + "[" * 100_000 + "\n")
    opened = read_conversations(tmp_path / "a.jsonl")
    assert list(opened.unusable()) == [1, 2]
    assert opened[0].messages
    with pytest.raises(DataError, match=r"a.jsonl:3: not JSON: Expecting property name"):
        opened[1]
    with pytest.raises(DataError, match=r"a.jsonl:4: not JSON: nested too deeply"):
        opened[2]


@pytest.mark.parametrize("lines", [1, 3, 150])
def test_a_file_without_one_good_line_is_refused(tmp_path: Path, lines: int) -> None:
    (tmp_path / "a.jsonl").write_text("hello\n" * lines)
    with pytest.raises(DataError, match=r"a.jsonl:1: not JSON"):
        read_conversations(tmp_path / "a.jsonl")


def test_bytes_that_are_not_utf_8_name_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[\n{"a": "\xff"}]')
    with pytest.raises(DataError, match=r"a.json:2: .*0xff is not UTF-8"):
        read_conversations(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["[]", "", "\n\n", "[ ]"])
def test_a_file_without_records_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="no records in it"):
        read_conversations(tmp_path / "a.json")


def test_a_missing_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.json: cannot be read"):
        read_conversations(tmp_path / "none.json")


def test_a_malformed_record_is_refused_when_it_is_read_and_named(tmp_path: Path) -> None:
    opened = read_conversations(write_lines(tmp_path / "a.jsonl", [record(), {"id": 1}]))
    assert opened[0].messages
    with pytest.raises(DataError, match=r"a.jsonl:2"):
        opened[1]


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=1, max_size=8),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 64),
)
def test_any_window_size_finds_the_same_records(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("list") / "a.json"
    records = [{"text": text, "image": f"{number}.png"} for number, text in enumerate(texts)]
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    whole = json_files._CHUNK_BYTES
    json_files._CHUNK_BYTES = chunk
    try:
        opened = read_conversations(path)
    finally:
        json_files._CHUNK_BYTES = whole
    assert [opened.record(i) for i in range(len(opened))] == records
    assert [opened.picture_names(i) for i in range(len(opened))] == [(f"{i}.png",) for i in range(len(texts))]


def test_a_set_joins_files_and_groups_conversations_on_one_picture(tmp_path: Path) -> None:
    first = read_conversations(
        write_lines(
            tmp_path / "a.jsonl", [record(image="a.png"), record(), record(image="b.png"), record(image="a.png")]
        )
    )
    second = read_conversations(
        write_list(tmp_path / "b.json", [record(image="a.png"), record(), record(image="a.png")])
    )
    both = ConversationSet([first, second])
    assert len(both) == 7
    assert both[4].origin.startswith(str(tmp_path / "b.json"))
    assert both.group_by_picture(limit=3) == [(0, 3, 4), (1,), (2,), (5,), (6,)]
    assert both.group_by_picture(limit=1) == [(i,) for i in (0, 1, 2, 3, 4, 5, 6)]


def test_the_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    first = ConversationSet([read_conversations(write_lines(tmp_path / "a.jsonl", [record("A?")]))]).fingerprint
    again = ConversationSet([read_conversations(write_lines(tmp_path / "b.jsonl", [record("A?")]))]).fingerprint
    other = ConversationSet([read_conversations(write_lines(tmp_path / "c.jsonl", [record("B?")]))]).fingerprint
    assert first == again != other


def test_a_record_costs_a_few_dozen_bytes_of_memory_however_long_it_is(tmp_path: Path) -> None:
    import tracemalloc

    count = 4000
    path = write_lines(tmp_path / "a.jsonl", [record("why " * 300, image=f"{n}.png") for n in range(count)])
    read_conversations(path)  # what is imported and remembered on first use is no cost of a record
    tracemalloc.start()
    opened = read_conversations(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(opened) == count
    assert held / count < 64
