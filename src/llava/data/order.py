"""The order in which an epoch reads its groups: shuffled, as the files have them, or in steps of like length.

Rows are packed here, so a step of like lengths saves no padding; `grouped_by_length` is for who wants the steps of the
original's `--group_by_modality_length`: conversations of one modality, of like length, in every step but the last two.
The rule and the order of its random draws are the original's (held by recordings of it). The draws themselves are a
function of (seed, epoch), where the original took whatever state the process's generator was in, so that one of its own
runs cannot be repeated; a step is the same set of conversations however many processes share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llava.errors import DataError
from llava.prompt.conversation import Conversation, Image

Order = Literal["shuffled", "grouped_by_length", "file"]
# n -> the numbers 0 to n - 1 in a random order
Permute = Callable[[int], Sequence[int]]


def order_groups(
    order: Order, num_groups: int, *, seed: int, epoch: int, lengths: Sequence[int] = (), batch_size: int = 1
) -> NDArray[np.int64]:
    """The numbers of an epoch's groups in reading order; a pure function of its arguments.

    lengths: one a group as `grouped_by_length` takes them, for that order only; batch_size: groups in a global step.
    """
    random = np.random.Generator(np.random.Philox(key=seed, counter=epoch))
    if order == "file":
        return np.arange(num_groups, dtype=np.int64)
    if order == "shuffled":
        return random.permutation(num_groups)
    if len(lengths) != num_groups:
        raise ValueError(f"{len(lengths)} lengths for {num_groups} groups")
    grouped = grouped_by_length(lengths, batch_size=batch_size, permute=lambda n: random.permutation(n).tolist())
    return np.array(grouped, dtype=np.int64)


def signed_length(conversations: Sequence[Conversation]) -> int:
    """The words of a group of conversations, `<image>` being one; negative when they show no picture.

    At least 1 in size: a conversation without a word still takes its place.
    """
    words = 0
    for conversation in conversations:
        for message in conversation.messages:
            text = "".join("<image>" if isinstance(part, Image) else part.text for part in message.parts)
            words += len(text.split())
    return max(words, 1) * (1 if any(conversation.images for conversation in conversations) else -1)


def signed_lengths(conversations: Sequence[Conversation], groups: Sequence[Sequence[int]]) -> list[int]:
    """`signed_length` of each group; an unreadable record counts as one word without a picture."""
    return [signed_length([c for c in (_readable(conversations, i) for i in group) if c]) for group in groups]


def grouped_by_length(
    lengths: Sequence[int],
    *,
    batch_size: int,
    permute: Permute,
    world_size: int = 1,
    permute_steps: Permute | None = None,
) -> list[int]:
    """Item numbers so that each run of `batch_size * world_size` has one sign (modality) and like lengths.

    Positive and negative items are cut into steps apart, and the steps of both shuffled together; the rest of either
    is merged into one last run, in item order. Items of one sign only are not shuffled again, and keep the rest's own
    order. world_size: within a step, items are dealt to so many processes evenly by length; it changes no step's set.
    permute_steps: draws the order of the steps, `permute` when None. Raises ValueError for a length of 0.

    >>> grouped_by_length([5, -2, 9, 7, -4], batch_size=2, permute=range)
    [2, 0, 1, 3, 4]
    """
    if 0 in lengths:
        raise ValueError(f"item {list(lengths).index(0)} has length 0, which is of neither sign")
    shown = [i for i, length in enumerate(lengths) if length > 0]
    spoken = [i for i, length in enumerate(lengths) if length < 0]
    steps, rests = [], []
    for items in (shown, spoken):
        sizes = [abs(lengths[i]) for i in items]
        runs = [[items[i] for i in run] for run in _like_lengths(sizes, batch_size, world_size, permute)]
        if not (shown and spoken):
            steps += runs
        elif runs:
            steps += runs[:-1]
            rests += runs[-1]
    if shown and spoken:
        steps = [steps[i] for i in (permute_steps or permute)(len(steps))] + [sorted(rests)]
    return [i for step in steps for i in step]


def deal_evenly(items: Sequence[int], lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Deal items to hands of equal size, each to the hand with the least total length that still has room.

    When the number does not divide, they are dealt in turn.
    """
    if len(items) % hands:
        return [list(items[hand::hands]) for hand in range(hands)]
    dealt: list[list[int]] = [[] for _ in range(hands)]
    totals = [0] * hands
    for item in items:
        open_hands = [hand for hand in range(hands) if len(dealt[hand]) < len(items) // hands]
        hand = min(open_hands, key=totals.__getitem__)
        dealt[hand].append(item)
        totals[hand] += lengths[item]
    return dealt


def _like_lengths(sizes: Sequence[int], batch_size: int, world_size: int, permute: Permute) -> list[list[int]]:
    """Random runs of batch_size * world_size items, each from long to short, then dealt to the processes."""
    if not sizes:
        return []
    shuffled, step = list(permute(len(sizes))), batch_size * world_size
    runs = [shuffled[start : start + step] for start in range(0, len(shuffled), step)]
    hands = [deal_evenly(sorted(run, key=lambda i: -sizes[i]), sizes, world_size) for run in runs]
    return [[i for hand in run for i in hand] for run in hands]


def _readable(conversations: Sequence[Conversation], number: int) -> Conversation | None:
    try:
        return conversations[number]
    except DataError:
        return None
