"""The figures of a checked data set: what check.json, the page and the terminal show.

Arrays hold one number a conversation or picture, so a million records cost some tens of megabytes.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.data.bad_samples import allowed
from llava.data.check_findings import FindingLog
from llava.data.encoding import TooLong
from llava.data.sources import ConversationSet


@dataclass(frozen=True)
class CheckLimits:
    """What a run would allow; the defaults are those of a recipe's `data` section (a test holds it)."""

    max_tokens: int = 2048
    too_long: TooLong = "error"
    max_bad_share: float = 0.001
    row_tokens: int = 4096
    group_by_picture: bool = True
    conversations_per_tree: int = 12
    batch_conversations: int = 128

    @property
    def conversations_per_group(self) -> int:
        return min(self.conversations_per_tree, self.batch_conversations) if self.group_by_picture else 1


@dataclass(frozen=True)
class Sharing:
    """What one epoch costs when every conversation stands alone, and when those on one picture share its tokens.

    Tokens are None without a processor. Conversations that a run would replace or leave out count in neither.
    """

    pictures_alone: int
    pictures_shared: int
    tokens_alone: int | None
    tokens_shared: int | None

    @property
    def ratio(self) -> float:
        """Times fewer tokens; 1 when nothing is counted."""
        return (self.tokens_alone or 1) / max(self.tokens_shared or 1, 1)

    @property
    def picture_ratio(self) -> float:
        return self.pictures_alone / max(self.pictures_shared, 1)


@dataclass
class Report:
    """What was found. One entry a conversation: turns, pictures, answer_chars, tokens, answer_tokens (0 without a
    processor), bad (a run would replace it); one entry a distinct picture: heights, widths (0 where it does not open),
    first_records."""

    conversations: ConversationSet
    limits: CheckLimits
    counted: bool
    turns: NDArray[np.int32]
    pictures: NDArray[np.int32]
    answer_chars: NDArray[np.int64]
    tokens: NDArray[np.int32]
    answer_tokens: NDArray[np.int32]
    bad: NDArray[np.bool_]
    log: FindingLog = field(default_factory=FindingLog)
    roles: Counter[str] = field(default_factory=Counter)
    heights: array[int] = field(default_factory=lambda: array("i"))
    widths: array[int] = field(default_factory=lambda: array("i"))
    first_records: array[int] = field(default_factory=lambda: array("q"))
    sharing: Sharing = Sharing(0, 0, None, None)

    @classmethod
    def empty(cls, conversations: ConversationSet, limits: CheckLimits, *, counted: bool) -> Report:
        count = len(conversations)
        small = [np.zeros(count, dtype=np.int32) for _ in range(4)]
        chars = np.zeros(count, dtype=np.int64)
        return cls(conversations, limits, counted, small[0], small[1], chars, small[2], small[3], np.zeros(count, bool))

    @property
    def ok(self) -> bool:
        return not self.log.num_errors

    @property
    def records(self) -> int:
        return len(self.bad)

    @property
    def num_bad(self) -> int:
        return int(self.bad.sum())

    @property
    def num_left_out(self) -> int:
        """How many a run would put samples without loss in the place of; one that is too long stops it instead."""
        return self.num_bad - self.log.counts["too long"]

    @property
    def too_many_left_out(self) -> bool:
        """Whether so many cannot be used that a run would give up."""
        return self.num_left_out > allowed(self.limits.max_bad_share, seen=self.records, conversations=self.records)

    @property
    def stops_a_run(self) -> bool:
        """Whether a run would give up: a conversation over the limit, or too many that cannot be used."""
        return self.log.counts["too long"] > 0 or self.too_many_left_out

    def by_file(self) -> list[dict[str, Any]]:
        """The figures of each file (or pattern) on its own."""
        rows = []
        start = 0
        for file in self.conversations.files:
            part = slice(start, start + len(file))
            start += len(file)
            tokens, answers = int(self.tokens[part].sum()), int(self.answer_tokens[part].sum())
            rows.append(
                {
                    "file": str(file.path),
                    "records": len(file),
                    "bad_records": int(self.bad[part].sum()),
                    "turns": int(self.turns[part].sum()),
                    "picture_mentions": int(self.pictures[part].sum()),
                    "tokens": tokens if self.counted else None,
                    "supervised": answers if self.counted else None,
                }
            )
        return rows

    def origin(self, record: int) -> str:
        file, inner = self.conversations.locate(record)
        return file.origin(inner)

    def summary(self) -> dict[str, Any]:
        """The figures of check.json; its "findings" follow them."""
        counted = self.tokens[self.tokens > 0]
        answers = int(self.answer_tokens.sum())
        distinct = len(self.heights)
        mentions = int(self.pictures.sum())
        tokens = None
        if self.counted:
            tokens = {
                **spread(counted),
                "supervised": answers,
                "supervised_share": round(answers / max(int(counted.sum()), 1), 4),
            }
        sharing = self.sharing
        return {
            "files": [str(file.path) for file in self.conversations.files],
            "records": self.records,
            "bad_records": self.num_bad,
            "errors": self.log.num_errors,
            "warnings": self.log.num_warnings,
            "kinds": dict(self.log.by_kind()),
            "turns": {
                "all": int(self.turns.sum()),
                "by_role": dict(self.roles),
                **spread(self.turns[self.turns > 0], total=False),
            },
            "text_only": int(((self.pictures == 0) & (self.turns > 0)).sum()),
            "pictures": {"distinct": distinct, "mentions": mentions, "opened": sum(1 for side in self.heights if side)},
            "tokens": tokens,
            "sharing": {
                "tokens_alone": sharing.tokens_alone,
                "tokens_shared": sharing.tokens_shared,
                "token_ratio": None if sharing.tokens_alone is None else round(sharing.ratio, 3),
                "pictures_alone": sharing.pictures_alone,
                "pictures_shared": sharing.pictures_shared,
                "picture_ratio": round(sharing.picture_ratio, 3),
            },
            "by_file": self.by_file(),
            "limits": dict(vars(self.limits)),
        }


def spread(values: NDArray[Any], *, total: bool = True) -> dict[str, int | float]:
    """Least, median, mean, 95th percentile and most of some numbers; and their sum."""
    if not len(values):
        return {}
    middle, high = np.percentile(values, [50, 95])
    found: dict[str, int | float] = {"all": int(values.sum())} if total else {}
    return found | {
        "least": int(values.min()),
        "median": int(middle),
        "mean": round(float(values.mean()), 1),
        "p95": int(high),
        "most": int(values.max()),
    }
