"""Keys and values of the tokens read so far: rows of columns, one column a token, grown when needed.

A row is a tree: the tokens of a prefix, then the tokens of its branches in the order in which they came. `owner` says
for each column whether it belongs to the prefix (0), to a branch (1, 2, ...) or to nobody (-1).
"""

from __future__ import annotations

import torch
from torch import Tensor

PREFIX = 0
NOBODY = -1
MIN_COLUMNS = 128


class KeyValueCache:
    """One (rows, columns, heads, head_dim) tensor of keys and one of values a layer, and the columns' owners."""

    def __init__(self, num_layers: int, heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._num_layers = num_layers
        self._heads, self._head_dim = heads, head_dim
        self._dtype, self._device = dtype, device
        self.clear()

    def clear(self) -> None:
        """Give all memory back."""
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self.flat: list[tuple[Tensor, Tensor]] = []
        """For each layer, keys and values as (rows * columns, heads, head_dim)."""
        self.owner = torch.empty(0, 0, dtype=torch.int32, device=self._device)
        self.rows = self.columns = 0

    @property
    def nbytes(self) -> int:
        """Memory held by keys and values."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    def reserve(self, rows: int, columns: int, *, used: int) -> None:
        """Make room for this many rows and columns; the first `used` rows keep what they hold."""
        if rows <= self.rows and columns <= self.columns:
            return
        if rows > self.rows:
            # Groups come one by one; not every one may copy the whole cache.
            rows = max(rows, self.rows + self.rows // 2)
        rows = max(rows, self.rows)
        columns = max(-(-columns // MIN_COLUMNS) * MIN_COLUMNS, self.columns)
        self._keys = self._grown(self._keys, rows, columns, used)
        self._values = self._grown(self._values, rows, columns, used)
        owner = torch.full((rows, columns), NOBODY, dtype=torch.int32, device=self._device)
        owner[:used, : self.columns] = self.owner[:used]
        self.owner = owner
        self.rows, self.columns = rows, columns
        self.flat = [
            (keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in zip(self._keys, self._values, strict=True)
        ]

    def copy_row(self, source: int, target: int, *, columns: int) -> None:
        """Copy a row's first columns over another row; nobody owns what is behind them."""
        for tensor in (*self._keys, *self._values, self.owner):
            tensor[target, :columns] = tensor[source, :columns]
        self.owner[target, columns:] = NOBODY

    def read(self, row: int, *, columns: int) -> Tensor:
        """A copy of a row's first columns: (layers, 2, columns, heads, head_dim), keys before values."""
        layers = zip(self._keys, self._values, strict=True)
        return torch.stack([torch.stack([keys[row, :columns], values[row, :columns]]) for keys, values in layers])

    def write(self, row: int, state: Tensor, *, columns: int) -> None:
        """Put the first columns of what `read` gave into a row, as its prefix."""
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            keys[row, :columns] = state[layer, 0, :columns]
            values[row, :columns] = state[layer, 1, :columns]
        self.owner[row, :columns] = PREFIX

    def _grown(self, tensors: list[Tensor], rows: int, columns: int, used: int) -> list[Tensor]:
        grown = []
        for i in range(self._num_layers):
            # Zeros: a masked column has weight 0, and 0 times whatever lay in fresh memory could be NaN.
            new = torch.zeros(rows, columns, self._heads, self._head_dim, dtype=self._dtype, device=self._device)
            if used:
                new[:used, : self.columns] = tensors[i][:used]
            grown.append(new)
        return grown
