"""Rows of trees as the tensors of one forward pass, and the mask that keeps branches apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llava.data.packing import Tree, number_pictures
from llava.model.tree_attention import TreeLayout
from llava.prompt.processor import IGNORE_LABEL

PADDING_TREE = -1


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of T tokens holding trees; N tiles in all.

    input_ids, position_ids, labels: (B, T); the label at t is the token at t inside answers, else IGNORE_LABEL.
    tree_ids: (B, T), which tree of the row a token belongs to, PADDING_TREE in padding.
    branch_ids: (B, T), 0 in a tree's prefix, then 1, 2, ... for its branches.
    predictors: (A,) flat positions (row * T + t) whose hidden state predicts an answer token; targets: (A,) that token.
        The first token of a branch is predicted by its prefix's last token, every other one by its left neighbour.
    read: the predictors, each once, ascending: the only positions whose last hidden state matters.
    layout: where prefixes and branches lie, for llava.model.tree_attention; says the same as the ids and the mask.
    pixel_values: (N, 3, H, W), each distinct picture's tiles once, in the order in which they first come; image_sizes,
        tiles_per_image: one entry a distinct picture. picture_of: for each picture in reading order, which of them.
    picture_numbers: one a distinct picture, equal for equal pictures in all batches of a step; picture_keys: sha256 of
        each one's pixels and size, when they were asked for.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    tree_ids: Tensor
    branch_ids: Tensor
    predictors: Tensor
    targets: Tensor
    read: Tensor
    layout: TreeLayout
    pixel_values: Tensor | None
    image_sizes: tuple[tuple[int, int], ...]
    tiles_per_image: tuple[int, ...]
    num_conversations: int
    picture_of: tuple[int, ...] = ()
    picture_numbers: tuple[int, ...] = ()
    picture_keys: tuple[str, ...] = ()

    @property
    def num_answer_tokens(self) -> int:
        return len(self.targets)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.tree_ids != PADDING_TREE).sum())

    def attention_mask(self) -> Tensor:
        """(B, 1, T, T) bool, True where the query (third axis) may see the key (fourth axis).

        A token sees its tree's prefix and its own branch, up to itself. Padding sees earlier padding only, so that no
        row of the softmax is empty. Never replaced by None: transformers would guess packing from the positions, and
        branches would lose their picture (a 44 % wrong gradient at 0.15 % of the loss).
        """
        trees, branches = self.tree_ids, self.branch_ids
        length = trees.shape[1]
        # One number a token: equal for tokens of one branch, so that one comparison settles tree and branch together.
        branch_key = trees * (int(branches.max()) + 1) + branches
        prefix_key = trees.masked_fill(branches != 0, PADDING_TREE - 1)  # matches no query's tree unless in a prefix
        mask = branch_key.unsqueeze(2) == branch_key.unsqueeze(1)  # (B, T, T)
        mask |= trees.unsqueeze(2) == prefix_key.unsqueeze(1)
        mask &= torch.ones(length, length, dtype=torch.bool, device=trees.device).tril()
        return mask.unsqueeze(1)  # (B, 1, T, T)

    def padding_mask(self) -> Tensor:
        """(B, T) 1 at real tokens: all that a row of one conversation needs."""
        return (self.tree_ids != PADDING_TREE).long()

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved, layout=self.layout.to(device))


def build_batch(rows: Sequence[Sequence[Tree]], *, pad_token_id: int, multiple: int = 8, keyed: bool = False) -> Batch:
    """Write rows of trees into arrays; T is the longest row, rounded up to `multiple` (fewer shapes).

    keyed: with `picture_keys`, a millisecond a tile of 336 pixels.
    """
    longest = max(sum(tree.num_tokens for tree in row) for row in rows)
    length = -(-longest // multiple) * multiple
    shape = (len(rows), length)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORE_LABEL, dtype=np.int64)
    tree_ids = np.full(shape, PADDING_TREE, dtype=np.int64)
    branch_ids = np.zeros(shape, dtype=np.int64)
    predictors = np.full(shape, -1, dtype=np.int64)
    for row_number, row in enumerate(rows):
        cursor = 0
        for tree_number, tree in enumerate(row):
            stop = cursor + tree.num_tokens
            tree_ids[row_number, cursor:stop] = tree_number
            prefix = len(tree.prefix_ids)
            input_ids[row_number, cursor : cursor + prefix] = tree.prefix_ids
            position_ids[row_number, cursor : cursor + prefix] = np.arange(prefix)
            last_of_prefix = cursor + prefix - 1 if prefix else -1
            cursor += prefix
            for branch_number, branch in enumerate(tree.branches, start=1):
                here = slice(cursor, cursor + len(branch.input_ids))
                input_ids[row_number, here] = branch.input_ids
                position_ids[row_number, here] = np.arange(prefix, prefix + len(branch.input_ids))
                labels[row_number, here] = branch.labels
                branch_ids[row_number, here] = branch_number
                predictors[row_number, here] = np.arange(here.start - 1, here.stop - 1)
                predictors[row_number, cursor] = last_of_prefix
                cursor = here.stop
        # What pads a row is one more tree, with positions of its own.
        position_ids[row_number, cursor:] = np.arange(length - cursor)
    supervised = labels != IGNORE_LABEL
    # The very first token of a sequence has nothing before it to be predicted from.
    assert not (supervised & (predictors < 0)).any(), "a first token is supervised"
    flat_predictors = predictors + np.arange(len(rows), dtype=np.int64)[:, None] * length
    trees = [tree for row in rows for tree in row]
    pictures = _collect_pictures(trees)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        labels=torch.from_numpy(labels),
        tree_ids=torch.from_numpy(tree_ids),
        branch_ids=torch.from_numpy(branch_ids),
        predictors=torch.from_numpy(flat_predictors[supervised]),
        targets=torch.from_numpy(labels[supervised]),
        read=torch.from_numpy(np.unique(flat_predictors[supervised])),
        layout=TreeLayout.from_ids(tree_ids, branch_ids),
        pixel_values=torch.from_numpy(np.concatenate(pictures.tiles)) if pictures.tiles else None,
        image_sizes=tuple(pictures.sizes),
        tiles_per_image=tuple(len(tiles) for tiles in pictures.tiles),
        num_conversations=sum(len(tree.branches) for tree in trees),
        picture_of=tuple(pictures.places),
        picture_numbers=tuple(pictures.numbers),
        picture_keys=tuple(map(_key_of, pictures.tiles, pictures.sizes)) if keyed else (),
    )


@dataclass(frozen=True)
class _Pictures:
    """Distinct pictures, and for each picture in reading order its place among them."""

    tiles: list[NDArray[np.float32]]
    sizes: list[tuple[int, int]]
    numbers: list[int]
    places: list[int]


def _collect_pictures(trees: Sequence[Tree]) -> _Pictures:
    found = _Pictures([], [], [], [])
    if any(tree.picture_numbers is None for tree in trees):
        trees = number_pictures(trees)
    place_of: dict[int, int] = {}
    for tree in trees:
        assert tree.picture_numbers is not None
        for tiles, size, number in zip(tree.pictures, tree.image_sizes, tree.picture_numbers, strict=True):
            if number not in place_of:
                place_of[number] = len(found.tiles)
                found.tiles.append(tiles)
                found.sizes.append(size)
                found.numbers.append(number)
            found.places.append(place_of[number])
    return found


def _key_of(tiles: NDArray[np.float32], size: tuple[int, int]) -> str:
    digest = hashlib.sha256(f"{size} {tiles.shape}".encode())
    digest.update(np.ascontiguousarray(tiles).data)
    return digest.hexdigest()
