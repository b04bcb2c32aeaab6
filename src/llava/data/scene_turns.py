"""Questions and answers about a drawn scene, in thirteen kinds, each in several wordings.

`ask(scene, kind, rng)` makes one turn; `score(turn, text)` marks an answer between 0 and 1. Every kind that needs a
look-up ("whose colour is it?") also carries the answer of the **no-binding control**: what somebody would say who sees
all that is in the picture but takes it from a random object. Such kinds are only asked where there are at least two
objects to confuse, so that the control can be wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from llava.data.scene_scores import score_answer
from llava.data.scenes import COLOURS, MAX_OBJECTS, REGIONS, SHAPES, SIZES, Box, Scene, SceneObject

KINDS = (
    "existence", "colour", "shape", "size", "count", "count_all", "region", "relation", "multiple_choice", "box",
    "refer", "caption", "detail",
)  # fmt: skip
LETTERS = ("A", "B", "C", "D")
_MIN_APART = 0.12  # of the side: nearer than this two objects are neither left nor right of each other

_EXISTENCE = (
    "Is there a {}?", "Is there a {} in the picture?", "Can you see a {}?", "Does the picture show a {}?",
    "Do you see a {} in the image?", "Is a {} in the photo?",
)  # fmt: skip
_EXISTENCE_COLOUR = (
    "Is there anything {}?",
    "Is there a {} object?",
    "Can you see anything {}?",
    "Do you see a {} shape?",
)
_COLOURED = ("Is the {} {}?", "Is the color of the {} {}?", "Does the {} look {}?")
_COLOUR = (
    "What color is the {}?", "What colour is the {}?", "What is the color of the {}?", "Which color does the {} have?",
    "Tell me the color of the {}.",
)  # fmt: skip
_SHAPE = (
    "What shape is the {} object?", "Which shape is {}?", "What is the {} thing?",
    "What is the shape of the {} object?", "What {} shape is in the picture?",
)  # fmt: skip
_SIZE = (
    "Is the {} small or large?", "What size is the {}?", "How big is the {}?", "Is the {} large or small?",
    "What is the size of the {}?",
)  # fmt: skip
_COUNT = (
    "How many {} are there?", "How many {} are in the picture?", "How many {} can you see?", "Count the {}.",
    "What is the number of {}?",
)  # fmt: skip
_COUNT_ALL = (
    "How many objects are there?", "How many shapes are in the picture?", "How many things can you see?",
    "Count the objects.", "What is the number of objects in the image?",
)  # fmt: skip
_REGION = (
    "Where is the {}?", "Where in the picture is the {}?", "In which part of the image is the {}?",
    "What is the position of the {}?", "Where can you see the {}?",
)  # fmt: skip
_RELATION_ACROSS = (
    "Is the {} to the left or to the right of the {}?", "Is the {} left or right of the {}?",
    "Is the {} to the right or to the left of the {}?", "On which side of the {1} is the {0}, left or right?",
)  # fmt: skip
_RELATION_UPRIGHT = (
    "Is the {} above or below the {}?", "Is the {} below or above the {}?", "Is the {} higher or lower than the {}?",
)  # fmt: skip
_BOX = (
    "Give the box of the {}.", "What is the bounding box of the {}?", "Where is the {}? Give its box.",
    "Locate the {} with a box.", "Give the coordinates of the {}.",
)  # fmt: skip
_REFER = (
    "What is in the box {}?", "What is at {}?", "Which object is at {}?", "Name the object in {}.",
    "What does the box {} show?",
)  # fmt: skip
_CAPTION = (
    "Describe the picture briefly.", "What is in the picture?", "Give a short caption.", "What do you see?",
    "What is in this image?", "Name the objects.",
)  # fmt: skip
_DETAIL = (
    "Describe the picture in detail.", "Give a detailed description.", "Describe the image in detail.",
    "Where is everything and how big is it?",
)  # fmt: skip
_CHOICES = (
    " {} Answer with the letter.", " Choices: {} Answer with the letter.", "\n{}\nAnswer with the letter.",
    "\n{}\nAnswer with the option's letter from the given choices directly.",
)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One question, its answer, and what the no-binding control says (None where nothing has to be looked up)."""

    kind: str
    question: str
    answer: str
    no_binding_answer: str | None = None
    about: str = ""  # of a multiple choice: what it asks for, "colour", "shape" or "region"


