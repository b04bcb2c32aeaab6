"""A tiny run on disk, and what the processes of test_processes.py do with it."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava.data.loader import GlobalStep
from llava.errors import LlavaError
from llava.train.loop import StepRecord, Trainer
from llava.train.metrics import read_metrics
from llava.train.progress import Watcher
from llava.train.recipe import load_recipe
from llava.train.run import run_recipe
from llava.train.stopping import RunStoppedError
from tests.train.tiny_training import write_tiny_bases

TOTAL_STEPS = 6


def write_world(folder: Path) -> Path:
    """Bases, and a data set of pictures (two conversations each) and of texts; returns the recipe."""
    write_tiny_bases(folder)
    (folder / "images").mkdir()
    records: list[dict[str, Any]] = []
    for number in range(8):
        colour = ("red", "blue")[number % 2]
        Image.new("RGB", (16, 16), colour).save(folder / "images" / f"{number}.png")
        for question in ("Colour?", "Which?"):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": colour}]
            records.append({"id": f"p{number}", "image": f"{number}.png", "conversations": turns})
    for number in range(5):
        turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "so " * number + "yes"}]
        records.append({"id": f"t{number}", "conversations": turns})
    (folder / "mix.json").write_text(json.dumps(records, indent=1))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""\
model: {{language_model: {folder}/language_model, vision_tower: {folder}/vision_tower, template: llava_hf}}
data: {{files: [{folder}/mix.json], images: {folder}/images, max_tokens: 200, row_tokens: 256, workers: 1}}
tune: {{language_model: full, vision_tower: full}}
optim: {{learning_rate: 5e-3, batch_conversations: 8, epochs: 2.0, max_grad_norm: 0.5, eps: 1e-4}}
run: {{device: cpu, dtype: float32}}
"""
    )
    return recipe


@dataclass(frozen=True)
class Part:
    """A call of run_recipe. stop_after: the step at which process `stopped` of the run gets SIGTERM."""

    recipe: Path
    out: Path
    changes: tuple[str, ...] = ()
    stop_after: int | None = None
    stopped: int = 0


def run_part(part: Part) -> dict[str, Any]:
    """What one process saw: conversations of each step, where it began, how it ended; losses from the run's folder."""
    seen: dict[int, tuple[int, ...]] = {}
    take_step = Trainer.step

    def spy(self: Trainer, made: GlobalStep, **kwargs: Any) -> StepRecord:
        record = take_step(self, made, **kwargs)
        seen[record.step] = made.conversations
        if record.step == part.stop_after and int(os.environ.get("RANK", "0")) == part.stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    Trainer.step = spy  # type: ignore[method-assign]
    ended = "finished"
    try:
        run_recipe(load_recipe(part.recipe, [f"run.out={part.out}", *part.changes]), watcher=Watcher())
    except RunStoppedError as stopped:
        ended = str(stopped)
    except LlavaError as error:
        ended = f"{type(error).__name__}: {error}"
    finally:
        Trainer.step = take_step  # type: ignore[method-assign]
    return {
        "seen": seen,
        "ended": ended,
        "lines": read_metrics(part.out / "metrics.jsonl"),
    }
