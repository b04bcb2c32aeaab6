"""Files of every kind, damaged at random: they are refused, or some of their records are; nothing else happens."""

import json
import random
import tarfile
from pathlib import Path

import pytest

from llava.data.sources import read_conversations
from llava.errors import DataError
from tests.data.test_shards import TURNS
from tests.data.test_shards import write as write_tar
from tests.data.tiny_processor import record, write_lines, write_pictures

KINDS = {"list.json": "auto", "lines.jsonl": "auto", "a.tar": "webdataset", "a.parquet": "parquet"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_pictures(folder)
    picture = (folder / "good.png").read_bytes()
    (folder / "list.json").write_text(json.dumps([record(), record(None), record("other.png")], indent=1))
    write_lines(folder / "lines.jsonl", record(), record(None), record("other.png"))
    members = [("1.json", {"conversations": TURNS}), ("1.png", picture), ("long/" * 30 + "ä2.txt", "x"), ("3.txt", "y")]
    write_tar(folder / "a.tar", *members, format=tarfile.PAX_FORMAT)
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"image": picture, "conversations": TURNS, "caption": f"ä {number}"} for number in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2, compression="none")
    return folder


def damage(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        place = rng.randrange(len(changed) or 1)
        how = rng.random()
        if how < 0.6 and changed:
            changed[place] = rng.randrange(256)
        elif how < 0.75:
            del changed[place : place + rng.choice([1, 10, 512])]
        elif how < 0.9:
            changed[place:place] = rng.randbytes(rng.choice([1, 8]))
        else:
            del changed[place:]
    return bytes(changed)


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_refused_or_some_of_its_records_are(whole: Path, tmp_path: Path, name: str) -> None:
    data = (whole / name).read_bytes()
    rng = random.Random(name)
    outcomes = {"file refused": 0, "record refused": 0, "read": 0}
    for _ in range(150):
        path = tmp_path / name
        path.write_bytes(damage(data, rng))
        try:
            opened = read_conversations(path, image_root=whole, format=KINDS[name])
        except DataError as error:
            assert str(path) in str(error)
            outcomes["file refused"] += 1
            continue
        for index in range(len(opened)):
            try:
                assert opened[index].messages
                outcomes["read"] += 1
            except DataError as error:
                assert str(path) in str(error)
                outcomes["record refused"] += 1
    assert min(outcomes.values()) > 0, outcomes
