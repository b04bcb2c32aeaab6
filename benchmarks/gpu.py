"""Training at LLaVA-1.5's true 7B shapes on one accelerator of 80 GB or more, with random weights; nothing to install.

    PYTHONPATH=src python benchmarks/gpu.py [--seconds 30] [--compile] [--record] [--tiny]

Under ten minutes, no network, no files, only torch, transformers and Pillow. Stage 1 (projector; captions) and stage 2
(the language model too) with 1, 2 and 4 conversations on each picture: supervised rows a second, the share of the
device's peak that *needed* operations take (no padding, no recomputation, shared tokens once: MFU), peak memory, and
what LLaVA-1.5's two runs would take at that rate. Before that, attention by trees on this device is held against a
dense mask.

Stage 2 keeps weights, gradients and AdamW's moments in bfloat16, to fit 80 GB: the time of a step is that of a recipe,
the learning is not. Its hours at 2 and 4 conversations a picture stand for LLaVA-Instruct-158K and the COCO part of
mix665k. --tiny runs all of it on a CPU in seconds, to see that it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava.data.batch import Batch
from llava.data.loader import Layout, lay_out
from llava.data.packing import grow_trees
from llava.model.checkpointing import Checkpointing, find_blocks, set_checkpointing
from llava.model.config import LlavaConfig
from llava.model.llava import Llava
from llava.model.tree_attention import TreeLayout, attend_trees
from llava.prompt.processor import IGNORE_LABEL, Encoded
from llava.train.step_loss import StepLoss
from llava.train.throughput import Cost, Device, Work, this_device

IMAGE, HEAD = 31999, 35
ROWS = {1: 558_128, 2: 665_298}  # of the published runs
# (tokens, answer tokens) of a mean row: captions, and conversations of mix665k (an estimate, see docs/speed.md)
TEXT = {1: (10, 34), 2: (60, 430)}
ANSWER_SHARE = {1: 1.0, 2: 0.58}


@dataclass(frozen=True)
class Shape:
    """Sizes of the two transformers. tokens: of a micro-batch, tried from above until one fits."""

    layers: int = 32
    width: int = 4096
    inner: int = 11008
    tower_layers: int = 24
    tower_width: int = 1024
    side: int = 336
    tokens: int = 32768
    conversations: int = 96


TINY = Shape(layers=2, width=64, inner=128, tower_layers=2, tower_width=32, side=56, tokens=1024, conversations=8)


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Llava:
    heads = shape.width // 128 or 1
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": shape.tower_width,
            "intermediate_size": 4 * shape.tower_width,
            "num_hidden_layers": shape.tower_layers,
            "num_attention_heads": shape.tower_width // 64 or 1,
            "image_size": shape.side,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": shape.width,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
        image_token_id=IMAGE,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Llava.from_config(config)
    finally:
        torch.set_default_dtype(before)


def make_batches(shape: Shape, stage: int, per_picture: int, tokens: int) -> list[Batch]:
    """Micro-batches of `shape.conversations` conversations."""
    rng = np.random.default_rng(stage)
    patches = (shape.side // 14) ** 2
    trees = []
    for _ in range(shape.conversations // per_picture):
        pixels = rng.normal(size=(1, 3, shape.side, shape.side)).astype(np.float32)
        group = []
        for _ in range(per_picture):
            text = int(rng.integers(TEXT[stage][0], TEXT[stage][1]))
            answer = max(1, int(text * ANSWER_SHARE[stage]))
            ids = np.concatenate([np.arange(1, HEAD + 1), np.full(patches, IMAGE), rng.integers(100, 31000, text)])
            labels = np.full(len(ids), IGNORE_LABEL)
            labels[-answer:] = ids[-answer:]
            group.append(Encoded(ids, labels, pixels, ((shape.side, shape.side),), (1,), (patches,)))
        trees += grow_trees(group, image_token_id=IMAGE, max_tokens=4096)
    return list(lay_out(trees, Layout(4096, tokens, tokens, IMAGE, 0, multiple=128)))


def check_attention(device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference of outputs and gradients from a dense mask in float32, over that of the dense mask in `dtype`:
    about 1 when attention by trees is as near to the truth as any other."""
    from torch.nn.functional import scaled_dot_product_attention

    branches = [0] * 70 + [1] * 40 + [2] * 25 + [0] * 30 + [1] * 50
    trees = [0] * 135 + [1] * 80
    ids, within = np.array([trees]), np.array([branches])
    layout = TreeLayout.from_ids(ids, within).to(device)
    same = torch.from_numpy(ids[:, :, None] == ids[:, None, :])
    near = torch.from_numpy((within[:, None, :] == 0) | (within[:, :, None] == within[:, None, :]))
    mask = (same & near & torch.ones(len(trees), len(trees), dtype=torch.bool).tril())[:, None].to(device)
    torch.manual_seed(0)
    exact = [torch.randn(1, 4, len(trees), 64, device=device) for _ in range(4)]

    def all_of(run: Any, kind: torch.dtype) -> list[Tensor]:
        q, k, v, g = (t.to(kind).requires_grad_(n < 3) for n, t in enumerate(exact))
        made = run(q, k, v)
        return [t.float() for t in (made, *torch.autograd.grad(made, (q, k, v), g))]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.125)

    truth, masked = all_of(dense, torch.float32), all_of(dense, dtype)
    by_trees = all_of(lambda q, k, v: attend_trees(q, k, v, layout, scale=0.125), dtype)

    def worst(made: list[Tensor]) -> float:
        return max(float((a - b).norm() / b.norm()) for a, b in zip(made, truth, strict=True))

    return worst(by_trees) / max(worst(masked), 1e-6)


