"""Scenes as a language model without eyes gets them: as text, or as a grid of symbols; and rows of questions on them.

A row is one context followed by many turns that all see it and do not see each other (a tree with one branch a turn),
in the layout of the `llava_hf` template: `USER: {scene}\\nQUESTION ASSISTANT: ANSWER</s>`. Where a picture would stand
there is the scene's text, or 64 places for the grid.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llava.data.scene_turns import KINDS, Turn, ask, write_box
from llava.data.scenes import COLOURS, PICTURE_SIDE, REGIONS, SHAPES, Scene, draw_masks
from llava.quickstart.tokenizer_building import SPECIALS

FORMATS = ("names", "places", "boxes", "bare_boxes", "grid")
GRID = 8
_NAME_KINDS = ("existence", "colour", "shape", "count", "count_all", "multiple_choice", "caption")
_PLACE_KINDS = (*_NAME_KINDS, "size", "region", "relation", "detail")
# long answers own a token-mean loss, and what is learnt last needs the most turns
KIND_WEIGHTS = {
    "existence": 1.2, "colour": 1.0, "shape": 1.0, "size": 0.9, "count": 1.2, "count_all": 0.4, "region": 1.0,
    "relation": 2.0, "multiple_choice": 2.2, "box": 1.6, "refer": 1.6, "caption": 0.35, "detail": 0.3,
}  # fmt: skip
# once the easy kinds are known, most turns go to those that take two or three look-ups
LATE_KIND_WEIGHTS = {
    "existence": 0.6, "colour": 0.4, "shape": 0.4, "size": 1.0, "count": 1.3, "count_all": 0.2, "region": 1.2,
    "relation": 1.6, "multiple_choice": 3.2, "box": 2.6, "refer": 2.6, "caption": 0.25, "detail": 0.3,
}  # fmt: skip
SECOND_ROUND_WEIGHTS = {
    "existence": 0.4, "colour": 0.3, "shape": 0.3, "size": 0.5, "count": 1.5, "count_all": 0.3, "region": 1.5,
    "relation": 1.0, "multiple_choice": 4.0, "box": 1.2, "refer": 5.0, "caption": 0.3, "detail": 0.3,
}  # fmt: skip
_SECOND_TURN_SHARE = 0.08
_FREQUENCIES = (0.5, 1.0, 2.0, 4.0)
NUM_GRID_FEATURES = 1 + len(SHAPES) + len(COLOURS) + 4 * 2 * len(_FREQUENCIES)


@dataclass(frozen=True)
class Row:
    """One context and its turns, T tokens.

    branch_ids: 0 in the context, 1.. in the turns, so that turn i sees branches 0 and i; position_ids go on from the
    context in every turn; labels: the token itself inside answers (the closing </s> included), else -100.
    grid: (64, NUM_GRID_FEATURES) and where in the row it stands, or None.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    branch_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    kinds: tuple[str, ...]
    grid: NDArray[np.float32] | None = None
    grid_start: int = 0


class RowWriter:
    """Turns scenes into rows with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos = SPECIALS.index("<s>"), SPECIALS.index("</s>")
        self._head = self.encode("USER: ")

    def encode(self, text: str) -> list[int]:
        """Ids of a text by itself, as the template's pieces between special tokens are encoded."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def write_row(
        self,
        scene: Scene,
        form: str,
        rng: random.Random,
        *,
        max_tokens: int,
        kind_weights: dict[str, float] = KIND_WEIGHTS,
    ) -> Row:
        """Fill a row with turns, kinds drawn by weight, until no further one fits."""
        kinds = list_kinds(form)
        if kind_weights is SECOND_ROUND_WEIGHTS and form == "bare_boxes":
            kinds = (*_NAME_KINDS, "box", "refer")
        weights = [kind_weights[kind] for kind in kinds]
        turns: list[Turn] = []
        context, listed = self._write_context(scene, form, rng)
        left = max_tokens - len(context)
        pieces: list[tuple[list[int], list[int]]] = []
        for _ in range(200):
            turn = ask_of(listed, rng.choices(kinds, weights)[0], form, rng)
            if turn is None:
                continue
            ids, labels = self._write_turn(turn)
            if rng.random() < _SECOND_TURN_SHARE:
                second = ask_of(listed, rng.choices(kinds, weights)[0], form, rng)
                if second is not None:
                    more, more_labels = self._write_turn(second, first=False)
                    ids, labels = ids + more, labels + more_labels
            if len(ids) > left:
                break
            left -= len(ids)
            turns.append(turn)
            pieces.append((ids, labels))
        return self._join(scene, form, context, turns, pieces)

    def write_turns(self, scene: Scene, form: str, turns: list[Turn], rng: random.Random) -> Row:
        """A row of exactly these turns."""
        context, _ = self._write_context(scene, form, rng)
        return self._join(scene, form, context, turns, [self._write_turn(turn) for turn in turns])

    def _write_context(self, scene: Scene, form: str, rng: random.Random) -> tuple[list[int], Scene]:
        """The context's ids and the scene with its objects in the order of telling (captions follow it)."""
        if form == "grid":
            return [self.bos, *self._head, *([0] * GRID * GRID)], scene
        listed = Scene(tuple(rng.sample(scene.objects, len(scene.objects))), scene.background)
        return [self.bos, *self.encode("USER: " + write_scene(listed, form))], listed

    def _write_turn(self, turn: Turn, *, first: bool = True) -> tuple[list[int], list[int]]:
        question = self.encode(("\n" if first else "USER: ") + turn.question + " ASSISTANT:")
        answer = self.encode(turn.answer)
        return [*question, *answer, self.eos], [*([-100] * len(question)), *answer, self.eos]

    def _join(
        self,
        scene: Scene,
        form: str,
        context: list[int],
        turns: list[Turn],
        pieces: list[tuple[list[int], list[int]]],
    ) -> Row:
        ids, labels, branches = list(context), [-100] * len(context), [0] * len(context)
        positions = list(range(len(context)))
        weights = [0.0] * len(context)
        for number, (turn_ids, turn_labels) in enumerate(pieces, start=1):
            ids += turn_ids
            labels += turn_labels
            weights += [sum(label != -100 for label in turn_labels) ** -0.5] * len(turn_ids)
            branches += [number] * len(turn_ids)
            positions += range(len(context), len(context) + len(turn_ids))
        return Row(
            input_ids=np.array(ids, dtype=np.int64),
            position_ids=np.array(positions, dtype=np.int64),
            branch_ids=np.array(branches, dtype=np.int64),
            labels=np.array(labels, dtype=np.int64),
            weights=np.array(weights, dtype=np.float32),
            kinds=tuple(turn.kind for turn in turns),
            grid=write_grid(scene) if form == "grid" else None,
            grid_start=1 + len(self._head),
        )