def ask(scene: Scene, kind: str, rng: random.Random) -> Turn | None:
    """A turn of this kind about the scene, or None where the scene has nothing to ask it of.

    A kind that needs a look-up wants two objects; "what colour is the circle" wants exactly one circle.
    """
    return _ASKERS[kind](scene, rng)


def ask_many(scene: Scene, count: int, rng: random.Random, *, weights: dict[str, float] | None = None) -> list[Turn]:
    """`count` turns about the scene, no two with the same question; kinds drawn by weight (equal when not given)."""
    turns: list[Turn] = []
    asked: set[str] = set()
    shares = [1.0 if weights is None else weights.get(kind, 0.0) for kind in KINDS]
    for _ in range(20 * count):
        turn = ask(scene, rng.choices(KINDS, shares)[0], rng)
        if turn is not None and turn.question not in asked:
            asked.add(turn.question)
            turns.append(turn)
            if len(turns) == count:
                break
    return turns


def score(turn: Turn, text: str) -> float:
    """How good an answer is, 0 to 1: IoU > .5 for a box, F1 over objects for caption and detail, else exact match."""
    return score_answer(turn.kind, turn.answer, text)


def write_box(box: Box) -> str:
    """`[x1, y1, x2, y2]` with two decimals in 0..1."""
    return "[" + ", ".join(f"{value:.2f}" for value in box) + "]"


def join_names(names: list[str]) -> str:
    """ "a, b and c" of names that each bring their article."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def with_article(name: str) -> str:
    """ "an orange star", "a red circle"."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def _ask_existence(scene: Scene, rng: random.Random) -> Turn:
    wanted = rng.random() < 0.5
    form = rng.random()
    turn: Turn | None
    if form < 0.15:
        turn = _ask_one_property(scene, rng, wanted=wanted)
    elif form < 0.3:
        turn = _ask_whether_coloured(scene, rng, wanted=wanted)
    else:
        turn = _ask_name(scene, rng, wanted=wanted)
    return turn if turn is not None else _ask_name(scene, rng, wanted=wanted)


def _ask_name(scene: Scene, rng: random.Random, *, wanted: bool) -> Turn:
    """A red circle? Half of the wrong names join a colour and a shape that are both there, but not together."""
    names = {item.name for item in scene.objects}
    colours, shapes = sorted({item.colour for item in scene.objects}), sorted({item.shape for item in scene.objects})
    mixed = [f"{c} {s}" for c in colours for s in shapes if f"{c} {s}" not in names]
    blind = True
    if wanted:
        name = rng.choice(scene.objects).name
    elif mixed and rng.random() < 0.5:
        name = rng.choice(mixed)
    else:
        name = rng.choice([f"{c} {s}" for c in COLOURS for s in SHAPES if c not in colours or s not in shapes])
        blind = False
    question = rng.choice(_EXISTENCE).format(name).replace(" a orange", " an orange")
    return Turn("existence", question, _yes(wanted), _yes(blind) if len(scene.objects) > 1 else None)


def _ask_one_property(scene: Scene, rng: random.Random, *, wanted: bool) -> Turn:
    """A circle? Anything red?"""
    read, values, wordings = rng.choice(_PROPERTIES)
    present = {read(item) for item in scene.objects}
    value = rng.choice([one for one in values if (one in present) == wanted])
    return Turn("existence", rng.choice(wordings).format(value).replace(" a orange", " an orange"), _yes(wanted))


def _ask_whether_coloured(scene: Scene, rng: random.Random, *, wanted: bool) -> Turn | None:
    """Is the circle red? A wrong colour is that of another object where there is one."""
    item = _pick_unique(scene, rng, by=lambda one: one.shape)
    if item is None:
        return None
    others = sorted({one.colour for one in scene.objects} - {item.colour})
    blind = bool(others)
    colour = item.colour
    if not wanted:
        blind = blind and rng.random() < 0.8
        colour = rng.choice(others if blind else [c for c in COLOURS if c not in others and c != item.colour])
    question = rng.choice(_COLOURED).format(item.shape, colour)
    return Turn("existence", question, _yes(wanted), _yes(blind or wanted) if others else None)


def _ask_colour(scene: Scene, rng: random.Random) -> Turn | None:
    item = _pick_unique(scene, rng, by=lambda one: one.shape)
    if item is None or len({one.colour for one in scene.objects}) < 2:
        return None
    other = rng.choice(scene.objects)
    return Turn("colour", rng.choice(_COLOUR).format(item.shape), item.colour, other.colour)


