"""WebDataset shards: samples by name, any of them at any time, damage named."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from llava.data.sources import ConversationSet, read_conversations
from llava.errors import DataError
from llava.prompt.conversation import Conversation
from tests.data.tiny_processor import record, write_lines, write_pictures

TURNS = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "Red."}]


def write(path: Path, *members: tuple[str, object], **options: Any) -> Path:
    with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
        for name, value in members:
            data = (
                value
                if isinstance(value, bytes)
                else str(value).encode()
                if name.endswith("txt")
                else json.dumps(value).encode()
            )
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shape(conversation: Conversation) -> list[tuple[str, str, int]]:
    return [(message.role, message.text, len(message.images)) for message in conversation.messages]


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[bytes, bytes]:
    write_pictures(tmp_path)
    return (tmp_path / "good.png").read_bytes(), (tmp_path / "other.png").read_bytes()


def test_a_sample_is_its_json_with_the_pictures_beside_it_or_a_caption(
    tmp_path: Path, pictures: tuple[bytes, bytes]
) -> None:
    good, other = pictures
    path = write(
        tmp_path / "a.tar",
        ("00/0001.json", {"conversations": TURNS}), ("00/0001.png", good),
        ("00/0002.jpg", other), ("00/0002.txt", " A green field.\n"),
        ("00/0003.json", {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]}),
        ("00/0004.png", good), ("00/0004.txt", "Red."), ("00/0004.json", {"width": 20, "url": "https://x.org/a.png"}),
    )  # fmt: skip
    opened = read_conversations(path)
    assert len(opened) == 4
    assert [shape(conversation) for conversation in opened] == [
        [("user", "\nColour?", 1), ("assistant", "Red.", 0)],
        [("user", "", 1), ("assistant", "A green field.", 0)],
        [("user", "Hello?", 0), ("assistant", "Hi.", 0)],
        [("user", "", 1), ("assistant", "Red.", 0)],
    ]
    assert [image.source for image in opened[0].images] == [good]
    assert [image.source for image in opened[1].images] == [other]
    assert opened[2].origin == f"{path}:00/0003"
    assert list(opened.picture_index.sets) == [1, 2, 0, 1], "equal bytes are one picture"


@pytest.mark.parametrize("names", [["a.png", "b.png"], ["x/s.b.png", "x/s.a.png"], None])
def test_several_pictures_come_by_name_or_in_order(
    tmp_path: Path, pictures: tuple[bytes, bytes], names: list[str] | None
) -> None:
    good, other = pictures
    fields: dict[str, Any] = {"conversations": [{**TURNS[0], "value": "<image><image>?"}, TURNS[1]]}
    if names:
        fields["image"] = names
    opened = read_conversations(write(tmp_path / "a.tar", ("s.a.png", good), ("s.b.png", other), ("s.json", fields)))
    swapped = names is not None and names[0].startswith("x/")
    assert [image.source for image in opened[0].images] == ([other, good] if swapped else [good, other])


def test_openai_messages_pairs_and_bare_turns(tmp_path: Path, pictures: tuple[bytes, bytes]) -> None:
    good, other = pictures
    parts = [{"type": "image_url", "image_url": {"url": "m.png"}}, {"type": "text", "text": "?"}]
    loose = [{"type": "image"}, {"type": "text", "text": "?"}]
    answer = {"role": "assistant", "content": "!"}
    path = write(
        tmp_path / "a.tar",
        ("1.json", {"messages": [{"role": "user", "content": parts}, answer]}), ("1.png", good),
        ("2.json", {"messages": [{"role": "user", "content": loose}, answer]}), ("2.png", other),
        ("3.json", {"messages": [{"role": "user", "content": "<image>?"}, answer]}), ("3.png", good),
        ("4.json", {"conversations": [["<image>?", "!"]]}), ("4.png", other),
        ("5.json", [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]), ("5.png", good),
    )  # fmt: skip
    opened = read_conversations(path)
    assert [shape(conversation) for conversation in opened] == [[("user", "?", 1), ("assistant", "!", 0)]] * 5
    assert [conversation.images[0].source for conversation in opened] == [good, other, good, other, good]


def test_pictures_outside_the_shard_are_found_in_the_image_folder_and_never_outside_it(
    tmp_path: Path, pictures: tuple[bytes, bytes]
) -> None:
    (tmp_path / "shards").mkdir()
    fields = {"image": "good.png", "conversations": TURNS}
    parts = [{"type": "image_url", "image_url": {"url": "good.png"}}, {"type": "text", "text": "\nColour?"}]
    chat = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red."}]}
    path = write(
        tmp_path / "shards" / "a.tar", ("1.json", fields), ("2.json", {**fields, "image": "../x.png"}), ("3.json", chat)
    )
    opened = read_conversations(path, image_root=tmp_path)
    assert opened[0].images[0].source == opened[2].images[0].source == tmp_path / "good.png"
    with pytest.raises(DataError, match=r"a.tar:2: picture '../x.png' leaves the image folder"):
        opened[1]
    assert list(opened.unusable()) == [1]


def test_shards_of_a_pattern_are_one_sequence(tmp_path: Path, pictures: tuple[bytes, bytes]) -> None:
    (tmp_path / "s").mkdir()
    for shard in range(3):
        members = [
            member
            for number in range(4)
            for member in ((f"{number}.txt", f"{shard} {number}"), (f"{number}.png", pictures[number % 2]))
        ]
        write(tmp_path / "s" / f"{shard:03}.tar", *members)
    opened = read_conversations(f"{tmp_path}/s/{{000..002}}.tar")
    expected = [f"{shard} {number}" for shard in range(3) for number in range(4)]
    assert [opened[i].messages[1].text for i in reversed(range(12))] == expected[::-1]
    assert opened.image_root == tmp_path / "s"
    assert ConversationSet([opened]).group_by_picture(limit=6) == [(0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 11)]
    assert read_conversations(f"{tmp_path}/s/*.tar").fingerprint == opened.fingerprint
    assert read_conversations(f"{tmp_path}/s/00[01].tar").fingerprint != opened.fingerprint


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_every_tar_format_are_read(tmp_path: Path, pictures: tuple[bytes, bytes], form: int) -> None:
    name = "folder/" * 12 + "s" * 90
    names = [f"{name}1", f"{name}2-ä" if form != tarfile.USTAR_FORMAT else f"{name}2"]
    members = [member for key in names for member in ((f"{key}.png", pictures[0]), (f"{key}.txt", key[-3:]))]
    opened = read_conversations(write(tmp_path / "a.tar", *members, format=form))
    assert [conversation.messages[1].text for conversation in opened] == [key[-3:] for key in names]
    assert opened[1].origin == f"{tmp_path / 'a.tar'}:{names[1]}"


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("1.cls", b"3")], "neither a .json nor a .txt"),
        ([("1.json", b"{oops")], "its .json is not JSON"),
        ([("1.json", b"3")], "its .json must hold an object"),
        ([("1.json", {"width": 3})], "no conversation in it"),
        ([("1.txt", b"\xff")], "its .txt is not UTF-8"),
        (
            [("1.json", {"conversations": TURNS, "image": ["a.png", "b.png"]}), ("1.png", b"x")],
            "names 2 pictures, 1 lie",
        ),
        ([("1.json", {"conversations": TURNS}), ("1.a.png", b"x"), ("1.b.png", b"x")], "2 pictures but 1 <image>"),
    ],
)
def test_a_bad_sample_is_refused_when_it_is_read(tmp_path: Path, members: list[tuple[str, object]], says: str) -> None:
    opened = read_conversations(write(tmp_path / "a.tar", ("0.txt", "fine"), *members), format="webdataset")
    assert len(opened) == 2
    with pytest.raises(DataError, match=rf"a.tar:1: .*{says}"):
        opened[1]


def test_what_archivers_leave_is_no_sample(tmp_path: Path) -> None:
    odd = [("a/._1.png", b"x"), ("README", b"x"), (".index", b"x"), ("__meta__.json", b"{}"), ("a/.txt", "x")]
    opened = read_conversations(write(tmp_path / "a.tar", *odd, ("a/1.txt", "Red."), ("a/._1.txt", "x")))
    assert [conversation.messages[1].text for conversation in opened] == ["Red."]


def test_links_and_devices_in_a_shard_are_not_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("1.png", tarfile.SYMTYPE), ("1.jpg", tarfile.CHRTYPE), ("d", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("1.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
    opened = read_conversations(path)
    assert len(opened) == 1
    assert opened[0].images == ()


def test_damaged_packed_and_empty_shards_are_refused(tmp_path: Path, pictures: tuple[bytes, bytes]) -> None:
    whole = write(tmp_path / "a.tar", ("1.png", pictures[0] * 50), ("1.txt", "Red.")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:2000])
    with pytest.raises(DataError, match=r"cut.tar: not a whole, unpacked tar file"):
        read_conversations(tmp_path / "cut.tar")
    with pytest.raises(DataError, match=r"packed.tar.gz: packed with gzip; unpack it"):
        read_conversations(write(tmp_path / "packed.tar.gz", ("1.txt", "Red."), mode="w:gz"))
    with pytest.raises(DataError, match="no samples in it"):
        read_conversations(write(tmp_path / "empty.tar"), format="webdataset")
    write_lines(tmp_path / "a.jsonl", record(None))
    with pytest.raises(DataError, match=r"a.jsonl: not a whole, unpacked tar file"):
        read_conversations(tmp_path / "a.jsonl", format="webdataset")
    with pytest.raises(DataError, match=r"none.tar: cannot be read"):
        read_conversations(tmp_path / "none.tar", format="webdataset")