def write_scene(scene: Scene, form: str) -> str:
    """The objects one after the other, a sentence each.

    names: "red circle."; places: "small red circle top left."; boxes: that and the box; bare_boxes: name and box,
    from which size and place have to be read.
    """
    told = []
    for item in scene.objects:
        if form == "names":
            told.append(item.name)
        elif form == "bare_boxes":
            told.append(f"{item.name} {write_box(item.box)}")
        else:
            told.append(f"{item.size} {item.name} {item.region}")
            if form == "boxes":
                told[-1] += " " + write_box(item.box)
    return ". ".join(told) + "."


def write_grid(scene: Scene) -> NDArray[np.float32]:
    """The scene as an 8 x 8 grid of symbols without pixels: (64, NUM_GRID_FEATURES).

    Each place says how much of it an object covers, that object's shape and colour as one-hots, and its box in waves.
    """
    mask = np.asarray(draw_masks(scene, side=PICTURE_SIDE))
    cell = PICTURE_SIDE // GRID
    cells = mask.reshape(GRID, cell, GRID, cell)
    grid = np.zeros((GRID * GRID, NUM_GRID_FEATURES), dtype=np.float32)
    for number, item in enumerate(scene.objects, start=1):
        cover = (cells == number).mean(axis=(1, 3)).ravel().astype(np.float32)
        features = np.zeros(NUM_GRID_FEATURES, dtype=np.float32)
        features[0] = 1.0
        features[1 + SHAPES.index(item.shape)] = 1.0
        features[1 + len(SHAPES) + COLOURS.index(item.colour)] = 1.0
        angles = (
            np.pi * np.outer(np.array(item.box, dtype=np.float32), np.array(_FREQUENCIES, dtype=np.float32)).ravel()
        )
        features[1 + len(SHAPES) + len(COLOURS) :] = np.concatenate([np.sin(angles), np.cos(angles)])
        seen = np.minimum(cover / 0.25, 1.0)[:, None]
        grid = grid * (1 - seen) + seen * features
    return grid


def list_kinds(form: str) -> tuple[str, ...]:
    """The kinds that a form of context can answer."""
    return _NAME_KINDS if form == "names" else _PLACE_KINDS if form == "places" else KINDS


def ask_of(scene: Scene, kind: str, form: str, rng: random.Random) -> Turn | None:
    """A turn that this form of context can answer."""
    turn = ask(scene, kind, rng)
    if turn is None or (form == "names" and turn.about == "region"):
        return None
    if form == "places" and kind == "relation" and not _regions_tell(scene, turn):
        return None
    return turn


def _regions_tell(scene: Scene, turn: Turn) -> bool:
    """Whether two objects' regions alone answer a relation: asked of scenes of two, in different rows or columns."""
    if len(scene.objects) != 2:
        return False
    first, second = (REGIONS.index(item.region) for item in scene.objects)
    upright = turn.answer in ("above", "below", "higher", "lower")
    return first // 3 != second // 3 if upright else first % 3 != second % 3
