"""What several turns of a picture in one tree are worth, and attention by trees, at the quickstart's sizes.

    python benchmarks/training_step.py [--record] [--layers 6] [--threads 1]

One optimizer step of stage 2 (12 pictures of 64 patches, 12 turns each; Llama 192 wide, frozen tower, bfloat16 where
the processor has it) laid out four ways, in turn: one sequence a turn, padded (a usual trainer); one sequence a turn,
packed without padding; trees with a mask; trees with attention by trees (what `llava train` does). Each figure is the
least of the repeats in the thread's processor time, so that other programs on the machine count little. The losses
stand beside: they must agree. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch

from llava.data.loader import GlobalStep, Layout, lay_out
from llava.data.packing import Tree, grow_trees
from llava.distributed import pick_dtype
from llava.model.config import LlavaConfig
from llava.model.llava import Llava
from llava.prompt.processor import IGNORE_LABEL, Encoded
from llava.train.loop import Trainer
from llava.train.sections import OptimSection, TuneSection
from llava.train.stages import apply_stage

IMAGE, PATCHES, PICTURES, TURNS = 959, 64, 12, 12


def build(layers: int) -> Llava:
    torch.manual_seed(0)
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4}
    language = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": layers, "num_attention_heads": 6}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 64, "patch_size": 8, **tower},
        text_config={"model_type": "llama", "vocab_size": 960, "num_key_value_heads": 6, **language},
        image_token_id=IMAGE,
    )
    return Llava.from_config(config)


def make_conversations(seed: int = 0) -> list[list[Encoded]]:
    """Turns as long as those about drawn scenes: short answers, a few captions."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(PICTURES):
        pixels = rng.normal(size=(1, 3, 64, 64)).astype(np.float32)
        group = []
        for _ in range(TURNS):
            answer = int(rng.choice([2, 2, 2, 2, 2, 2, 3, 3, 10, 10, 20, 30]))
            words = rng.integers(10, 900, int(rng.integers(8, 14)) + answer)
            ids = np.concatenate([[1, 3, 4], np.full(PATCHES, IMAGE), [5], words])
            labels = np.full(len(ids), IGNORE_LABEL)
            labels[-answer:] = ids[-answer:]
            group.append(Encoded(ids, labels, pixels, ((64, 64),), (1,), (PATCHES,)))
        groups.append(group)
    return groups


def make_step(trees: list[Tree], *, row_tokens: int) -> GlobalStep:
    layout = Layout(row_tokens, row_tokens, 8192, IMAGE, 0)
    return GlobalStep(0, 0.0, (), tuple(lay_out(trees, layout)), 0)


def measure(layers: int, repeats: int) -> dict[str, float]:
    groups = make_conversations()
    longest = max(len(one.input_ids) for group in groups for one in group)
    separate = [tree for g in groups for one in g for tree in grow_trees([one], image_token_id=IMAGE, max_tokens=1)]
    shared = [tree for g in groups for tree in grow_trees(g, image_token_id=IMAGE, max_tokens=400)]
    cases: dict[str, tuple[GlobalStep, bool]] = {
        "one sequence a turn, padded": (make_step(separate, row_tokens=longest), False),
        "one sequence a turn, packed": (make_step(separate, row_tokens=8192), True),
        "trees, mask": (make_step(shared, row_tokens=400), False),
        "trees, attention by trees": (make_step(shared, row_tokens=8192), True),
    }
    model = build(layers)
    apply_stage(model, TuneSection(language_model="full"))
    optim = OptimSection(learning_rate=1e-9)  # the weights stay, so that the losses can be compared
    trainer = Trainer(model, optim=optim, total_steps=10**6, dtype=pick_dtype(model.device))
    best = {name: float("inf") for name in cases}
    losses: dict[str, float] = {}
    for _ in range(repeats):
        for name, (step, by_trees) in cases.items():
            trainer.parallel.step_loss.way = "layout" if by_trees else "mask"
            seconds = processor_time(lambda step=step, name=name: losses.update({name: trainer.step(step).loss}))
            best[name] = min(best[name], seconds)
    last = best["trees, attention by trees"]
    figures = {f"seconds, {name}": round(seconds, 4) for name, seconds in best.items()}
    figures |= {f"ratio over {name}": round(seconds / last, 2) for name, seconds in best.items() if seconds != last}
    figures["largest loss difference"] = round(max(losses.values()) - min(losses.values()), 5)
    return figures


def processor_time(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = measure(options.layers, options.repeats)
    print(json.dumps({"benchmark": "training_step", "layers": options.layers, **figures}))
    if options.record:
        from record import record

        for metric, value in figures.items():
            record("training_step", f"12 pictures x 12 turns, {options.layers}x192", metric, value)


if __name__ == "__main__":
    main()
