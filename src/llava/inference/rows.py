"""Which answers share a row of the key-value cache, and where the tokens of a step go."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from llava.inference.decoder import Group

# Columns of a row are masked for the branches that do not own them, and masked work is wasted work; beyond this many
# columns of branches (or twice the prefix), more rows with a copy of the prefix are cheaper.
_MAX_BRANCH_COLUMNS = 1024

# Owner of a query that stands for no branch, where a row has fewer branches than others.
NO_QUERY = -2


@dataclass(eq=False)
class Branch:
    """One answer under way."""

    number: int
    """Owner number of its columns in its row, from 1."""
    length: int
    """Tokens of its prompt and answer so far: the position of its next one."""


@dataclass(eq=False)
class Row:
    """A prefix and the answers that grow from it."""

    columns: int = 0
    """Columns in use, those of finished branches too."""
    prefix: int = 0
    """Columns that all its branches share."""
    branches: dict[int, Branch] = field(default_factory=dict)
    made: int = 0
    """Branches it ever had."""


@dataclass(eq=False)
class Layout:
    """Where the tokens of a step go. N tokens, one a branch; R rows; up to Q branches a row."""

    branches: tuple[int, ...]
    states: list[tuple[Row, Branch]]
    rows: Tensor
    """(N,) row of each token."""
    owner: Tensor
    """(N,) branch number in its row."""
    positions: Tensor
    """(N,) position of each token."""
    columns: Tensor
    """(N,) column of each token."""
    stride: Tensor
    """(N,) how many columns a step adds to the token's row."""
    query_owner: Tensor
    """(R, Q) branch number of each query, NO_QUERY where a row has fewer than Q."""
    slots: Tensor | None
    """(N,) index into R x Q, None when the tokens fill it in order."""
    needs_mask: bool
    longest_position: int
    longest_columns: int

    def move_on(self) -> None:
        """From this step to the next one of the same branches."""
        self.positions += 1
        self.columns += self.stride
        self.longest_position += 1
        self.longest_columns = max(row.columns + len(row.branches) for row, _ in self.states)


def plan_rows(group: Group) -> list[list[int]]:
    """Which prompts of a group share a row: as many as fit into the columns that are worth masking."""
    limit = max(_MAX_BRANCH_COLUMNS, 2 * len(group.prefix_ids))
    rows: list[list[int]] = [[]]
    columns = 0
    for i, (suffix, max_new_tokens) in enumerate(zip(group.suffix_ids, group.max_new_tokens, strict=True)):
        wanted = len(suffix) + max_new_tokens
        if rows[-1] and columns + wanted > limit:
            rows.append([])
            columns = 0
        rows[-1].append(i)
        columns += wanted
    return rows
