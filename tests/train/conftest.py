"""The tiny model as a fixture."""

from collections.abc import Callable, Iterator

import pytest

from llava.model.llava import Llava
from tests.train.process_pair import ProcessPair
from tests.train.tiny_training import build_tiny_llava


@pytest.fixture
def tiny_llava() -> Callable[..., Llava]:
    return build_tiny_llava


@pytest.fixture(scope="package")
def pair() -> Iterator[ProcessPair]:
    """Two processes that talk through gloo, for all tests of this folder."""
    with ProcessPair() as made:
        yield made
