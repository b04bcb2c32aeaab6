"""What the quickstart's bases must be able to do before a picture is shown to them together, and how it is measured."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPVisionModel, LlamaForCausalLM

from llava.data.scene_repainting import repaint, shrink
from llava.data.scene_turns import Turn, score
from llava.data.scenes import Scene, draw_scene
from llava.quickstart.language_pretraining import run_rows
from llava.quickstart.scene_text import RowWriter, ask_of, list_kinds
from llava.quickstart.tower_pretraining import DenseHead, draw_pictures, measure_tower, target_patches

TOWER_GATES = {"shape": 0.97, "colour": 0.99, "box": 0.97}
LANGUAGE_GATES = {
    "existence": 0.95, "colour": 0.95, "shape": 0.95, "size": 0.95, "count": 0.95, "count_all": 0.95, "region": 0.95,
    "multiple_choice": 0.95, "relation": 0.9, "box": 0.9,
}  # fmt: skip


def measure_bases(
    tower: CLIPVisionModel,
    head: DenseHead,
    language: LlamaForCausalLM,
    tokenizer: Tokenizer,
    *,
    device: torch.device,
    num_scenes: int = 400,
) -> dict[str, dict[str, float]]:
    """All gate figures: the tower on held-out scenes of either renderer, the language model on scenes as text."""
    scenes = draw_gate_scenes(num_scenes)
    rng = random.Random("gates-repainting")
    repainted = np.stack([shrink(repaint(scene, rng)) for scene in scenes])
    writer = RowWriter(tokenizer)
    return {
        "vision_tower": measure_tower(tower, head, *draw_pictures(scenes, seed=1 << 40), device),
        "vision_tower_second_renderer": measure_tower(tower, head, repainted, target_patches(scenes), device),
        "language_model": measure_language_model(language, writer, scenes),
        "language_model_names_only": measure_language_model(language, writer, scenes, form="names"),
    }


def list_short_gates(gates: dict[str, dict[str, float]]) -> list[str]:
    """One line for every gate that is not reached."""
    wanted = {
        "vision_tower": TOWER_GATES,
        "vision_tower_second_renderer": TOWER_GATES,
        "language_model": LANGUAGE_GATES,
    }
    return [
        f"{part}: {kind} {gates[part][kind]:.3f}, wanted {least}"
        for part, least_by_kind in wanted.items()
        for kind, least in least_by_kind.items()
        if gates[part][kind] < least
    ]


def draw_gate_scenes(count: int, *, seed: str = "gates") -> list[Scene]:
    """Held-out scenes of two to four objects; no training scene comes from their generator."""
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
    """Mean score by kind over one turn of every kind that a scene and its form of context can answer.

    Each token is the likeliest one after the true answer so far: an answer that is right token by token is the greedy
    one, so for the kinds marked by exact match this is greedy decoding's accuracy. Captions are asked of grids only: of
    a text they follow its order of telling, which is drawn anew.
    """
    rng = random.Random(f"{form}-turns")
    kinds = [kind for kind in list_kinds(form) if form == "grid" or kind not in ("caption", "detail")]
    scores: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(scenes), batch_rows):
        batch = scenes[start : start + batch_rows]
        asked = [[t for kind in kinds if (t := ask_of(scene, kind, form, rng)) is not None] for scene in batch]
        rows = [writer.write_turns(scene, form, turns, rng) for scene, turns in zip(batch, asked, strict=True)]
        with torch.no_grad():
            hidden, _ = run_rows(model, projector, rows)
            likeliest = model.lm_head(hidden.to(model.lm_head.weight.dtype)).argmax(-1).cpu().numpy()
        for row, turns, ids in zip(rows, asked, likeliest, strict=True):
            for turn, answer in zip(turns, _split_answers(row.branch_ids, row.labels, ids), strict=True):
                scores[turn.kind].append(_mark(writer, turn, answer))
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
