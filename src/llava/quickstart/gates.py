"""What the quickstart's bases must be able to do before a picture is shown to them together, and how it is measured."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import LlamaForCausalLM

from llava.data.scene_turns import KINDS, Turn, ask, score
from llava.data.scenes import Scene, draw_scene
from llava.quickstart.language_pretraining import run_rows
from llava.quickstart.scene_text import RowWriter

TOWER_GATES = {"shape": 0.97, "colour": 0.99, "box": 0.97}
LANGUAGE_GATES = {
    "existence": 0.95, "colour": 0.95, "shape": 0.95, "size": 0.95, "count": 0.95, "count_all": 0.95, "region": 0.95,
    "multiple_choice": 0.95, "relation": 0.9, "box": 0.9,
}  # fmt: skip


def draw_gate_scenes(count: int, *, seed: str = "gates") -> list[Scene]:
    """Held-out scenes of two to four objects; their generator never makes a training scene."""
    rng = random.Random(seed)
    return [draw_scene(rng, num_objects=rng.randint(2, 4)) for _ in range(count)]


def measure_language_model(
    model: LlamaForCausalLM,
    writer: RowWriter,
    scenes: list[Scene],
    *,
    form: str = "boxes",
    projector: nn.Module | None = None,
    batch_rows: int = 8,
) -> dict[str, float]:
    """Mean score by kind over one turn of every kind a scene has; the answers are read off in one forward.

    Each token is the likeliest one after the true answer so far; an answer that is right token by token is the greedy
    answer, so for every kind marked by exact match this is greedy decoding's accuracy.
    """
    rng = random.Random(f"{form}-turns")
    scores: dict[str, list[float]] = defaultdict(list)
    with torch.no_grad():
        for start in range(0, len(scenes), batch_rows):
            asked = [
                [turn for kind in KINDS if (turn := ask(scene, kind, rng)) is not None]
                for scene in scenes[start : start + batch_rows]
            ]
            if form != "grid":  # a telling's order is drawn anew, and captions follow it
                asked = [[turn for turn in turns if turn.kind not in ("caption", "detail")] for turns in asked]
            rows = [
                writer.write_turns(scene, form, turns, rng)
                for scene, turns in zip(scenes[start : start + batch_rows], asked, strict=True)
            ]
            hidden, _ = run_rows(model, projector, rows)
            likeliest = model.lm_head(hidden.to(model.lm_head.weight.dtype)).argmax(-1).cpu().numpy()
            for number, (row, turns) in enumerate(zip(rows, asked, strict=True)):
                for turn, ids in zip(turns, _split_answers(row.branch_ids, row.labels, likeliest[number]), strict=True):
                    scores[turn.kind].append(_mark(writer, turn, ids))
    return {kind: sum(marks) / len(marks) for kind, marks in scores.items()}


def _split_answers(
    branches: NDArray[np.int64], labels: NDArray[np.int64], likeliest: NDArray[np.int64]
) -> list[list[int]]:
    """The likeliest ids at every branch's answer; the prediction for a place stands one place before it."""
    answers = []
    for branch in range(1, int(branches.max()) + 1):
        places = np.flatnonzero((branches == branch) & (labels != -100))
        answers.append([int(likeliest[place - 1]) for place in places])
    return answers


def _mark(writer: RowWriter, turn: Turn, ids: list[int]) -> float:
    """An answer must also end where the true one ends."""
    if ids[-1] != writer.eos:
        return 0.0
    return score(turn, writer.tokenizer.decode(ids[:-1]))
