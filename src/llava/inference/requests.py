"""What goes through an engine: requests, answers under way and done, and prompts that are read together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llava.inference.pictures import Picture
from llava.inference.prefix_cache import Stored
from llava.inference.sampling import Sampler, SamplingParams, TokenLogprobs
from llava.prompt.processor import Encoded

if TYPE_CHECKING:
    from llava.inference.engine import Engine

FinishReason = Literal["stop", "length", "cancelled"]

GREEDY = SamplingParams()


@dataclass(frozen=True, eq=False)
class Request:
    """One question: an encoded prompt (`Processor.encode(conversation, open_turn=True)`) and how to answer it."""

    encoded: Encoded
    params: SamplingParams = GREEDY


@dataclass(frozen=True)
class Completion:
    """One answer. token_ids ends with the stop token when finish_reason is "stop".

    logprobs: one entry a token where SamplingParams asked for them, else empty.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class EngineLimits:
    """What an engine may take at once."""

    max_active: int = 256
    """Answers stepped together."""
    max_cache_bytes: int = 4 * 2**30
    """Keys and values of all answers under way; a single larger request still runs, alone."""
    max_feature_bytes: int = 256 * 2**20
    """Image features kept for pictures that are asked about again."""
    max_prefix_bytes: int = 2**30
    """Keys and values kept of prompts and answers that others may begin with; 0 keeps none."""


class Generation:
    """One request on its way. Iterating gives its token ids as they come, and steps the engine meanwhile."""

    def __init__(self, engine: Engine, request: Request, *, max_new_tokens: int) -> None:
        self._engine = engine
        self.request = request
        self.max_new_tokens = max_new_tokens
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.error: BaseException | None = None
        """What ended it, when something did; iterating raises it."""
        self.cancelled = False
        """Whether somebody asked for its end."""

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def cancel(self) -> None:
        """End the answer where it is and give its memory back."""
        self._engine.cancel(self)

    def completion(self) -> Completion:
        """The finished answer. Raises what ended it, when something did."""
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None, "asked for the completion of an answer under way"
        return Completion(
            tuple(self.token_ids),
            self.finish_reason,
            len(self.request.encoded.input_ids),
            tuple(self.logprobs),
        )

    def __iter__(self) -> Iterator[int]:
        given = 0
        while True:
            while given < len(self.token_ids):
                given += 1
                yield self.token_ids[given - 1]
            if self.error is not None:
                raise self.error
            if self.done:
                return
            self._engine.step()


@dataclass(eq=False)
class Job:
    """A generation with what the engine needs to work on it."""

    generation: Generation
    branch: int
    ids: NDArray[np.int64]
    pictures: tuple[Picture, ...]
    end_of_pictures: int
    """Index after the last placeholder, 0 without pictures."""
    picture_ends: tuple[int, ...]
    """For each picture, how many placeholders there are up to its last."""
    content: NDArray[np.int64]
    """Its tokens with every placeholder told apart by its picture; equal content is equal input."""
    sampler: Sampler | None
    """None when the batch's argmax is the answer."""
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    shared: int = 0
    """How many of its first tokens it was read together with others."""


@dataclass(frozen=True, eq=False)
class PromptRead:
    """A prompt that was read: its branch in the decoder, logits (1, V) after it, and how long an answer may be."""

    branch: int
    logits: Tensor
    max_new_tokens: int


@dataclass(frozen=True, eq=False)
class Batch:
    """Jobs whose prompts are read together.

    shared: how many first tokens all of them have in common; known: what was computed for the first `known_length` of
    them before; unread: the pictures that are not wholly among those.
    """

    jobs: tuple[Job, ...]
    shared: int
    known: Stored | None
    known_length: int
    unread: tuple[Picture, ...]
