"""From a recipe's conversations to the batches of each global step, in an order that is a function of the seed alone.

Step s of a run holds the same conversations whatever the number of workers or processes and wherever the run was
stopped: the plan is arithmetic on (seed, epoch, group), and the position is one number. A group is up to
`conversations_per_tree` conversations on one picture; groups are shuffled, and each step takes `batch_conversations`
conversations' worth of them. Workers are threads: decoding, resizing and tokenising release the interpreter.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llava.data.bad_samples import BadSample, BadSamples, gather_bad
from llava.data.batch import Batch, build_batch
from llava.data.grouping import Group, Groups
from llava.data.order import Order, order_groups
from llava.data.packing import Tree, fit_rows, grow_trees, number_pictures
from llava.errors import TrainingError
from llava.prompt.processor import Encoded

EncodeGroup = Callable[[Group], Sequence[Encoded | BadSample]]


class EpochGroups(Protocol):
    """Groups that differ from epoch to epoch (llava.data.mixture.Mixture)."""

    @property
    def limit(self) -> int:
        """The most conversations in a group."""

    def in_epoch(self, epoch: int) -> Sequence[Group]:
        """The groups of an epoch, a pure function of it."""


@dataclass(frozen=True, eq=False)
class GlobalStep:
    """What one process computes of one optimizer step.

    conversations: numbers of the conversations in it, all processes together; dropped: how many of this process's
    were left out as too long; truncated: how many were cut; bad: which could not be used; num_answer_tokens: of this
    process's micro-batches.
    """

    step: int
    epoch: float
    conversations: tuple[int, ...]
    micro_batches: tuple[Batch, ...]
    dropped: int
    truncated: int = 0
    bad: tuple[BadSample, ...] = ()

    @property
    def num_answer_tokens(self) -> int:
        return sum(batch.num_answer_tokens for batch in self.micro_batches)


@dataclass(frozen=True, eq=False)
class StepPlan:
    """Which groups each step holds. Every epoch orders all its groups anew and ends with a step of what is left.

    lengths: one a conversation, for order "grouped_by_length" of single conversations only
    (`llava.data.order.signed_lengths`).
    """

    groups: Sequence[Group] | EpochGroups
    batch_conversations: int
    seed: int
    epochs: float = 1.0
    max_steps: int | None = None
    order: Order = "shuffled"
    lengths: Sequence[int] = ()

    def __post_init__(self) -> None:
        groups = self.groups
        longest = max(map(len, groups), default=0) if isinstance(groups, Sequence) else groups.limit
        assert longest <= self.batch_conversations, "a group fills more than a step"

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch; others may differ by one when groups differ in size."""
        return len(self._bounds(0)) - 1

    @property
    def total_steps(self) -> int:
        whole, part = divmod(self.epochs, 1.0)
        steps = 0
        for epoch in range(int(whole)):
            steps += len(self._bounds(epoch)) - 1
            if self.max_steps is not None and steps >= self.max_steps:
                return self.max_steps  # "epochs: 1e9, max_steps: 1000" is not counted to its end
        if part > 0:
            steps += math.ceil(part * (len(self._bounds(int(whole))) - 1))
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def groups_of(self, step: int) -> list[Group]:
        """The groups of a step, in order."""
        epoch, inner = self.locate(step)
        bounds = self._bounds(epoch)
        order = self._order(epoch)
        groups = self._groups(epoch)
        return [groups[i] for i in order[bounds[inner] : bounds[inner + 1]]]

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it)."""
        epoch = 0
        while step >= (steps := len(self._bounds(epoch)) - 1):
            step -= steps
            epoch += 1
        return epoch, step

    def epoch_at(self, step: int) -> float:
        """How many epochs are done when a step is done."""
        epoch, inner = self.locate(step)
        return epoch + (inner + 1) / (len(self._bounds(epoch)) - 1)

    @lru_cache(maxsize=2)  # noqa: B019 - a plan lives as long as its run
    def _groups(self, epoch: int) -> Sequence[Group]:
        return self.groups if isinstance(self.groups, Sequence) else self.groups.in_epoch(epoch)

    @lru_cache(maxsize=2)  # noqa: B019
    def _order(self, epoch: int) -> NDArray[np.int64]:
        groups = self._groups(epoch)
        return order_groups(
            self.order,
            len(groups),
            seed=self.seed,
            epoch=epoch,
            lengths=[self.lengths[group[0]] for group in groups] if self.lengths else (),
            batch_size=self.batch_conversations,
        )

    @cache  # noqa: B019 - 8 bytes a step
    def _bounds(self, epoch: int) -> NDArray[np.int64]:
        """Where each step begins in the epoch's order, and where the last one ends."""
        groups = self._groups(epoch)
        sizes = (
            groups.sizes if isinstance(groups, Groups) else np.array([len(group) for group in groups], dtype=np.int64)
        )
        sizes = sizes[self._order(epoch)]
        before = np.cumsum(sizes) - sizes
        step_of_group = before // self.batch_conversations
        starts = np.flatnonzero(np.diff(step_of_group, prepend=-1))
        return np.append(starts, len(groups))


@dataclass(frozen=True)
class Layout:
    """How a step's conversations become trees, rows and micro-batches. Changes no gradient, only memory and speed.

    tree_tokens: the longest tree; row_tokens: the longest row. Attention through a mask costs the square of a row, so
    rows should be short there; attention by trees does not care, and one long row has no padding.
    picture_keys: batches carry a key of each picture, for a cache of its features.
    """

    tree_tokens: int
    row_tokens: int
    micro_batch_tokens: int
    image_token_id: int
    pad_token_id: int
    multiple: int = 8
    picture_keys: bool = False


