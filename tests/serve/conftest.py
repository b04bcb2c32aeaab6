from __future__ import annotations

from collections.abc import Iterator

import pytest

from llava.checkpoint.load import Loaded
from tests.serve.servers import Listener, Running, load_tiny, running


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_tiny(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(tiny: Loaded) -> Iterator[Running]:
    with running(tiny) as found:
        yield found


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    yield found
    found.close()
