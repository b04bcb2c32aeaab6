from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest

from tests.cli.tiny_model import write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    PIL.Image.new("RGB", (60, 40), "red").save(path)
    return path
