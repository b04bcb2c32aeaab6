"""The token cache: the same batches with and without, whatever happens to its file."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.data.bad_samples import BadSample
from llava.data.encoding import GroupEncoder
from llava.data.sources import ConversationSet, read_conversations
from llava.data.token_cache import TokenCache, open_token_cache
from llava.errors import DataError
from llava.prompt.processor import Encoded, Processor
from tests.data.tiny_processor import build_processor, record, write_lines, write_pictures

LONG = ("Tell me more.", "long " * 60)
RECORDS = [
    record(),
    record(None, ("Hello?", "Hello.")),
    record("other.png", ("Colour?", "Green."), ("Sure?", "Yes.")),
    {**record("good.png", ("<image> Differences?", "Colour.")), "image": ["good.png", "other.png"]},
    record("good.png", ("Colour?", "Red."), LONG),
    record(None, LONG),
    record("broken.png"),
]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return build_processor()


@pytest.fixture
def conversations(tmp_path: Path) -> ConversationSet:
    write_pictures(tmp_path)
    return ConversationSet([read_conversations(write_lines(tmp_path / "mix.jsonl", *RECORDS))])


def open_cache(folder: Path, processor: Processor, **changes: object) -> TokenCache:
    settings = {"max_tokens": 100, "too_long": "truncate", "fingerprint": "abc", **changes}
    return open_token_cache(folder / "cache", processor, **settings)  # type: ignore[arg-type]


def encode_all(
    conversations: ConversationSet, processor: Processor, cache: TokenCache | None
) -> list[Encoded | BadSample]:
    return GroupEncoder(conversations, processor, max_tokens=100, too_long="truncate", cache=cache)(range(len(RECORDS)))


def assert_same(found: list[Encoded | BadSample], expected: list[Encoded | BadSample]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, BadSample) or isinstance(other, BadSample):
            assert one == other
            continue
        for name, value in vars(other).items():
            mine = vars(one)[name]
            if isinstance(value, np.ndarray):
                assert mine.dtype == value.dtype, name
                np.testing.assert_array_equal(mine, value, err_msg=name)
            else:
                assert mine == value, name


def test_the_batches_are_the_same_without_with_and_from_the_cache(
    tmp_path: Path, conversations: ConversationSet, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = encode_all(conversations, processor, None)
    assert len(expected) == len(RECORDS) - 1, "one is left out as too long"
    assert_same(encode_all(conversations, processor, open_cache(tmp_path, processor)), expected)
    cache = open_cache(tmp_path, processor)
    assert len(cache) == len(RECORDS) - 1, "all but the one with a broken picture"
    monkeypatch.setattr(processor, "encode", None)  # nothing is tokenised again
    assert_same(encode_all(conversations, processor, cache), expected)


@pytest.mark.parametrize("damage", ["cut", "flip", "zero", "noise", "missing", "empty"])
def test_a_damaged_file_is_made_anew(
    tmp_path: Path, conversations: ConversationSet, processor: Processor, damage: str
) -> None:
    expected = encode_all(conversations, processor, open_cache(tmp_path, processor))
    (path,) = (tmp_path / "cache").glob("*.tokens")
    whole = path.read_bytes()
    middle = len(whole) // 2
    broken = {
        "cut": whole[:middle],
        "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "zero": bytes(len(whole)),
        "noise": os.urandom(len(whole)),
        "empty": b"",
    }
    path.unlink() if damage == "missing" else path.write_bytes(broken[damage])
    assert_same(encode_all(conversations, processor, open_cache(tmp_path, processor)), expected)
    assert_same(encode_all(conversations, processor, open_cache(tmp_path, processor)), expected)
    assert len(open_cache(tmp_path, processor)) == len(RECORDS) - 1


def test_each_key_has_a_file_of_its_own(tmp_path: Path, processor: Processor) -> None:
    caches = [
        open_cache(tmp_path, processor),
        open_cache(tmp_path, processor, max_tokens=99),
        open_cache(tmp_path, processor, too_long="drop"),
        open_cache(tmp_path, processor, fingerprint="abd"),
        open_cache(tmp_path, processor.with_template("vicuna_v1")),
    ]
    other = build_processor()
    other.tokenizer.add_special_tokens(["<new>"])
    caches.append(open_cache(tmp_path, other))
    other = build_processor()
    other.image_settings = replace(other.image_settings, mode="crop")
    caches.append(open_cache(tmp_path, other))
    caches.append(open_cache(tmp_path, processor.with_template(replace(processor.template, system="Be brief."))))
    assert len({cache.path for cache in caches}) == 8
    assert open_cache(tmp_path, build_processor()).path == caches[0].path


def test_a_picture_of_another_size_is_tokenised_again(
    tmp_path: Path, conversations: ConversationSet, processor: Processor
) -> None:
    encode_all(conversations, processor, open_cache(tmp_path, processor))
    Image.new("RGB", (30, 9)).save(tmp_path / "good.png")
    expected = encode_all(conversations, processor, None)
    assert_same(encode_all(conversations, processor, open_cache(tmp_path, processor)), expected)


def test_the_file_and_the_folder_stay_within_their_limit(
    tmp_path: Path, conversations: ConversationSet, processor: Processor
) -> None:
    cache = TokenCache(tmp_path / "cache", "small", image_token_id=processor.image_token_id, max_bytes=600)
    expected = encode_all(conversations, processor, None)
    assert_same(encode_all(conversations, processor, cache), expected)
    assert 0 < len(cache) < len(RECORDS) - 1
    assert cache.path.stat().st_size <= 600
    for number, key in enumerate(("old", "older")):
        (tmp_path / "cache" / f"{key}.tokens").write_bytes(bytes(500))
        os.utime(tmp_path / "cache" / f"{key}.tokens", (number, number))
    TokenCache(tmp_path / "cache", "small", image_token_id=processor.image_token_id, max_bytes=1100)
    assert sorted(path.stem for path in (tmp_path / "cache").iterdir()) == ["older", "small"]


def test_two_that_write_at_the_same_time_do_each_other_no_harm(
    tmp_path: Path, conversations: ConversationSet, processor: Processor
) -> None:
    expected = encode_all(conversations, processor, None)
    first, second = open_cache(tmp_path, processor), open_cache(tmp_path, processor)
    assert_same(encode_all(conversations, processor, first), expected)
    assert_same(encode_all(conversations, processor, second), expected)
    assert_same(encode_all(conversations, processor, first), expected)
    assert_same(encode_all(conversations, processor, open_cache(tmp_path, processor)), expected)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, processor: Processor) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"data.token_cache: .*choose another folder"):
        open_cache(tmp_path, processor)
