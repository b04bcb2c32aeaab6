"""From a conversation to arrays: token ids with the placeholders already expanded, labels, pictures.

`Processor` is the one way in for training, chat, server and evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.prompt.conversation import Conversation

IGNORE_LABEL = -100


def _no_pixels() -> NDArray[np.float32]:
    return np.zeros((0, 3, 0, 0), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Encoded:
    """One conversation as arrays. T tokens, N tiles in all.

    input_ids: (T,) int64; every picture stands as its `image_token_id` once per feature row the model makes of it.
    labels: (T,) int64; the token itself inside supervised answers, IGNORE_LABEL elsewhere (not shifted).
    pixel_values: (N, 3, H, W) float32, all tiles of all pictures in reading order.
    image_sizes: original (height, width), one per picture. tiles_per_image: one per picture; sums to N.
    tokens_per_image: placeholders of each picture; sums to the number of placeholders.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    pixel_values: NDArray[np.float32] = field(default_factory=_no_pixels)
    image_sizes: tuple[tuple[int, int], ...] = ()
    tiles_per_image: tuple[int, ...] = ()
    tokens_per_image: tuple[int, ...] = ()

    @property
    def num_answer_tokens(self) -> int:
        return int((self.labels != IGNORE_LABEL).sum())


class Processor:
    """Encodes conversations for one model; what it does is decided by the model's folder alone."""

    tokenizer: Any
    template: Any
    image_settings: Any
    image_token_id: int
    patches_per_tile: int
    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]

    def encode(self, conversation: Conversation, *, open_turn: bool = False, max_length: int | None = None) -> Encoded:
        """Encode a conversation; `open_turn` ends it with the start of an answer (inference)."""
        raise NotImplementedError

    def decode(self, ids: list[int] | NDArray[np.int64]) -> str:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path) -> Processor:
        raise NotImplementedError