class Loader:
    """Yields the global steps from a position on; `encode` turns a group into one Encoded a conversation.

    `encode` may leave out conversations that are too long (counted in GlobalStep.dropped), and give a BadSample for one
    that cannot be used: it is noted in `bad_samples` when its step is handed out, which ends the run above the cap.
    rank, world_size: each process makes its share of every step; which conversations a step holds does not change.
    """

    def __init__(
        self,
        plan: StepPlan,
        encode: EncodeGroup,
        *,
        layout: Layout,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        fingerprint: str = "",
        bad_samples: BadSamples | None = None,
    ) -> None:
        self.plan = plan
        self.position = 0
        self.bad_samples = BadSamples(max_share=1.0, conversations=sys.maxsize) if bad_samples is None else bad_samples
        self._encode = encode
        self._layout = layout
        self._workers = workers
        self._rank = rank
        self._world_size = world_size
        self._fingerprint = fingerprint

    def __iter__(self) -> Iterator[GlobalStep]:
        """Steps from the position to the end of the plan; the position moves when a step is handed out."""
        steps = range(self.position, self.plan.total_steps)
        self.bad_samples.begin()
        for made in self._ahead(steps) if self._workers else map(self.make, steps):
            self.bad_samples.note(gather_bad(made.bad), seen=len(made.conversations))
            self.position = made.step + 1
            yield made

    def make(self, step: int) -> GlobalStep:
        """Prepare one step; a pure function of the plan, the data and the step."""
        return self._make(step, threading.Event())

    def _make(self, step: int, stopping: threading.Event) -> GlobalStep:
        groups = self.plan.groups_of(step)
        trees: list[Tree] = []
        bad: list[BadSample] = []
        wanted = truncated = 0
        # Dealt in turn: every process gets its share of pictures whatever the number of processes.
        for group in groups[self._rank :: self._world_size]:
            if stopping.is_set():
                raise _StoppedError
            results = self._encode(group)
            encoded = [result for result in results if isinstance(result, Encoded)]
            bad += [result for result in results if isinstance(result, BadSample)]
            wanted += len(group)
            truncated += sum(one.num_truncated > 0 for one in encoded)
            if encoded:
                trees += grow_trees(
                    encoded, image_token_id=self._layout.image_token_id, max_tokens=self._layout.tree_tokens
                )
        batches = tuple(lay_out(trees, self._layout))
        return GlobalStep(
            step=step,
            epoch=self.plan.epoch_at(step),
            conversations=tuple(i for group in groups for i in group),
            micro_batches=batches,
            dropped=wanted - len(bad) - sum(batch.num_conversations for batch in batches),
            truncated=truncated,
            bad=tuple(bad),
        )

    def key_pictures(self) -> None:
        """From now on, batches carry a key of each picture."""
        self._layout = replace(self._layout, picture_keys=True)

    def state_dict(self) -> dict[str, Any]:
        """The position, what it is a position in, and the bad samples before it."""
        return {
            "position": self.position,
            "seed": self.plan.seed,
            "data": self._fingerprint,
            "bad_samples": self.bad_samples.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader stopped. Raises TrainingError when it read other data or another order."""
        for key, here in (("seed", self.plan.seed), ("data", self._fingerprint)):
            if state[key] != here:
                raise TrainingError(
                    f"the checkpoint was made with another {key} ({state[key]!r}, now {here!r}); "
                    "give back what it was, or choose another run.out"
                )
        self.position = int(state["position"])
        if "bad_samples" in state:
            self.bad_samples.load_state_dict(state["bad_samples"])

    def _ahead(self, steps: range) -> Iterator[GlobalStep]:
        """Prepare steps in threads, a few ahead of the one that is asked for.

        A step that fails is raised when it is its turn. Whatever ends the iteration (an error, Ctrl-C, or a caller that
        wants no more) stops the threads at the next group, so that nothing waits for steps that nobody will see.
        """
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="llava-loader")
        stopping = threading.Event()
        waiting: deque[Future[GlobalStep]] = deque()
        upcoming = iter(steps)
        try:
            for step in upcoming:
                waiting.append(pool.submit(self._make, step, stopping))
                if len(waiting) > 2 * self._workers:
                    break
            while waiting:
                made = waiting.popleft().result()
                for step in upcoming:
                    waiting.append(pool.submit(self._make, step, stopping))
                    break
                yield made
        finally:
            stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)


class _StoppedError(Exception):
    """Ends a thread's work on a step that nobody will ask for."""


def lay_out(trees: Sequence[Tree], layout: Layout) -> Iterator[Batch]:
    """Rows by best fit, rows of like length together, as many a batch as `micro_batch_tokens` allows (at least one)."""
    if not trees:
        return
    trees = number_pictures(trees)
    rows = fit_rows([tree.num_tokens for tree in trees], layout.row_tokens)
    lengths = [sum(trees[i].num_tokens for i in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda row: (-lengths[row], row))
    members: list[int] = []
    for row in order:
        padded = -(-lengths[members[0] if members else row] // layout.multiple) * layout.multiple
        if members and padded * (len(members) + 1) > layout.micro_batch_tokens:
            yield _batch(members, rows, trees, layout)
            members = []
        members.append(row)
    yield _batch(members, rows, trees, layout)


def _batch(members: Sequence[int], rows: Sequence[Sequence[int]], trees: Sequence[Tree], layout: Layout) -> Batch:
    laid = [[trees[i] for i in rows[row]] for row in members]
    return build_batch(laid, pad_token_id=layout.pad_token_id, multiple=layout.multiple, keyed=layout.picture_keys)