def _ask_shape(scene: Scene, rng: random.Random) -> Turn | None:
    item = _pick_unique(scene, rng, by=lambda one: one.colour)
    if item is None or len({one.shape for one in scene.objects}) < 2:
        return None
    other = rng.choice(scene.objects)
    return Turn("shape", rng.choice(_SHAPE).format(item.colour), item.shape, other.shape)


def _ask_size(scene: Scene, rng: random.Random) -> Turn | None:
    if len(scene.objects) < 2:
        return None
    sizes = {size: [item for item in scene.objects if item.size == size] for size in SIZES}
    if not all(sizes.values()) and rng.random() < 0.6:  # scenes of one size hardly test the look-up
        return None
    item, other = rng.choice(sizes[rng.choice([size for size in SIZES if sizes[size]])]), rng.choice(scene.objects)
    return Turn("size", rng.choice(_SIZE).format(_refer_to(scene, item, rng)), item.size, other.size)


def _ask_count(scene: Scene, rng: random.Random) -> Turn | None:
    counts: dict[int, list[str]] = {}
    for shape in SHAPES:
        plural = "crosses" if shape == "cross" else f"{shape}s"
        counts.setdefault(sum(item.shape == shape for item in scene.objects), []).append(plural)
    for colour in COLOURS:
        thing = rng.choice(("objects", "shapes"))
        counts.setdefault(sum(item.colour == colour for item in scene.objects), []).append(f"{colour} {thing}")
    if len(scene.objects) == 1 and rng.random() < 0.7:  # one object can only answer 0 or 1
        return None
    shares = {0: 0.6, 1: 0.8, 2: 2.0, 3: 6.0, 4: 6.0}  # twos are rarer, threes rarest
    count = rng.choices(sorted(counts), [shares[one] for one in sorted(counts)])[0]
    return Turn("count", rng.choice(_COUNT).format(rng.choice(counts[count])), str(count))


def _ask_count_all(scene: Scene, rng: random.Random) -> Turn:
    return Turn("count_all", rng.choice(_COUNT_ALL), str(len(scene.objects)))


def _ask_region(scene: Scene, rng: random.Random) -> Turn | None:
    if len({item.region for item in scene.objects}) < 2:
        return None
    item, other = rng.choice(scene.objects), rng.choice(scene.objects)
    return Turn("region", rng.choice(_REGION).format(_refer_to(scene, item, rng)), item.region, other.region)


def _ask_relation(scene: Scene, rng: random.Random) -> Turn | None:
    if len(scene.objects) < 2:
        return None
    first, second = rng.sample(scene.objects, 2)
    upright = rng.random() < 0.5
    gap = second.y - first.y if upright else second.x - first.x
    if abs(gap) < _MIN_APART:
        return None
    words = ("above", "below") if upright else ("left", "right")
    question = rng.choice(_RELATION_UPRIGHT if upright else _RELATION_ACROSS)
    if "higher" in question:
        words = ("higher", "lower")
    names = _refer_to(scene, first, rng), _refer_to(scene, second, rng)
    # somebody who does not know whose place is whose is right half the time
    return Turn("relation", question.format(*names), words[0] if gap > 0 else words[1], rng.choice(words))


def _ask_multiple_choice(scene: Scene, rng: random.Random) -> Turn | None:
    about, wording, values, read, by = rng.choice(_CHOICE_SUBJECTS)
    item = _pick_unique(scene, rng, by=by) if by is not None else rng.choice(scene.objects)
    if item is None or len({read(one) for one in scene.objects}) < 2:
        return None
    name = item.shape if about == "colour" else item.colour if about == "shape" else _refer_to(scene, item, rng)
    present = sorted({read(one) for one in scene.objects} - {read(item)})
    rng.shuffle(present)
    absent = [value for value in values if value not in present and value != read(item)]
    options = [read(item), *present[:3], *rng.sample(absent, max(3 - len(present), 0))]
    rng.shuffle(options)
    letters = dict(zip(options, LETTERS, strict=True))
    layout = rng.choice(_CHOICES)
    joint = "\n" if layout.startswith("\n") else " "
    written = joint.join(f"{letter}. {option}" for option, letter in letters.items())
    other = rng.choice(scene.objects)
    question = rng.choice(wording).format(name) + layout.format(written)
    return Turn("multiple_choice", question, letters[read(item)], letters[read(other)], about)


