"""The tiny model as a fixture."""

from collections.abc import Callable

import pytest
from tiny_training import build_tiny_llava

from llava.model.llava import Llava


@pytest.fixture
def tiny_llava() -> Callable[..., Llava]:
    return build_tiny_llava
