"""The error tree. Every error that a user can cause is one of these; the command line prints its one line and exits 2.

    LlavaError                 anything below; the message names the file, line and value, and the way out
      UsageError               a command or call asked for something that does not exist or contradicts itself
        MissingExtraError      an optional package is not installed; the message holds the pip command
      PromptError              a conversation, template or tokenizer cannot be turned into tokens
        ContextLengthError     the prompt does not fit the model's context; shorten it or drop a picture
      ImageError               a picture cannot be read
        ImageTooLargeError     it breaks a limit (bytes, side, pixels, aspect), which is known before it is decoded
      DataError                a data set's file or record is wrong; fix it, or run `llava data check`
      RecipeError              a recipe's key or value is wrong; the nearest known key is named
      CheckpointError          a model folder is missing something, or holds what it should not
        UnknownFormatError     no known layout matches; the message says what was looked for and what was found
      TrainingError            a run cannot go on (non-finite loss, dead parameters, a resume that does not match)
        PeerFailedError        another process of the run failed first and has said why; nothing to add
      EngineError              a request cannot be answered
        OutOfMemoryError       the request did not fit the device; the engine itself goes on
        QueueFullError         too many requests wait; ask again after the seconds that it names

A bug of ours is not a LlavaError: it keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LlavaError(Exception):
    """Base of every error that names its own way out."""


class UsageError(LlavaError):
    """A command or call asked for something that does not exist or contradicts itself."""


class MissingExtraError(UsageError):
    """An optional package is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional package; pip install 'llava[{extra}]'")


class PromptError(LlavaError):
    """A conversation, template or tokenizer cannot be turned into tokens."""


class ContextLengthError(PromptError):
    """The prompt does not fit the model's context."""


class ImageError(LlavaError):
    """A picture cannot be read, or breaks a limit."""


class ImageTooLargeError(ImageError):
    """A picture breaks a limit: bytes, side, pixels or aspect."""


class DataError(LlavaError):
    """A data set's file or record is wrong."""


class RecipeError(LlavaError):
    """A recipe's key or value is wrong."""


class CheckpointError(LlavaError):
    """A model folder is missing something, or holds what it should not."""


class UnknownFormatError(CheckpointError):
    """No known checkpoint layout matches a folder."""


class TrainingError(LlavaError):
    """A training run cannot go on."""


class PeerFailedError(TrainingError):
    """Another process of the run failed first and has said why."""


class EngineError(LlavaError):
    """A request cannot be answered."""


class OutOfMemoryError(EngineError):
    """A request did not fit the device; the engine itself goes on."""


class QueueFullError(EngineError):
    """Too many requests wait. retry_after: seconds after which there should be room."""

    def __init__(self, waiting: int, *, retry_after: int) -> None:
        super().__init__(f"{waiting} requests wait already; try again in {retry_after} s")
        self.retry_after = retry_after


def name_nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an unknown-name error: the nearest known name, if any is near, and the whole list.

    >>> name_nearest("vicuna_v2", ["vicuna_v1", "mpt"])
    "did you mean 'vicuna_v1'? Known: mpt, vicuna_v1"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(names)}"