def _ask_box(scene: Scene, rng: random.Random) -> Turn | None:
    if len(scene.objects) < 2:
        return None
    item, other = rng.choice(scene.objects), rng.choice(scene.objects)
    question = rng.choice(_BOX).format(_refer_to(scene, item, rng))
    return Turn("box", question, write_box(item.box), write_box(other.box))


def _ask_refer(scene: Scene, rng: random.Random) -> Turn | None:
    if len(scene.objects) < 2:
        return None
    item, other = rng.choice(scene.objects), rng.choice(scene.objects)
    return Turn("refer", rng.choice(_REFER).format(write_box(item.box)), item.name, other.name)


def _ask_caption(scene: Scene, rng: random.Random) -> Turn:
    mixed = [f"{item.colour} {rng.choice(scene.objects).shape}" for item in scene.objects]
    question = rng.choice(_CAPTION)
    caption = _write_caption([item.name for item in scene.objects])
    return Turn("caption", question, caption, _write_caption(mixed) if len(scene.objects) > 1 else None)


def _ask_detail(scene: Scene, rng: random.Random) -> Turn:
    def draw() -> list[SceneObject]:
        return rng.sample(scene.objects, len(scene.objects))

    told = [(item.size, item.name, item.region) for item in scene.objects]
    mixed = [
        (a.size, f"{b.colour} {c.shape}", d.region) for a, b, c, d in zip(draw(), draw(), draw(), draw(), strict=True)
    ]
    blind = _write_detail(mixed) if len(scene.objects) > 1 else None
    return Turn("detail", rng.choice(_DETAIL), _write_detail(told), blind)


def _write_caption(names: list[str]) -> str:
    text = join_names([with_article(name) for name in names])
    return text[0].upper() + text[1:] + "."


def _write_detail(told: list[tuple[str, str, str]]) -> str:
    text = ", ".join(f"a {size} {name} at the {region}" for size, name, region in told)
    return text[0].upper() + text[1:] + "."


def _refer_to(scene: Scene, item: SceneObject, rng: random.Random) -> str:
    """The object's name; sometimes its shape or colour alone where that says enough."""
    kind = rng.random()
    if kind < 0.15 and sum(one.shape == item.shape for one in scene.objects) == 1:
        return item.shape
    if kind > 0.93 and sum(one.colour == item.colour for one in scene.objects) == 1:
        return f"{item.colour} object"
    return item.name


def _pick_unique(scene: Scene, rng: random.Random, *, by: Callable[[SceneObject], str]) -> SceneObject | None:
    """An object whose shape (or colour) no other has, so that a question by it alone is clear."""
    values = [by(item) for item in scene.objects]
    alone = [item for item in scene.objects if values.count(by(item)) == 1]
    return rng.choice(alone) if alone else None


def _yes(value: bool) -> str:
    return "yes" if value else "no"


_CHOICE_SUBJECTS: tuple[
    tuple[str, tuple[str, ...], tuple[str, ...], Callable[[SceneObject], str], Callable[[SceneObject], str] | None], ...
] = (
    ("colour", _COLOUR[:4], COLOURS, lambda item: item.colour, lambda item: item.shape),
    ("shape", _SHAPE[:4], SHAPES, lambda item: item.shape, lambda item: item.colour),
    ("region", _REGION[:4], REGIONS, lambda item: item.region, None),
)
_PROPERTIES: tuple[tuple[Callable[[SceneObject], str], tuple[str, ...], tuple[str, ...]], ...] = (
    (lambda item: item.colour, COLOURS, _EXISTENCE_COLOUR),
    (lambda item: item.shape, SHAPES, _EXISTENCE),
)
_ASKERS: dict[str, Callable[[Scene, random.Random], Turn | None]] = {
    "existence": _ask_existence,
    "colour": _ask_colour,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "count_all": _ask_count_all,
    "region": _ask_region,
    "relation": _ask_relation,
    "multiple_choice": _ask_multiple_choice,
    "box": _ask_box,
    "refer": _ask_refer,
    "caption": _ask_caption,
    "detail": _ask_detail,
}
assert set(_ASKERS) == set(KINDS) and max(len(LETTERS), 4) >= MAX_OBJECTS
