"""Questions about drawn scenes: true answers, fair controls, and how answers are marked."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from llava.data.scene_scores import overlap, parse_box, score_answer
from llava.data.scene_turns import KINDS, Turn, ask, ask_many, score
from llava.data.scenes import COLOURS, SHAPES, Scene, draw_scene


@pytest.fixture(scope="module")
def asked() -> dict[str, list[tuple[Scene, Turn]]]:
    rng = random.Random("turns under test")
    turns: dict[str, list[tuple[Scene, Turn]]] = defaultdict(list)
    for _ in range(400):
        scene = draw_scene(rng)
        for kind in KINDS:
            turn = ask(scene, kind, rng)
            if turn is not None:
                turns[kind].append((scene, turn))
    return turns


def test_there_are_thirteen_kinds_and_each_is_asked_in_several_wordings(
    asked: dict[str, list[tuple[Scene, Turn]]],
) -> None:
    assert len(KINDS) == 13
    for kind in KINDS:
        wordings = {re.sub(rf"\[.*|\n.*|{'|'.join(COLOURS + SHAPES)}", "", turn.question) for _, turn in asked[kind]}
        assert len(wordings) >= 4, kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_answerer_scores_one(kind: str, asked: dict[str, list[tuple[Scene, Turn]]]) -> None:
    assert len(asked[kind]) > 100
    assert all(turn.kind == kind and score(turn, turn.answer) == 1.0 for _, turn in asked[kind])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("count", "count_all")])
def test_the_no_binding_control_is_far_from_perfect(kind: str, asked: dict[str, list[tuple[Scene, Turn]]]) -> None:
    pairs = [(scene, turn) for scene, turn in asked[kind] if turn.no_binding_answer is not None]
    assert len(pairs) > 80
    assert all(len(scene.objects) > 1 for scene, _ in pairs)
    control = sum(score(turn, turn.no_binding_answer or "") for _, turn in pairs) / len(pairs)
    assert control < (0.9 if kind in ("existence", "caption") else 0.65)


@pytest.mark.parametrize("kind", ["colour", "shape", "size", "region", "relation", "multiple_choice", "box", "refer"])
def test_a_kind_that_needs_a_look_up_is_not_asked_of_one_object(kind: str) -> None:
    rng = random.Random(1)
    assert all(ask(draw_scene(rng, num_objects=1), kind, rng) is None for _ in range(40))


def test_answers_are_spread_so_that_the_most_frequent_one_says_little(
    asked: dict[str, list[tuple[Scene, Turn]]],
) -> None:
    for kind, most in {"existence": 0.6, "colour": 0.3, "shape": 0.35, "size": 0.62, "count": 0.55, "region": 0.35,
                       "relation": 0.4, "multiple_choice": 0.4}.items():  # fmt: skip
        answers = Counter(turn.answer for _, turn in asked[kind])
        assert answers.most_common(1)[0][1] < most * answers.total(), (kind, answers)


def test_existence_answers_are_true_and_many_wrong_names_mix_what_is_there() -> None:
    rng = random.Random("existence")
    mixed = absent = 0
    for _ in range(600):
        scene = draw_scene(rng, num_objects=rng.randint(2, 4))
        turn = ask(scene, "existence", rng)
        assert turn is not None
        colour, shape = turn.question.rstrip("?").split()[-2:]
        if colour not in COLOURS or shape not in SHAPES:
            continue
        there = any(item.name == f"{colour} {shape}" for item in scene.objects)
        assert turn.answer == ("yes" if there else "no"), turn
        if not there:
            both = any(i.colour == colour for i in scene.objects) and any(i.shape == shape for i in scene.objects)
            mixed += both
            absent += not both
    assert 0.25 < mixed / (mixed + absent) < 0.65


def test_the_right_letter_stands_before_the_right_option(asked: dict[str, list[tuple[Scene, Turn]]]) -> None:
    for scene, turn in asked["multiple_choice"]:
        options = dict(part.split(". ", 1) for part in _split_options(turn.question))
        assert set(options) == {"A", "B", "C", "D"}
        assert len(set(options.values())) == 4
        present = {item.colour for item in scene.objects} | {item.shape for item in scene.objects}
        assert turn.about == "region" or options[turn.answer] in present


def test_many_turns_of_a_scene_are_all_different_and_follow_their_weights() -> None:
    rng = random.Random(2)
    turns = ask_many(draw_scene(rng, num_objects=4), 12, rng)
    assert len({turn.question for turn in turns}) == 12
    only = ask_many(draw_scene(rng, num_objects=4), 3, rng, weights={"count_all": 1.0})
    assert {turn.kind for turn in only} == {"count_all"}


@pytest.mark.parametrize(
    ("kind", "expected", "text", "mark"),
    [
        ("colour", "red", " Red. ", 1.0),
        ("colour", "red", "red circle", 0.0),
        ("region", "top left", "top", 0.0),
        ("box", "[0.10, 0.10, 0.50, 0.50]", "It is [0.12, 0.10, 0.50, 0.52].", 1.0),
        ("box", "[0.10, 0.10, 0.50, 0.50]", "[0.60, 0.10, 0.90, 0.50]", 0.0),
        ("box", "[0.10, 0.10, 0.50, 0.50]", "in the middle", 0.0),
        ("caption", "A red circle and a blue star.", "A blue star.", 2 / 3),
        ("caption", "A red circle and a blue star.", "A blue circle and a red star.", 0.0),
        ("caption", "A red circle.", "", 0.0),
        ("detail", "A small red circle at the top.", "a small red circle at the top left", 0.0),
        ("detail", "A small red circle at the top.", "There is a small red circle at the top.", 1.0),
    ],
)
def test_answers_are_marked_by_kind(kind: str, expected: str, text: str, mark: float) -> None:
    assert score_answer(kind, expected, text) == pytest.approx(mark)


def test_a_box_is_read_from_text_and_overlaps_itself() -> None:
    box = parse_box("see [.1, 0.2, 0.55, 1]")
    assert box == (0.1, 0.2, 0.55, 1.0)
    assert overlap(box, box) == pytest.approx(1.0)
    assert overlap(box, None) == overlap(box, (0.9, 0.9, 0.8, 0.8)) == 0.0


def _split_options(question: str) -> list[str]:
    start = question.index("A. ")
    end = question.index("Answer with")
    written = question[start:end].strip()
    parts = [written.index(f"{letter}. ") for letter in "ABCD"] + [len(written)]
    return [written[one:two].strip() for one, two in pairwise(parts)]
