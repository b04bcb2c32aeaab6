"""`data convert`: what goes in comes back, what cannot be held is refused by name, and files are whole or absent."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from llava.data.conversion import TARGETS, convert, read_items
from llava.data.record_files import ParquetWriter, ShardWriter
from llava.data.record_writing import RECORD_WRITERS, Item, joined_parts
from llava.data.sources import read_conversations
from llava.errors import DataError, LlavaError, UsageError
from llava.prompt.conversation import Conversation, Image, Message, Text

# Words with what formats trip over: marks, their halves, quotes, line ends, other scripts, empty.
WORDS = st.one_of(
    st.sampled_from(["", " ", "<image>", "<ima", "ge>", 'say "x"\n', "\u2028", "日本", "\r\n", "a,b", "data:x", "\\n"]),
    st.text(st.characters(codec="utf-8"), max_size=12),
)
NAMES = st.sampled_from(
    ["a.jpg", "b/c.png", "b//c.png", "./a.jpg", "ä ö.jpg", "https://example.org/x.jpg?y=1", "c\\d.png"]
)
PIXEL = b"\x89PNG\r\n\x1a\nx"
BYTES = st.sampled_from([b"\x89PNG\r\n\x1a\nx", b"\xff\xd8\xffy", b"GIF89a", b"anything"])
PARTS = st.one_of(WORDS.map(Text), NAMES.map(lambda name: Image(Path("name", name))), BYTES.map(Image))


@st.composite
def items(draw: st.DrawFn) -> Item:
    """Conversations that an OpenAI file can hold: any roles, parts, losses; a system turn first if at all."""
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5))
    if draw(st.booleans()):  # mostly what all formats can hold
        roles = ["user", "assistant"] * draw(st.integers(1, 3))
    if draw(st.integers(0, 3)) == 0:
        roles = ["system", *roles]
    names: dict[Path, str] = {}
    messages = []
    for role in roles:
        parts: list[Any] = []
        for part in draw(st.lists(PARTS, max_size=4)):
            if isinstance(part, Image) and isinstance(part.source, Path):
                path = Path(str(len(names)))
                names[path] = "/".join(part.source.parts[1:]) if draw(st.booleans()) else draw(NAMES)
                part = Image(path)
            parts.append(part)
        supervised = role != "assistant" or draw(st.integers(0, 5)) > 0
        messages.append(Message(role, tuple(parts), supervised=supervised))  # type: ignore[arg-type]
    identity = draw(st.one_of(st.none(), st.text(max_size=5), st.integers(0, 9)))
    extras = draw(st.dictionaries(st.sampled_from(["height", "category"]), st.integers() | st.text(max_size=3)))
    return Item(Conversation(tuple(messages), "here"), names, identity, extras)


def meaning(item: Item) -> Any:
    """What must survive: roles, words, the pictures' names or bytes in their places, what is learnt, id, other keys."""
    turns = []
    for message in item.conversation.messages:
        parts = [
            part.text
            if isinstance(part, Text)
            else (part.source if isinstance(part.source, bytes) else [item.name(part)])
            for part in joined_parts(message)
        ]
        turns.append((message.role, parts, message.supervised))
    return turns, item.id, dict(item.extras)


def written(item: Item, to: str, folder: Path) -> Path | None:
    """The item as a file of one record; None when the format refuses it."""
    path = folder / f"{to}.json"
    try:
        record = RECORD_WRITERS[to](item)
    except DataError as error:
        assert "cannot be written as" in str(error)
        assert "convert with --to" in str(error)
        return None
    path.write_text(json.dumps([record]))
    return path


