"""Does the assistant see? Held-out questions by kind, each beside three controls that a blind or shallow model passes.

    wrong picture   the same question asked of another scene's picture: what the words alone give away
    majority        the most frequent answer of the kind: what no picture and no question give
    no binding      the answer made from a random object of the true scene: what a model reaches that sees which
                    colours and shapes are there but not whose they are

A model that sees must lie well above all three. Answers are scored by `llava.data.scene_turns.score`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from PIL import Image

from llava.data.scene_turns import KINDS, Turn, ask, score
from llava.data.scenes import Scene, draw_scene, render

_NOISE_SEEDS = 1 << 40  # far from every seed that a training picture's noise has

# Answers questions about pictures, in order: ((picture, question), ...) -> (answer, ...). Greedy, one turn each.
Answerer = Callable[[Sequence[tuple[Image.Image, str]]], list[str]]


@dataclass(frozen=True)
class Asked:
    """One held-out question, with what the model said of the right and of a wrong picture."""

    scene: int
    turn: Turn
    answer: str
    wrong_picture_answer: str

    @property
    def score(self) -> float:
        """0 to 1: exact match, or IoU > .5 for a box, or F1 for captions."""
        return score(self.turn, self.answer)


@dataclass(frozen=True)
class KindAccuracy:
    """Mean scores of one kind, 0 to 1; no_binding is None for kinds that need no look-up."""

    model: float
    wrong_picture: float
    no_binding: float | None
    majority: float
    questions: int

    @property
    def best_control(self) -> float:
        """The highest of the controls: what the model has to beat."""
        return max(self.wrong_picture, self.majority, self.no_binding or 0.0)


@dataclass(frozen=True)
class Measurement:
    """What a model answered about held-out scenes."""

    scenes: tuple[Scene, ...]
    pictures: tuple[Image.Image, ...]
    asked: tuple[Asked, ...]

    def accuracy(self) -> dict[str, KindAccuracy]:
        """Every kind's accuracy beside its controls, in the order of KINDS."""
        return {kind: _kind_accuracy([one for one in self.asked if one.turn.kind == kind]) for kind in KINDS}


def measure(answer: Answerer, *, seed: int, num_scenes: int) -> Measurement:
    """Ask one question of every kind about each of `num_scenes` scenes that no training seed draws.

    A kind that a scene cannot pose (a relation of one object, say) is skipped for it. Two calls of `answer` are made:
    with each question's own picture, and with the picture of the scene half the list away.
    """
    scenes = tuple(draw_scene(random.Random(f"held-out scene {seed} {index}")) for index in range(num_scenes))
    pictures = tuple(
        Image.fromarray(render(scene, noise_seed=_NOISE_SEEDS + index)) for index, scene in enumerate(scenes)
    )
    turns: list[tuple[int, Turn]] = []
    for index, scene in enumerate(scenes):
        rng = random.Random(f"held-out questions {seed} {index}")
        for kind in KINDS:
            turn = ask(scene, kind, rng)
            if turn is not None:
                turns.append((index, turn))
    right = answer([(pictures[index], turn.question) for index, turn in turns])
    other = num_scenes // 2
    wrong = answer([(pictures[(index + other) % num_scenes], turn.question) for index, turn in turns])
    asked = tuple(
        Asked(index, turn, said, said_wrong)
        for (index, turn), said, said_wrong in zip(turns, right, wrong, strict=True)
    )
    return Measurement(scenes, pictures, asked)


def _kind_accuracy(asked: Sequence[Asked]) -> KindAccuracy:
    if not asked:
        raise ValueError("no question of this kind was asked; ask about more scenes")
    majority_answer, _ = Counter(one.turn.answer for one in asked).most_common(1)[0]
    no_binding = [
        score(one.turn, one.turn.no_binding_answer) for one in asked if one.turn.no_binding_answer is not None
    ]
    return KindAccuracy(
        model=fmean(one.score for one in asked),
        wrong_picture=fmean(score(one.turn, one.wrong_picture_answer) for one in asked),
        no_binding=fmean(no_binding) if no_binding else None,
        majority=fmean(score(one.turn, majority_answer) for one in asked),
        questions=len(asked),
    )
