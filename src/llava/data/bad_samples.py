"""Samples that cannot be used: named, counted once each, listed in the run's folder, and capped.

A bad sample never ends a run by itself. Its place in the step stays (the step's conversations and the order of all
steps are the same as without the fault), with no token and so no loss in it: the zero-loss stand-in of a packed row.
Which samples are bad is a function of the data, so every process and every resumed run leaves out the same ones.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llava.distributed import gather_rows, is_joined, process_count
from llava.errors import DataError

if TYPE_CHECKING:
    from llava.data.sources import ConversationSet

_log = logging.getLogger(__name__)

#: So many are forgiven whatever the share, so that the first bad sample of a long run does not end it ...
_FORGIVEN = 10
#: ... but never more than this share of a small data set.
_FORGIVEN_SHARE = 0.1


@dataclass(frozen=True)
class BadSample:
    """A conversation that was left out. number: in the conversation set; origin: "mix.json:17"; reason: without it."""

    number: int
    origin: str
    reason: str

    @staticmethod
    def of(number: int, origin: str, problem: BaseException | str) -> BadSample:
        """From an error text, which leads with the origin or not."""
        return BadSample(number, origin, str(problem).removeprefix(f"{origin}: "))


class BadSamples:
    """The bad samples of a run so far.

    max_share: how many of the conversations read may be bad; conversations: how many there are; path: the list on disk
    (None: kept in memory only, as in processes that do not write).
    """

    def __init__(self, *, max_share: float, conversations: int, path: Path | None = None) -> None:
        self._max_share = max_share
        self._conversations = conversations
        self._path = path
        self._entries: dict[int, BadSample] = {}
        self._seen = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[BadSample]:
        return iter(self._entries.values())

    def begin(self) -> None:
        """Make the list on disk hold exactly what is known now; what an earlier run left goes."""
        if self._path is None:
            return
        if self._entries:
            self._write(self._entries.values(), mode="w")
            return
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(
                f"{self._path}: an earlier run's list cannot be removed ({error.strerror}); remove it or fix the folder"
            ) from error

    def note(self, found: Iterable[BadSample], *, seen: int) -> None:
        """Add a step's bad samples, of `seen` conversations. Raises DataError when there are too many by now."""
        self._seen += seen
        fresh = [bad for bad in found if bad.number not in self._entries]
        if not fresh:
            return
        self._entries.update((bad.number, bad) for bad in fresh)
        self._write(fresh, mode="a")
        # Each bad sample counts once, so over several epochs it is held against each conversation once too.
        seen = min(self._seen, self._conversations)
        if len(self._entries) > allowed(self._max_share, seen=seen, conversations=self._conversations):
            first = "; ".join(f"{bad.origin}: {bad.reason}" for bad in list(self._entries.values())[:3])
            listed = f"; all are listed in {self._path}" if self._path is not None else ""
            raise DataError(
                f"{len(self._entries)} of the {seen} conversations read so far cannot be used, more than "
                f"data.max_bad_share={self._max_share:g} allows: {first}{listed}; mend them or raise data.max_bad_share"
            )

    def _write(self, entries: Iterable[BadSample], *, mode: Literal["a", "w"]) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open(mode, encoding="utf-8") as file:
                file.writelines(map(_line, entries))
        except OSError as error:
            # The entries are in the checkpoints too, so the next start writes the whole list again.
            _log.warning("%s: cannot be written (%s); %d bad samples so far", self._path, error.strerror, len(self))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on counting from."""
        entries = [[bad.number, bad.origin, bad.reason] for bad in self._entries.values()]
        return {"seen": self._seen, "entries": entries}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another run stopped."""
        self._seen = int(state["seen"])
        self._entries = {number: BadSample(number, origin, reason) for number, origin, reason in state["entries"]}


def allowed(max_share: float, *, seen: int, conversations: int) -> int:
    """How many of `seen` conversations may be bad: the share, but at least ten (a tenth of a small data set).

    >>> allowed(0.001, seen=500, conversations=100_000), allowed(0.001, seen=50_000, conversations=100_000)
    (10, 50)
    >>> allowed(0.001, seen=20, conversations=20), allowed(0.0, seen=500, conversations=500)
    (2, 0)
    """
    if max_share == 0:
        return 0
    forgiven = min(_FORGIVEN, math.ceil(_FORGIVEN_SHARE * conversations), conversations - 1)  # never all of them
    return max(math.floor(max_share * seen), forgiven)


def refuse_unusable(conversations: ConversationSet, *, max_share: float) -> None:
    """Look at what is known before any record is read: pictures that are not there, lines that are no JSON.

    Warns of them; raises DataError naming three when there are more than a run would forgive.
    """
    found = [*conversations.unusable()]
    if not found:
        return
    total = len(conversations)
    first = "; ".join(_say_why(conversations, number) for number in found[:3])
    if len(found) > allowed(max_share, seen=total, conversations=total):
        raise DataError(
            f"{first}{' ...' if len(found) > 3 else ''} ({len(found)} of {total} conversations cannot be used, more "
            f"than data.max_bad_share={max_share:g} allows)"
        )
    _log.warning("%d of %d conversations cannot be used and will be left out: %s", len(found), total, first)


def _say_why(conversations: ConversationSet, number: int) -> str:
    file, inner = conversations.locate(number)
    try:
        conversation = file[inner]
    except DataError as error:
        return str(error)
    for image in conversation.images:
        if isinstance(image.source, Path) and not image.source.exists():
            name = image.source.relative_to(file.image_root).as_posix()
            return (
                f"{file.origin(inner)}: picture {name!r} is not in {file.image_root}; "
                "set data.images to the folder that its path begins in"
            )
    return f"{file.origin(inner)}: a picture of it cannot be read"


def gather_bad(own: Sequence[BadSample]) -> list[BadSample]:
    """The bad samples of every process's share of a step, by process number."""
    if not is_joined() or not any(row[0] for row in gather_rows(len(own))):
        return list(own)
    import torch.distributed as dist

    shares: list[Any] = [None] * process_count()
    dist.all_gather_object(shares, list(own))
    return [bad for share in shares for bad in share]


def _line(bad: BadSample) -> str:
    return json.dumps({"origin": bad.origin, "reason": bad.reason}, ensure_ascii=False) + "\n"
