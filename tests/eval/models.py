"""A tiny model that says letters, and pictures to ask about."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import llava
from llava.eval.task import Question
from llava.inference.talk import Model
from tests.cli.tiny_model import write_model

COLOURS = ("red", "green", "blue", "white", "orange")


def speaking_model(folder: Path) -> Model:
    """Random weights that give different short words for different pictures."""
    made = llava.load(write_model(folder), dtype="float32", device="cpu")
    head = made.model.language_model.lm_head.weight
    with torch.no_grad():
        letters = head[3 + ord("a") : 3 + ord("z") + 1].clone()
        head.zero_()  # random bytes are no text: let it say letters only
        head[3 + ord("a") : 3 + ord("z") + 1] = letters
        made.model.multi_modal_projector.linear_2.weight.mul_(20)  # pictures that differ are to matter
    return made


def draw_pictures(folder: Path, count: int) -> list[Path]:
    paths = []
    for number in range(count):
        paths.append(folder / f"{number}.png")
        Image.new("RGB", (60, 40 + 5 * number), COLOURS[number % 5]).save(paths[-1])
    return paths


def ask_about(pictures: list[Path], each: int) -> list[Question]:
    """`each` questions a picture, of differing lengths, those of one picture not next to each other."""
    return [
        Question(f"{n}-{p}", f"What is {'very ' * (n % 4)}it {n}?", (picture,), {}, 4 + n % 3)
        for n in range(each)
        for p, picture in enumerate(pictures)
    ]