@settings(max_examples=150, deadline=None)
@given(item=items(), to=st.sampled_from(sorted(RECORD_WRITERS)), name_it=st.booleans())
def test_what_a_format_takes_it_gives_back(item: Item, to: str, name_it: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(item, to, Path(folder))
        if path is None:
            assert to != "openai", "OpenAI messages hold everything"
            return
        (back,) = read_items(path, read_as=to if name_it else "auto")
        assert meaning(back) == meaning(item)


@settings(max_examples=100, deadline=None)
@given(item=items(), way=st.lists(st.sampled_from(sorted(RECORD_WRITERS)), min_size=2, max_size=4))
def test_a_way_through_several_formats_ends_where_it_began(item: Item, way: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        here = item
        for to in way:
            path = written(here, to, Path(folder))
            if path is None:
                return
            (here,) = read_items(path)
        assert meaning(here) == meaning(item)


def records(folder: Path) -> Path:
    for name, colour in (("a.png", "red"), ("b.jpg", "blue")):
        PilImage.new("RGB", (20, 10), colour).save(folder / name)
    talk = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "Red."}]
    both = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "The <first>."}]
    path = folder / "mix.json"
    plain = {"id": "3", "conversations": [{"from": "human", "value": "Name a prime."}, {"from": "gpt", "value": "7"}]}
    path.write_text(
        json.dumps(
            [
                {"id": "1", "image": "a.png", "conversations": talk},
                {"id": "2", "image": ["b.jpg", "a.png"], "conversations": both},
                plain,
            ]
        )
    )
    return path


def test_llava_to_llava_is_the_same_file(tmp_path: Path) -> None:
    source = records(tmp_path)
    assert convert(source, tmp_path / "out.jsonl").records == 3
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(source.read_text())


@pytest.mark.parametrize("to", ["parquet", "webdataset"])
def test_files_with_pictures_inside_give_back_words_and_bytes(tmp_path: Path, to: str) -> None:
    if to == "parquet":
        pytest.importorskip("pyarrow")
    source = records(tmp_path)
    packed = tmp_path / "packed" / ("one.parquet" if to == "parquet" else "one.tar")
    convert(source, packed, to=to)
    before, after = read_conversations(source), read_conversations(packed)
    assert len(after) == len(before)
    for one, other in zip(before, after, strict=True):
        assert [(m.role, m.text) for m in other.messages] == [(m.role, m.text) for m in one.messages]
        files = [image.source for image in one.images]
        assert [image.source for image in other.images] == [f.read_bytes() for f in files if isinstance(f, Path)]


@pytest.mark.parametrize("to", ["parquet", "webdataset"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(some=st.lists(items(), min_size=1, max_size=4))
def test_what_is_packed_with_its_pictures_comes_back(to: str, some: list[Item]) -> None:
    if to == "parquet":
        pytest.importorskip("pyarrow")
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / ("one.parquet" if to == "parquet" else "one.tar")
        writer = (ParquetWriter if to == "parquet" else ShardWriter)(packed, read_picture=lambda item, image: PIXEL)
        some = [with_pixels(item, extras=to != "parquet") for item in some]
        with writer:
            for item in some:
                writer.write(item)
        back = list(read_items(packed))
        assert [meaning(item)[0] for item in back] == [meaning(item)[0] for item in some]
        if to == "webdataset":
            assert [meaning(item)[1:] for item in back] == [meaning(item)[1:] for item in some]
        else:
            assert [item.id for item in back] == [None if item.id is None else str(item.id) for item in some]


def with_pixels(item: Item, *, extras: bool) -> Item:
    """The same with one picture, in bytes, wherever it has any."""
    messages = tuple(
        Message(
            message.role,
            tuple(Image(PIXEL) if isinstance(part, Image) else part for part in message.parts),
            supervised=message.supervised,
        )
        for message in item.conversation.messages
    )
    return Item(Conversation(messages, "here"), {}, item.id, item.extras if extras else {})


def test_pictures_that_lie_in_records_are_extracted_once_and_named(tmp_path: Path) -> None:
    convert(records(tmp_path), tmp_path / "one.tar", to="webdataset")
    done = convert(tmp_path / "one.tar", tmp_path / "back.json", extract=tmp_path / "pictures")
    assert (done.records, done.pictures_extracted) == (3, 2)
    back = json.loads((tmp_path / "back.json").read_text())
    assert (tmp_path / "pictures" / back[0]["image"]).read_bytes() == (tmp_path / "a.png").read_bytes()
    assert back[1]["image"][1] == back[0]["image"]
    assert [turn["value"] for turn in back[1]["conversations"]] == ["<image> or <image>?", "The <first>."]


def test_many_samples_become_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.data.record_files._SAMPLES_A_SHARD", 2)
    convert(records(tmp_path), tmp_path / "shards", to="webdataset")
    assert sorted(file.name for file in (tmp_path / "shards").iterdir()) == ["000000.tar", "000001.tar"]
    assert len(read_conversations(str(tmp_path / "shards" / "{000000..000001}.tar"))) == 3
    assert convert(tmp_path / "shards", tmp_path / "back.json").records == 3, "a folder of shards is read as one"


REFUSED: list[tuple[list[dict[str, Any]], str, str]] = [
    ([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "llava", "a system turn"),
    ([{"role": "system", "content": ""}, {"role": "user", "content": "a"}], "sharegpt", "an empty system turn"),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "llava", "two turns of one speaker"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}], "llava", "loss: false"),
    ([{"role": "user", "content": "an <image>"}], "sharegpt", "the word <image>"),
    ([{"role": "user", "content": "a"}], "pairs", "a turn without its question or answer"),
    ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], "pairs", "a turn without"),
]