def measure(
    shape: Shape,
    stage: int,
    per_picture: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    peak: Device,
    seconds: float,
    compiled: bool,
) -> dict[str, Any]:
    """One line of figures; the largest micro-batch that fits without recomputation, else with some."""
    tried: list[tuple[int, Checkpointing]] = [(shape.tokens >> n, "none") for n in range(4)]
    tried += [(shape.tokens >> 3, "selective"), (shape.tokens >> 3, "full")]
    for tokens, mode in tried:
        try:
            figures = _measure(shape, stage, per_picture, tokens, mode, device, dtype, seconds, compiled)
        except torch.OutOfMemoryError:
            figures = {}
        gc.collect()
        if device.type != "cpu":
            torch.accelerator.empty_cache()
        if figures:
            figures["mfu"] = figures.pop("needed_tflops_per_second") / peak.teraflops
            return figures
    raise SystemExit(f"stage {stage}: does not fit this device at {tried[-1]} tokens a micro-batch")


def _measure(
    shape: Shape,
    stage: int,
    per_picture: int,
    tokens: int,
    mode: Checkpointing,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    compiled: bool,
) -> dict[str, Any]:
    model = build_model(shape, device, dtype)
    model.vision_tower.requires_grad_(False).eval()
    model.language_model.requires_grad_(stage == 2)
    set_checkpointing(model, mode)
    if compiled:
        for block in find_blocks(model.decoder):
            block.compile(dynamic=True)
    step_loss = StepLoss(model, dtype=torch.float32)  # the weights are in `dtype` already: no autocast
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=True)
    batches = [batch.to(device) for batch in make_batches(shape, stage, per_picture, tokens)]
    answers = sum(batch.num_answer_tokens for batch in batches)
    work = Work.of([batch.to(torch.device("cpu")) for batch in batches])
    cost = Cost.of_model(model)

    def run() -> None:
        step_loss.pictures.begin_step(batches)
        for batch in batches:
            torch.autograd.backward(step_loss(batch, 1 / answers))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    run()  # allocations, kernels, moments
    wait()
    steps, started = 0, time.perf_counter()
    while steps < 2 or time.perf_counter() - started < seconds:
        run()
        wait()
        steps += 1
    each = (time.perf_counter() - started) / steps
    rows = shape.conversations / per_picture * per_picture
    memory = 0.0 if device.type == "cpu" else torch.accelerator.max_memory_allocated(device) / 1e9
    return {
        "stage": stage,
        "per_picture": per_picture,
        "rows_per_second": rows / each,
        "tokens_per_second": work.tokens / each,
        "needed_tflops_per_second": cost.of(work) / each / 1e12,
        "peak_gb": memory,
        "micro_batch_tokens": tokens,
        "recomputed": mode,
        "hours_of_the_published_run": ROWS[stage] / (rows / each) / 3600,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement, after one step to warm up")
    parser.add_argument("--compile", action="store_true", help="torch.compile the language model's blocks")
    parser.add_argument("--record", action="store_true", help="append to results.csv")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args()
    available = torch.accelerator.is_available()
    if not available and not options.tiny:
        raise SystemExit("no accelerator here; --tiny runs the same on a CPU at tiny shapes")
    device = torch.device("cpu") if options.tiny else torch.device(torch.accelerator.current_accelerator() or "cpu")
    dtype = torch.float32 if options.tiny else torch.bfloat16
    shape, seconds = (TINY, 0.0) if options.tiny else (Shape(), options.seconds)
    peak = this_device(device, dtype)
    print(json.dumps({"benchmark": "gpu", "device": peak.name, "peak_tflops": peak.teraflops}))
    off = check_attention(device, torch.float32 if options.tiny else dtype)
    print(json.dumps({"benchmark": "gpu", "attention_error_over_that_of_a_mask": round(off, 3)}), flush=True)
    if not options.tiny and off > 3:
        raise SystemExit("attention by trees is wrong on this device; the figures would mean nothing")
    for stage, per_picture in ((1, 1), (2, 1), (2, 2), (2, 4)):
        figures = measure(
            shape,
            stage,
            per_picture,
            device=device,
            dtype=dtype,
            peak=peak,
            seconds=seconds,
            compiled=options.compile,
        )
        print(json.dumps({"benchmark": "gpu", **figures}), flush=True)
        if options.record:
            from record import record

            case = f"7B stage {stage}, {per_picture} a picture"
            for metric, value in figures.items():
                if isinstance(value, int | float):
                    record("gpu", case, metric, float(value), device=str(device))
    print("done", file=sys.stderr)


if __name__ == "__main__":
    main()
