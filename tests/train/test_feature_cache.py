"""Features on disk: exact, bounded, whole after kills, used only where they are the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.train import feature_cache
from llava.train.feature_cache import FeatureCache, identify_tower
from tests.train.tiny_training import build_tiny_llava

KEY = "ab" * 32


def make_cache(folder: Path, *, limit: int = 1 << 20, identity: str = "one") -> FeatureCache:
    return FeatureCache(folder, identity=identity, limit_bytes=limit)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_come_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    features = torch.randn(2, 4, 16).to(dtype)
    make_cache(tmp_path).put(KEY, features)
    again = make_cache(tmp_path)
    found = again.get(KEY)
    assert found is not None and found.dtype == dtype
    assert torch.equal(found, features)
    assert again.get("cd" * 32) is None
    assert (again.hits, again.misses, again.damaged) == (1, 1, 0)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_entry_is_noticed_and_can_be_written_again(tmp_path: Path, damage: str) -> None:
    features = torch.randn(1, 4, 16)
    cache = make_cache(tmp_path)
    cache.put(KEY, features)
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes({"cut": data[:50], "flip": data, "empty": b"", "other": b"x" * 500}[damage])
    assert cache.get(KEY) is None
    assert cache.damaged == 1
    cache.put(KEY, features)
    assert torch.equal(cache.get(KEY), features)  # type: ignore[arg-type]


def test_an_entry_that_cannot_be_read_is_computed_again(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    cache.put(KEY, torch.randn(1, 4, 16))
    (path,) = files(tmp_path)
    path.unlink()
    path.mkdir()
    assert cache.get(KEY) is None
    cache.put(KEY, torch.randn(1, 4, 16))  # it cannot be kept either, which stops nothing
    assert cache.get(KEY) is None


def test_the_folder_stays_below_its_limit_whoever_wrote_it(tmp_path: Path) -> None:
    features = torch.randn(1, 4, 16)
    for identity in ("one", "two"):
        cache = make_cache(tmp_path, limit=1500, identity=identity)
        for number in range(8):
            cache.put(f"{number:02x}" * 32, features)
    assert 0 < sum(path.stat().st_size for path in files(tmp_path)) <= 1500


def test_a_full_disk_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path)

    def fail(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    cache.put(KEY, torch.randn(1, 4, 16))
    assert cache.get(KEY) is None


def test_space_is_left_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "_SPARE_BYTES", 1 << 60)
    cache = make_cache(tmp_path)
    cache.put(KEY, torch.randn(1, 4, 16))
    assert files(tmp_path) == []


def test_what_another_tower_or_layer_or_format_made_is_not_found(tmp_path: Path) -> None:
    model = build_tiny_llava()
    first = identify_tower(model, dtype=torch.float32)
    assert identify_tower(build_tiny_llava(), dtype=torch.float32) == first
    assert identify_tower(model, dtype=torch.bfloat16) != first
    config = model.config
    for changes in ({"vision_feature_layer": -1}, {"vision_feature_select": "cls_patch"}):
        model.config = config.with_changes(**changes)
        assert identify_tower(model, dtype=torch.float32) != first, changes
    model.config = config
    with torch.no_grad():
        next(model.vision_tower.parameters()).view(-1)[0] += 1e-6
    assert identify_tower(model, dtype=torch.float32) != first
    make_cache(tmp_path, identity="one").put(KEY, torch.ones(1))
    assert make_cache(tmp_path, identity="two").get(KEY) is None


def test_a_process_killed_while_writing_leaves_nothing_half_written(tmp_path: Path) -> None:
    """SIGKILL between the write and the rename; the next one finds no entry and writes it."""
    code = (
        "import os, signal, torch; from pathlib import Path\n"
        "from llava.train.feature_cache import FeatureCache\n"
        f"cache = FeatureCache(Path({str(tmp_path)!r}), identity='one', limit_bytes=1 << 20)\n"
        "Path.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"cache.put({KEY!r}, torch.ones(1, 4, 16))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -9
    cache = make_cache(tmp_path)
    assert cache.get(KEY) is None
    cache.put(KEY, torch.ones(1, 4, 16))
    assert cache.get(KEY) is not None