@pytest.mark.parametrize(("messages", "to", "what"), REFUSED, ids=[f"{to}-{what}" for _, to, what in REFUSED])
def test_what_cannot_be_held_is_refused_by_name_and_nothing_is_left(
    tmp_path: Path, messages: list[dict[str, Any]], to: str, what: str
) -> None:
    source = tmp_path / "in.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    source.write_text(json.dumps(good) + "\n" + json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match=rf"in.jsonl:2: .*{what}.* cannot be written as .*convert with --to"):
        convert(source, tmp_path / "out.json", to=to)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
    done = convert(source, tmp_path / "out.json", to=to, skip_bad=True)
    assert done.records == 1
    assert len(done.skipped) == 1


def test_a_file_that_is_there_is_kept_unless_forced(tmp_path: Path) -> None:
    source = records(tmp_path)
    target = tmp_path / "out.json"
    target.write_text("mine")
    with pytest.raises(UsageError, match=r"exists already; give --force"):
        convert(source, target)
    source.with_name("bad.jsonl").write_text(json.dumps({"conversations": []}))
    with pytest.raises(DataError):
        convert(tmp_path / "bad.jsonl", target, force=True)
    assert target.read_text() == "mine", "a conversion that fails leaves what was there"
    convert(source, target, force=True)
    assert len(json.loads(target.read_text())) == 3


def test_a_prefix_goes_before_every_path_but_not_before_addresses(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    talk = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "a"}]
    source.write_text(json.dumps({"image": ["a.jpg", "https://example.org/b.jpg"], "conversations": talk}))
    convert(source, tmp_path / "out.json", prefix="coco/train2017/")
    (record,) = json.loads((tmp_path / "out.json").read_text())
    assert record["image"] == ["coco/train2017/a.jpg", "https://example.org/b.jpg"]


def test_pictures_stay_inside_their_folder(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
    source.write_text(json.dumps({"image": "../../etc/passwd", "conversations": talk}))
    with pytest.raises(DataError, match="leaves the image folder"):
        convert(source, tmp_path / "out.tar", to="webdataset")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("target", "how", "says"),
    [
        ("out.json", {"to": "lava"}, "did you mean 'llava'"),
        ("out.txt", {}, r"name a .json or .jsonl file"),
        ("out.json", {"read_as": "sharegbt"}, "did you mean 'sharegpt'"),
        ("out.json", {"options": {"split": "test"}}, "take options"),
        ("out.json", {"read_as": "scienceqa", "options": {"spilt": "test"}}, "no such option; it has split, prompt"),
    ],
)
def test_what_does_not_go_together_is_one_line(tmp_path: Path, target: str, how: dict[str, Any], says: str) -> None:
    with pytest.raises(LlavaError, match=says):
        convert(records(tmp_path), tmp_path / target, **how)


def test_every_target_is_tested() -> None:
    assert set(TARGETS) == set(RECORD_WRITERS) | {"parquet", "webdataset"}
