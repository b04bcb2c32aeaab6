"""Picture names: what they mean, which are the same picture, and that none leads out of the image folder."""

import base64
import os
from pathlib import Path

import pytest

from llava.data.pictures import PictureFolder, PictureIndexBuilder, named_pictures, resolve_image
from llava.errors import DataError
from llava.prompt.fetch import Fetcher

LEAVING = [
    "../secret.png",
    "/etc/passwd",
    "a/../../b.png",
    "..\\b.png",
    "C:\\b.png",
    "a\0b",
    "link.png",
    "out/secret.png",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """root/ with pictures and links in it, and a secret beside it."""
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "one.png").write_bytes(b"1")
    (root / "two.png").write_bytes(b"2")
    (root / "same.png").symlink_to("a/one.png")
    (root / "b").symlink_to("a")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "out").symlink_to(tmp_path)
    (root / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize("name", LEAVING)
def test_no_name_leads_out_of_the_folder(folder: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"mix.json:1: picture .* leaves the image folder"):
        resolve_image(name, folder, origin="mix.json:1")
    assert PictureFolder(folder).identify(name)[1] is False


def test_a_link_inside_the_folder_and_a_linked_root_are_fine(folder: Path, tmp_path: Path) -> None:
    assert resolve_image("same.png", folder, origin="").read_bytes() == b"1"
    (tmp_path / "other").symlink_to(folder)
    assert resolve_image("b/one.png", tmp_path / "other", origin="").read_bytes() == b"1"
    assert PictureFolder(tmp_path / "other").identify("b/one.png")[1]


@pytest.mark.parametrize("name", ["pipe.png", "a", "."])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(folder: Path, name: str) -> None:
    with pytest.raises(DataError, match="is not a regular file"):
        resolve_image(name, folder, origin="mix.json:1")
    assert PictureFolder(folder).identify(name)[1] is False


@pytest.mark.parametrize("name", ["none.png", "none/none.png", "loop.png", "two.png/x.png", "x" * 300, "\ud800.png"])
def test_what_is_not_there_is_known_without_reading(folder: Path, name: str) -> None:
    key, there = PictureFolder(folder).identify(name)
    assert not there
    assert len(key) == 16


def test_one_real_file_is_one_picture_under_any_name_and_root(folder: Path) -> None:
    pictures = PictureFolder(folder)
    same = {pictures.identify(name)[0] for name in ("a/one.png", "same.png", "b/one.png", "a/./one.png", "a//one.png")}
    same.add(PictureFolder(folder / "a").identify("one.png")[0])
    assert len(same) == 1
    assert pictures.identify("two.png")[0] not in same


def test_equal_bytes_in_records_are_one_picture(folder: Path) -> None:
    pictures = PictureFolder(folder)
    encoded = base64.b64encode(b"picture").decode()
    first = pictures.identify(f"data:image/png;base64,{encoded}")
    assert first == pictures.identify(f"DATA:;base64,{encoded}")
    assert first[1]
    assert pictures.identify("data:image/png;base64,!!!")[1] is False


def test_a_web_address_is_refused_unless_it_may_be_fetched(folder: Path) -> None:
    with pytest.raises(DataError, match=r"mix.json:1: picture 'https://x.org/a.png' is a web address.*data.allow_urls"):
        PictureFolder(folder).open("https://x.org/a.png", "mix.json:1")
    assert PictureFolder(folder).identify("https://x.org/a.png")[1] is False
    assert PictureFolder(folder, fetcher=Fetcher()).identify("https://x.org/a.png")[1] is True


def test_every_format_names_its_pictures() -> None:
    parts = [
        {"type": "text", "text": "?"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image", "image": "b.png"},
    ]
    assert named_pictures({"image": "a.png"}) == ["a.png"]
    assert named_pictures({"images": ["a.png", {"path": "b.png"}, {"url": "c.png"}]}) == ["a.png", "b.png", "c.png"]
    assert named_pictures(
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "!"}]}
    ) == [
        "a.png",
        "b.png",
    ]
    for odd in (None, [], "x", {"image": 3}, {"images": 3}, {"messages": "x"}, {"messages": [1, {"content": [2]}]}):
        assert named_pictures(odd) == []


def test_the_index_numbers_sets_of_pictures(folder: Path) -> None:
    builder = PictureIndexBuilder(PictureFolder(folder))
    for names in (["two.png"], [], ["a/one.png", "two.png"], ["same.png", "two.png"], ["none.png"], ["two.png"]):
        builder.add(names)
    index = builder.done()
    assert list(index.sets) == [1, 0, 2, 2, 3, 1]
    assert list(index.first) == [0, 2, 4]
    assert [index.is_missing(number) for number in range(4)] == [False, False, False, True]
    assert len({index.key(1), index.key(2), index.key(3)}) == 3
