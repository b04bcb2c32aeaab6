"""The whole path in a minute: the drawn scenes of `llava quickstart`, laid out as five benchmarks lay out their files.

POPE, VQAv2's validation set, ScienceQA, RefCOCO and COCO Caption are read from real file formats, scored by their own
rules and shown in the same report. The scenes are held out: no training seed draws them. A quickstart model knows
neither the benchmarks' instructions nor their form of boxes; `InItsWords` asks as it was taught and writes its boxes in
RefCOCO's form. Figures of drawn scenes say nothing about photographs, so none is published beside them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from llava.data.scene_scores import parse_box
from llava.data.scene_turns import LETTERS, Turn, ask
from llava.data.scenes import SHAPES, Scene, draw_scene, render
from llava.eval.task import AnswerRow, Question, Score, Task, TaskFacts
from llava.eval.tasks import open_task

NUM_SCENES = 60
_NOISE_SEEDS = 1 << 41  # far from every seed that a training picture's noise has, and from the quickstart's own measure
_POPE = ("random", "popular", "adversarial")
_VQA_KINDS = {"existence": "yes/no", "colour": "other", "shape": "other", "size": "other", "count": "number"}
_YES = ("yes", "no")


def demo_tasks() -> list[Task]:
    """The five benchmarks as the demo asks them."""
    return [
        InItsWords(open_task("pope"), _first_line),
        InItsWords(open_task("vqav2"), _first_line, split="val"),
        InItsWords(open_task("scienceqa"), str),
        InItsWords(open_task("refcoco"), _box_question, translate=_grid_box, split="val"),
        InItsWords(open_task("coco_caption"), lambda prompt: "Describe the picture briefly.", greedy=True),
    ]


@dataclass(frozen=True)
class InItsWords:
    """A benchmark asked in other words. reword: of its prompt; translate: of an answer, before it is scored."""

    task: Task
    reword: Callable[[str], str]
    translate: Callable[[str], str] = str
    split: str | None = None
    greedy: bool = False

    @property
    def name(self) -> str:
        return self.task.name

    def describe(self) -> TaskFacts:
        facts = self.task.describe()
        decoding = {"temperature": 0.0} if self.greedy else facts.decoding
        return replace(facts, title=f"{facts.title} (drawn scenes)", published={}, decoding=decoding, needs=())

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        return [
            replace(question, prompt=self.reword(question.prompt), meta={**question.meta, "picture_last": False})
            for question in self.task.read(root, split=split or self.split)
        ]

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        said = [replace(answer, text=self.translate(answer.text)) for answer in answers]
        score = self.task.score(questions, said, strict=strict)
        return replace(score, notes=["drawn scenes, asked in the words that the quickstart teaches", *score.notes])

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        return None


def write_demo(root: Path, *, num_scenes: int = NUM_SCENES, seed: int = 0) -> Path:
    """Write pictures and files of the five benchmarks; returns `root`. The same seed writes the same files."""
    scenes = [draw_scene(random.Random(f"demo scene {seed} {index}")) for index in range(num_scenes)]
    for folder, name in (("coco/val2014", "COCO_val2014_{:012}.jpg"), ("train2014", "COCO_train2014_{:012}.jpg")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes, start=1):
            _paint(scene, number, root / folder / name.format(number))
    _write_pope(root, scenes, seed)
    _write_vqa(root, scenes, seed)
    _write_science(root, scenes, seed)
    _write_boxes(root, scenes)
    _write_captions(root, scenes)
    return root


def _paint(scene: Scene, number: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(render(scene, noise_seed=_NOISE_SEEDS + number))
    picture.save(path, "JPEG", quality=95, subsampling=0)


def _write_pope(root: Path, scenes: Sequence[Scene], seed: int) -> None:
    """random: any shape; popular: the commonest of all scenes; adversarial: of a colour that is there, as a lure."""
    rng = random.Random(f"demo pope {seed}")
    counts = {shape: sum(item.shape == shape for scene in scenes for item in scene.objects) for shape in SHAPES}
    common = sorted(SHAPES, key=lambda shape: -counts[shape])
    questions: list[dict[str, Any]] = []
    for category in _POPE:
        labels: list[dict[str, Any]] = []
        for number, scene in enumerate(scenes, start=1):
            there = {item.shape for item in scene.objects}
            absent = [shape for shape in common if shape not in there]
            no = absent[0] if category == "popular" else rng.choice(absent)
            yes = rng.choice(scene.objects)
            names = {"yes": yes.shape, "no": no}
            if category == "adversarial":
                names = {"yes": yes.name, "no": f"{rng.choice(scene.objects).colour} {no}"}
            for label in _YES:
                image = f"COCO_val2014_{number:012}.jpg"
                text = f"Is there a {names[label]} in the picture?"
                labels.append({"question_id": len(labels) + 1, "image": image, "text": text, "label": label})
                row = {"question_id": len(questions), "image": image, "category": category}
                questions.append(row | {"text": f"{text}\nAnswer the question using a single word or phrase."})
        _write_lines(root / "pope" / "coco" / f"coco_pope_{category}.json", labels)
    _write_lines(root / "pope" / "llava_pope_test.jsonl", questions)


def _write_vqa(root: Path, scenes: Sequence[Scene], seed: int) -> None:
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, start=1):
        for kind, answer_type in _VQA_KINDS.items():
            turn = _turn(scene, kind, seed)
            if turn is None:
                continue
            key = {"image_id": number, "question_id": 1000 * number + len(questions) % 1000}
            answer = turn.answer.lower().rstrip(".")
            questions.append({**key, "question": turn.question})
            annotations.append(
                {
                    **key,
                    "question_type": kind,
                    "answer_type": answer_type,
                    "multiple_choice_answer": answer,
                    "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)],
                }
            )
    folder = root / "vqav2"
    _write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    _write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def _write_science(root: Path, scenes: Sequence[Scene], seed: int) -> None:
    problems: dict[str, Any] = {}
    rows = []
    for number, scene in enumerate(scenes, start=1):
        turn = _choice(scene, seed)
        if turn is None:
            continue
        key = str(number)
        question, *choices = [
            line.removeprefix(f"{letter}. ") for line, letter in zip(turn.question.split("\n"), " ABCD", strict=False)
        ]
        right = LETTERS.index(turn.answer)
        problems[key] = {
            "question": question, "choices": choices, "answer": right, "hint": "",
            "image": "image.png", "subject": "natural science", "grade": "grade1", "topic": turn.about, "split": "test",
        }  # fmt: skip
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
        turns = [{"from": "human", "value": f"<image>\n{question}\n{options}"}, {"from": "gpt", "value": turn.answer}]
        rows.append({"id": key, "image": f"{key}/image.png", "conversations": turns})
        path = root / "scienceqa" / "images" / "test" / key / "image.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(scene, noise_seed=_NOISE_SEEDS + number)).save(path)
    _write(root / "scienceqa" / "problems.json", problems)
    _write(root / "scienceqa" / "pid_splits.json", {"test": list(problems)})
    _write(root / "scienceqa" / "llava_test_CQM-A.json", rows)


def _write_boxes(root: Path, scenes: Sequence[Scene]) -> None:
    rows = []
    for number, scene in enumerate(scenes, start=1):
        for place, item in enumerate(scene.objects):
            x1, y1, x2, y2 = (100 * value for value in item.box)
            rows.append(
                {
                    "img_id": f"COCO_train2014_{number:012}_{place}",
                    "sents": item.name,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "height": 100,
                    "width": 100,
                }
            )
    _write(root / "refcoco" / "refcoco_val.json", rows)


def _write_captions(root: Path, scenes: Sequence[Scene]) -> None:
    pictures: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, start=1):
        said = {turn.answer for seed in range(5) if (turn := _turn(scene, "caption", seed)) is not None}
        pictures.append({"image": f"coco/val2014/COCO_val2014_{number:012}.jpg", "caption": sorted(said)})
        captions += [
            {"image_id": number, "caption": text, "id": len(captions) + n} for n, text in enumerate(sorted(said))
        ]
    _write(root / "coco_karpathy_val.json", pictures)
    _write(root / "coco_karpathy_val_gt.json", {"annotations": captions})


def _turn(scene: Scene, kind: str, seed: int) -> Turn | None:
    return ask(scene, kind, random.Random(f"demo {kind} {seed} {scene.objects}"))


def _choice(scene: Scene, seed: int) -> Turn | None:
    """A multiple choice with its options on lines, as ScienceQA has them; None where the scene poses none."""
    turns = (_turn(scene, "multiple_choice", 100 * seed + attempt) for attempt in range(30))
    return next((turn for turn in turns if turn is not None and "\nA. " in turn.question), None)


def _first_line(prompt: str) -> str:
    return prompt.split("\n")[0]


def _box_question(prompt: str) -> str:
    return f"Give the box of the {prompt.removeprefix('[refer] give me the location of ')}."


def _grid_box(text: str) -> str:
    """[0.12, 0.30, 0.55, 0.61] as {<12><30><55><61>}."""
    box = parse_box(text)
    return text if box is None else "{" + "".join(f"<{int(100 * value)}>" for value in box) + "}"


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_lines(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
