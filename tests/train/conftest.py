"""The tiny model as a fixture."""

from collections.abc import Callable

import pytest

from llava.model.llava import Llava
from tests.train.tiny_training import build_tiny_llava


@pytest.fixture
def tiny_llava() -> Callable[..., Llava]:
    return build_tiny_llava
