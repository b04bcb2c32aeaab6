"""The fast path: our own decode step for Llama-like language models (Llama, Vicuna, Mistral without a window, Qwen2).

`generate()` of transformers spends most of a small model's time in Python. Here a step is about a dozen kernels a
layer: queries, keys and values in one product, rotation of queries and keys in one, a cache that is written in place.
The weights stay transformers' modules' own (small models' are copied once, joined); the greedy tokens are equal.

The key-value cache is rows of columns, one column a token. A row is a tree: the tokens of a prefix, read once, then
the tokens of its branches in the order in which they came. The cache's `owner` says for each column whether it belongs
to the prefix (0), to a branch (1, 2, ...) or to nobody (-1); a branch attends to the prefix and to itself. So twelve
questions about one picture read the picture once and step together, and an ordinary chat is a tree with one branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.inference.cache import MIN_COLUMNS, NOBODY, PREFIX, KeyValueCache
from llava.inference.decoder import Decoder, Group, LlavaLike, PlainDecoder, bytes_per_token, context_length
from llava.inference.layers import as_function, read_layers
from llava.inference.prefix_cache import Stored
from llava.inference.rows import NO_QUERY, Branch, Layout, Row, plan_rows

# Classes whose decoder layers are exactly: norm, rotated attention (biases allowed), norm, gated feed-forward.
_LEAN_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")

# Rotations whose frequencies do not change with the length of the text.
_LEAN_ROTATIONS = ("default", "linear", "llama3", "yarn")


def choose_decoder(model: LlavaLike) -> Decoder:
    """The fastest decoder that is right for this language model."""
    return LeanDecoder(model) if is_lean(model.language_model) else PlainDecoder(model)


def is_lean(language_model: Any) -> bool:
    """Whether LeanDecoder computes what this language model computes."""
    config = language_model.config
    if type(language_model).__name__ not in _LEAN_CLASSES:
        return False
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None)
    has_window = any(kind != "full_attention" for kind in layer_types) or (
        type(language_model).__name__ == "MistralForCausalLM"
        and window is not None
        and window < config.max_position_embeddings
    )
    rotation = getattr(language_model.model.rotary_emb, "rope_type", "default")
    devices = {parameter.device for parameter in language_model.parameters()}
    # under autocast (a model that is asked while it trains) formats change from layer to layer; here they may not
    together = len(devices) == 1 and not torch.is_autocast_enabled(devices.pop().type)
    return not has_window and rotation in _LEAN_ROTATIONS and together


class LeanDecoder:
    """Llama-like language models, many branches at once. Weights changed after construction may go unnoticed."""

    def __init__(self, model: LlavaLike) -> None:
        language_model = model.language_model
        config = language_model.config
        self._model = model
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._grouped = self._kv_heads != self._heads
        self._head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._eps: float = config.rms_norm_eps
        self._rotary: nn.Module = language_model.model.rotary_emb
        self._table: Tensor | None = None
        self._embedding: Tensor = language_model.get_input_embeddings().weight.detach()
        self._norm: Tensor = language_model.model.norm.weight.detach()
        self._head = as_function(language_model.get_output_embeddings())
        self._layers = read_layers(language_model.model, eps=self._eps)
        self._cache = KeyValueCache(
            len(self._layers),
            self._kv_heads,
            self._head_dim,
            dtype=self._embedding.dtype,
            device=self._embedding.device,
        )
        self._rows: list[Row] = []
        self._row_of: dict[int, Row] = {}
        self._layout: Layout | None = None
        self.device = self._embedding.device
        self.context_length = context_length(config)
        self.bytes_per_token = bytes_per_token(config, self._embedding.element_size())

    @property
    def cache_bytes(self) -> int:
        """Memory the cache holds now."""
        return self._cache.nbytes

    def prefill(self, group: Group, branches: Sequence[int]) -> Tensor:
        self._layout = None
        plan = plan_rows(group)
        prefix_length = len(group.prefix_ids)
        first_row = len(self._rows)
        logits: list[Tensor] = []
        with ExitStack() as undo:  # runs unless all prompts were read: a failed group leaves nothing behind
            undo.callback(self.free, branches)
            for i, members in enumerate(plan):
                new_tokens = sum(len(group.suffix_ids[m]) for m in members)
                room = sum(min(group.max_new_tokens[m], MIN_COLUMNS) for m in members)
                self._cache.reserve(
                    len(self._rows) + len(plan) - i, prefix_length + new_tokens + room, used=len(self._rows)
                )
                row = Row(prefix=prefix_length)
                self._rows.append(row)
                if i > 0 and prefix_length > 0:
                    self._cache.copy_row(first_row, first_row + i, columns=prefix_length)
                    row.columns = prefix_length
                else:
                    self._cache.owner[first_row + i] = NOBODY
                    if group.known is not None:
                        self._cache.write(first_row + i, group.known.state, columns=group.known_length)
                        row.columns = group.known_length
                logits.append(self._read(first_row + i, group, members, [branches[m] for m in members]))
            undo.pop_all()
        return torch.cat(logits)

    def step(self, branches: Sequence[int], token_ids: Sequence[int]) -> Tensor:
        layout = self._layout
        if layout is None or layout.branches != tuple(branches):
            layout = self._layout = self._lay_out(branches)
        if layout.longest_columns > self._cache.columns:
            # Doubling: a long answer copies its cache a few times, not at every step.
            self._cache.reserve(len(self._rows), 2 * layout.longest_columns, used=len(self._rows))
        flat = torch.add(layout.columns, layout.rows, alpha=self._cache.columns)
        mask = None
        if layout.needs_mask:
            self._cache.owner.view(-1).index_copy_(0, flat, layout.owner)
            mask = self._step_mask(layout)
        ids = torch.tensor(token_ids, device=self.device)
        hidden = self._run(
            self._embedding.index_select(0, ids),
            self._rotation(layout.positions, layout.longest_position + 1),
            flat,
            partial(self._attend_step, layout, mask, *self._views(layout)),
        )
        for row, branch in layout.states:
            row.columns += 1
            branch.length += 1
        layout.move_on()
        return self._head(hidden)

    def keep(self, branch: int) -> Stored | None:
        row = self._row_of[branch]
        columns = row.columns if row.made == 1 else row.prefix
        if columns == 0:
            return None
        state = self._cache.read(next(i for i, other in enumerate(self._rows) if other is row), columns=columns)
        return Stored(state, columns, state.nbytes)

    def fork(self, source: int, target: int) -> None:
        row = self._row_of[source]
        assert row.made == 1, "only a branch with a row to itself is copied"
        self._layout = None
        self._cache.reserve(len(self._rows) + 1, row.columns, used=len(self._rows))
        index = next(i for i, other in enumerate(self._rows) if other is row)
        self._cache.copy_row(index, len(self._rows), columns=row.columns)
        copied = Row(columns=row.columns, prefix=row.prefix, made=1)
        copied.branches[target] = Branch(number=1, length=row.branches[source].length)
        self._rows.append(copied)
        self._row_of[target] = copied

    def free(self, branches: Sequence[int]) -> None:
        for branch in branches:
            row = self._row_of.pop(branch, None)
            if row is not None:
                del row.branches[branch]
        self._drop_empty_rows()
        self._layout = None

    def _drop_empty_rows(self) -> None:
        """Keep the rows in use together at the front of the cache; with none left, give its memory back."""
        i = 0
        while i < len(self._rows):
            if self._rows[i].branches:
                i += 1
                continue
            last = self._rows.pop()
            if i < len(self._rows):
                self._cache.copy_row(len(self._rows), i, columns=last.columns)
                self._rows[i] = last
        if not self._rows:
            self._cache.clear()

    def _read(self, index: int, group: Group, members: Sequence[int], branches: Sequence[int]) -> Tensor:
        """Read a row's tokens that are not in the cache yet; returns the logits after each member's last token."""
        row = self._rows[index]
        device = self._embedding.device
        prefix_length = len(group.prefix_ids)
        suffixes = [group.suffix_ids[m] for m in members]
        start = row.columns  # tokens of the prefix that are there already
        ids = torch.cat([group.prefix_ids[start:], *suffixes])
        # A row that got the whole prefix as a copy of another row's has its pictures in it.
        copied = start == prefix_length and len(group.suffix_ids) > 1
        features = None if copied else group.image_features
        embeddings = self._model.embed(ids[None], features)[0]  # (N, D)
        owner: list[int] = [PREFIX] * (prefix_length - start)
        positions: list[int] = list(range(start, prefix_length))
        ends = []
        for branch, suffix in zip(branches, suffixes, strict=True):
            row.made += 1
            row.branches[branch] = Branch(number=row.made, length=prefix_length + len(suffix))
            self._row_of[branch] = row
            owner += [row.made] * len(suffix)
            positions += range(prefix_length, prefix_length + len(suffix))
            ends.append(len(owner) - 1)
        end = start + len(owner)
        row.columns = end
        self._cache.owner[index, start:end] = torch.tensor(owner, dtype=torch.int32, device=device)
        mask = None
        if start > 0 or len(members) > 1:
            owners = self._cache.owner[index, :end]
            query_owner = owners[start:, None]
            columns = torch.arange(end, device=device)
            mask = ((owners == PREFIX) | (owners == query_owner)) & (columns <= columns[start:, None])  # (N, T)
        flat = index * self._cache.columns + torch.arange(start, end, device=device)
        hidden = self._run(
            embeddings,
            self._rotation(torch.tensor(positions, device=device), max(positions) + 1),
            flat,
            partial(self._attend_row, index * self._cache.columns, end, mask),
            keep=torch.tensor(ends, device=device),
        )
        return self._head(hidden)

    def _run(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        flat: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        keep: Tensor | None = None,
    ) -> Tensor:
        """All layers over N tokens. hidden: (N, D); rotation: `_rotation` of them; flat: (N,) places in the cache.

        attend: queries (N, heads, head_dim), the layer's keys and values in the cache (rows * columns, kv_heads,
        head_dim) -> (N, heads * head_dim).
        keep: the tokens whose hidden states are wanted, all when None. Returns them after the final norm.
        """
        cos, sin = rotation
        rotated_heads = self._heads + self._kv_heads
        by_head = (hidden.shape[0], rotated_heads + self._kv_heads, self._head_dim)
        parts, rotated_parts = (rotated_heads, self._kv_heads), (self._heads, self._kv_heads)
        half = self._head_dim // 2
        split = torch.split_with_sizes
        for layer, (all_keys, all_values) in zip(self._layers, self._cache.flat, strict=True):
            joined = layer.queries_keys_values(layer.input_norm(hidden)).view(by_head)
            straight, values = split(joined, parts, 1)
            rotated = torch.addcmul(straight * cos, straight.roll(half, -1), sin)
            queries, keys = split(rotated, rotated_parts, 1)
            all_keys.index_copy_(0, flat, keys)
            all_values.index_copy_(0, flat, values)
            hidden = layer.add_output(hidden, attend(queries, all_keys, all_values))
            gate, up = layer.gate_and_up(layer.feed_forward_norm(hidden)).chunk(2, dim=-1)
            hidden = layer.add_down(hidden, layer.activation(gate) * up)
        if keep is not None:
            hidden = hidden[keep]
        return F.rms_norm(hidden, (hidden.shape[1],), self._norm, self._eps)

    def _attend_row(
        self, first: int, num_columns: int, mask: Tensor | None, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Attention of N new tokens of one row over its columns; without a mask the tokens are all of it, in order."""
        keys = keys[first : first + num_columns].transpose(0, 1)  # (kv_heads, T, head_dim)
        values = values[first : first + num_columns].transpose(0, 1)
        out = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self._grouped,
        )
        return out[0].transpose(0, 1).reshape(queries.shape[0], -1)

    def _attend_step(
        self,
        layout: Layout,
        mask: Tensor | None,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Attention of one new token for each branch. queries: (N, heads, head_dim); size, stride: `_views`."""
        keys, values = keys.as_strided(size, stride), values.as_strided(size, stride)  # (R, kv_heads, T, head_dim)
        rows, per_row = layout.query_owner.shape
        if layout.slots is not None:
            queries = queries.new_zeros(rows * per_row, *queries.shape[1:]).index_copy_(0, layout.slots, queries)
        queries = queries.view(rows, per_row, self._heads, self._head_dim).transpose(1, 2)  # (R, heads, Q, head_dim)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=self._grouped)
        out = out.transpose(1, 2).reshape(rows * per_row, -1)
        return out if layout.slots is None else out[layout.slots]

    def _views(self, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Size and stride that show a flat cache as (R, kv_heads, T, head_dim) for the rows of a step."""
        width = self._kv_heads * self._head_dim
        size = (layout.query_owner.shape[0], self._kv_heads, layout.longest_columns, self._head_dim)
        return size, (self._cache.columns * width, self._head_dim, width, 1)

    def _step_mask(self, layout: Layout) -> Tensor:
        """(R, 1, Q, T) bool, True where a query may attend."""
        owner = self._cache.owner[: len(self._rows), None, : layout.longest_columns]  # (R, 1, T)
        mask = (owner == PREFIX) | (owner == layout.query_owner[:, :, None])  # (R, Q, T)
        # A query that stands for nobody sees the first column: a softmax over nothing would be NaN.
        mask[:, :, 0] |= layout.query_owner == NO_QUERY
        return mask[:, None]

    def _lay_out(self, branches: Sequence[int]) -> Layout:
        index_of = {id(row): i for i, row in enumerate(self._rows)}
        counts = [0] * len(self._rows)
        states, indices, ranks, columns = [], [], [], []
        for branch in branches:
            row = self._row_of[branch]
            index = index_of[id(row)]
            states.append((row, row.branches[branch]))
            indices.append(index)
            ranks.append(counts[index])
            columns.append(row.columns + counts[index])
            counts[index] += 1
        for index, row in enumerate(self._rows):
            if row.made == 1:
                # Steps without a mask did not write down whose columns they filled.
                self._cache.owner[index, : row.columns] = 1
        per_row = max(counts)
        query_owner = torch.full((len(counts), per_row), NO_QUERY, dtype=torch.int32)
        for (_, state), index, rank in zip(states, indices, ranks, strict=True):
            query_owner[index, rank] = state.number
        slots = [index * per_row + rank for index, rank in zip(indices, ranks, strict=True)]
        longest = max(columns) + 1
        # One branch a row, all rows equally long and all of them moving: every column is its row's branch's own.
        same = all(row.made == 1 and row.columns + 1 == longest for row in self._rows) and min(counts) == 1
        device = self.device
        return Layout(
            branches=tuple(branches),
            states=states,
            rows=torch.tensor(indices, device=device),
            owner=torch.tensor([state.number for _, state in states], dtype=torch.int32, device=device),
            positions=torch.tensor([state.length for _, state in states], device=device),
            columns=torch.tensor(columns, device=device),
            stride=torch.tensor([counts[index] for index in indices], device=device),
            query_owner=query_owner.to(device),
            slots=None if slots == list(range(len(counts) * per_row)) else torch.tensor(slots, device=device),
            needs_mask=not same,
            longest_position=max(state.length for _, state in states),
            longest_columns=max(row.columns + count for row, count in zip(self._rows, counts, strict=True)),
        )

    def _rotation(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin of positions (N,), all below length: (N, 1, head_dim) each, from the model's own code.

        The model computes x * cos + (-x2, x1) * sin for the halves (x1, x2) of x; with the sign in the table that is
        x * cos + (x2, x1) * sin.
        """
        if self._table is None or self._table.shape[0] < length:
            every = torch.arange(max(256, 2 * length), device=self.device)[None]
            cos, sin = self._rotary(self._embedding[:1, None], every)  # (1, L, head_dim) each
            half = self._head_dim // 2
            sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            self._table = torch.stack([cos[0], sin[0]], dim=1)[:, :, None]  # (L, 2, 1, head_dim)
        cos, sin = self._table.index_select(0, positions).unbind(1)
        return cos, sin
