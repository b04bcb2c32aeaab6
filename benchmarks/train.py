"""Training speed beside what others do with the same weights and the same conversations: supervised rows a second.

    python benchmarks/train.py [CASE ...] [--rounds 3] [--record] [--tiny]

Peers, each in a process of its own, in turn (A B C D, A B C D, ...), one thread, processor time of whole steps:

    hf      the plain Hugging Face way: transformers' Trainer, LlavaForConditionalGeneration, right-padded batches of 4,
            gradient checkpointing, full logits: the original's algorithm on today's libraries
    fused   the strongest realistic peer: Trainer with conversations packed block-diagonally into rows, no gradient
            checkpointing, fused linear cross-entropy (torch's)
    packed  ours without sharing: plain packing, all else equal
    ours    what `llava train` does: conversations on one picture share its tokens

Every speed stands beside the largest relative difference of its gradient from hf's, over all trained tensors together.
Shapes where the language model dominates: 576 image tokens behind a template head of 35, conversations of 60 to 430
tokens (stage 2) or captions of 8 to 40 (stage 1), a 4 x 768 language model with 8,192 tokens, float32. `stage1-small`
has a language model of 4 x 384 and a tower that costs half as much, as a 0.5B beside ViT-L does; there `ours` reads its
features from disk, as in a second epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

IMAGE, HEAD, ROW_TOKENS = 8191, 35, 2048


@dataclass(frozen=True)
class Case:
    """One question. per_picture: conversations on each picture; layers, width: of the language model."""

    stage: int
    per_picture: int
    layers: int = 4
    width: int = 768
    vocabulary: int = 8192
    tower_layers: int = 2
    tower_width: int = 64
    conversations: int = 12
    side: int = 336
    text: tuple[int, int] = (60, 430)
    cached: bool = False
    peers: tuple[str, ...] = ("hf", "fused", "packed", "ours")


SMALL = {"width": 384, "tower_layers": 8, "tower_width": 256, "cached": True}
CASES = {
    "stage2-2": Case(2, 2),
    "stage2-4": Case(2, 4),
    "stage2-6": Case(2, 6),
    "stage1": Case(1, 1, text=(8, 40), peers=("hf", "fused", "ours")),
    "stage1-small": Case(1, 1, text=(8, 40), peers=("hf", "fused", "ours"), **SMALL),  # type: ignore[arg-type]
}


def shrink(case: Case) -> Case:
    """The same question at a size that a test can ask."""
    text = (4, 9) if case.stage == 1 else (8, 30)
    return replace(case, layers=2, width=32, vocabulary=8192, tower_layers=1, tower_width=16, side=56, text=text)


# --- the same weights and samples for all -------------------------------------------------------------------------


def build_model(case: Case) -> Any:
    import torch

    from llava.model.config import LlavaConfig
    from llava.model.llava import Llava

    torch.manual_seed(0)
    heads = max(2, case.width // 64)
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": case.tower_width,
            "intermediate_size": 4 * case.tower_width,
            "num_hidden_layers": case.tower_layers + 1,  # features are read before the last
            "num_attention_heads": max(1, case.tower_width // 64),
            "image_size": case.side,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": case.width,
            "intermediate_size": int(case.width * 8 / 3) // 64 * 64 or 64,
            "num_hidden_layers": case.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": case.vocabulary,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
        image_token_id=IMAGE,
    )
    return Llava.from_config(config)


def make_groups(case: Case) -> list[list[Any]]:
    """Conversations by picture: 35 tokens, the picture, question and answer (together of the lengths in `text`)."""
    from llava.prompt.processor import IGNORE_LABEL, Encoded

    rng = np.random.default_rng(1)
    patches = (case.side // 14) ** 2
    # evenly spread and shuffled: no luck in the lengths
    lengths = rng.permutation(np.linspace(*case.text, case.conversations).round().astype(int)).tolist()
    groups = []
    for _ in range(case.conversations // case.per_picture):
        pixels = rng.normal(size=(1, 3, case.side, case.side)).astype(np.float32)
        group = []
        for _ in range(case.per_picture):
            text = lengths.pop()
            answer = text if case.stage == 1 else max(1, int(text * rng.uniform(0.35, 0.8)))
            ids = np.concatenate(
                [np.arange(1, HEAD + 1), np.full(patches, IMAGE), rng.integers(100, case.vocabulary - 10, text)]
            )
            labels = np.full(len(ids), IGNORE_LABEL)
            labels[-answer:] = ids[-answer:]
            group.append(Encoded(ids, labels, pixels, ((case.side, case.side),), (1,), (patches,)))
        groups.append(group)
    return groups


def canonical(name: str) -> str:
    """A parameter's name in both model classes."""
    return (
        name.removeprefix("model.")
        .replace("language_model.model.", "language_model.")
        .replace("language_model.lm_head", "lm_head")
    )


# --- peers --------------------------------------------------------------------------------------------------------


def run_ours(case: Case, folder: Path, *, shared: bool, steps: int) -> dict[str, Any]:
    import torch

    from llava.data.loader import GlobalStep, Layout, lay_out
    from llava.data.packing import grow_trees
    from llava.train.feature_cache import FeatureCache
    from llava.train.loop import Trainer
    from llava.train.sections import OptimSection, TuneSection
    from llava.train.stages import apply_stage

    model = build_model(case)
    optim = OptimSection(learning_rate=1e-9, max_grad_norm=1e9)
    apply_stage(model, TuneSection(language_model="full" if case.stage == 2 else "frozen"), optim=optim)
    groups = make_groups(case)
    if not shared:
        groups = [[one] for group in groups for one in group]
    trees = [t for group in groups for t in grow_trees(group, image_token_id=IMAGE, max_tokens=ROW_TOKENS * 2)]
    layout = Layout(ROW_TOKENS * 2, ROW_TOKENS * 2, ROW_TOKENS * 2, IMAGE, 0, picture_keys=case.cached)
    step = GlobalStep(0, 0.0, tuple(range(case.conversations)), tuple(lay_out(trees, layout)), 0)
    trainer = Trainer(model, optim=optim, total_steps=10**6, dtype=torch.float32)
    gradients: dict[str, Any] = {}
    original = trainer.optimizer.step

    def keep(*arguments: Any) -> Any:
        if not gradients:
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return original(*arguments)

    if case.cached:
        cache = FeatureCache(folder / "features", identity="benchmark", limit_bytes=1 << 34)
        trainer.parallel.step_loss.pictures.cache = cache
        with torch.no_grad():
            for batch in step.micro_batches:
                trainer.parallel.step_loss.pictures.of(batch)
    trainer.optimizer.step = keep  # type: ignore[method-assign]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, losses = [], []
    for _ in range(steps):
        started = time.process_time()
        losses.append(trainer.step(step).loss)
        seconds.append(time.process_time() - started)
    tokens = sum(batch.num_tokens for batch in step.micro_batches)
    return {"seconds": seconds, "loss": losses[0], "tokens": tokens, "before": before, "gradients": gradients}


def run_trainer(case: Case, folder: Path, *, fused: bool, steps: int) -> dict[str, Any]:
    """transformers' own Trainer and model class."""
    import torch
    from torch.nn import functional
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from llava.data.packing import fit_rows
    from llava.prompt.processor import IGNORE_LABEL

    ours = build_model(case)
    vision = {key: value for key, value in ours.config.vision_config.items() if key != "model_type"}
    text = {key: value for key, value in ours.config.text_config.items() if key != "model_type"}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    theirs = {canonical(name): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            theirs.pop(canonical(name)).copy_(parameter)
    assert not theirs, f"weights that ours lacks: {list(theirs)[:3]}"
    del ours
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if case.stage == 2:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    conversations = [one for group in make_groups(case) for one in group]
    if fused:
        lengths = [len(one.input_ids) for one in conversations]
        items = [[conversations[i] for i in row] for row in fit_rows(lengths, ROW_TOKENS)]
    else:
        items = [[one] for one in conversations]

    def collate(rows: list[list[Any]]) -> dict[str, Any]:
        longest = max(sum(len(one.input_ids) for one in row) for row in rows)
        shape = (len(rows), longest)
        ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE_LABEL)
        mask, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for number, row in enumerate(rows):
            cursor = 0
            for one in row:
                here = slice(cursor, cursor + len(one.input_ids))
                ids[number, here], labels[number, here] = one.input_ids, one.labels
                mask[number, here], positions[number, here] = 1, np.arange(len(one.input_ids))
                cursor = here.stop
        pixels = np.concatenate([one.pixel_values for row in rows for one in row])
        made = {"input_ids": ids, "labels": labels, "pixel_values": pixels}
        made |= {"position_ids": positions} if fused else {"attention_mask": mask}
        return {name: torch.from_numpy(value) for name, value in made.items()}

    class Fused(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
            count = kwargs["num_items_in_batch"]
            return (
                functional.linear_cross_entropy(
                    hidden[:, :-1].flatten(0, 1), model.lm_head.weight, labels[:, 1:].flatten(), reduction="sum"
                )
                / count
            )

    seconds: list[float] = []
    gradients: dict[str, Any] = {}

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **kwargs: Any) -> None:
            self.started = time.process_time()

        def on_pre_optimizer_step(self, *arguments: Any, **kwargs: Any) -> None:
            if not gradients:
                gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
            seconds.append(time.process_time() - self.started)

    together = 1 if fused else 4
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=together,
        gradient_accumulation_steps=-(-len(items) // together),
        max_steps=steps,
        gradient_checkpointing=not fused,
        learning_rate=1e-9,
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    kind = Fused if fused else Trainer
    trainer = kind(model, arguments, train_dataset=items, data_collator=collate, callbacks=[Clock()])  # type: ignore[arg-type]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer.train()
    padded = sum(len(one.input_ids) for one in conversations)
    loss = trainer.state.log_history[0]["loss"]
    return {"seconds": seconds, "loss": float(loss), "tokens": padded, "before": before, "gradients": gradients}


def run_peer(peer: str, case: Case, folder: Path, *, steps: int, threads: int) -> None:
    """One peer in this process; prints one JSON line, leaves its gradient in the folder."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(threads)
    if peer in ("ours", "packed"):
        made = run_ours(case, folder, shared=peer == "ours", steps=steps)
    else:
        made = run_trainer(case, folder, fused=peer == "fused", steps=steps)
    gradients = {canonical(name): gradient.contiguous() for name, gradient in made.pop("gradients").items()}
    save_file(gradients, folder / f"{peer}.safetensors")
    before = made.pop("before")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**made, "peak_mib": peak / 1024, "step_mib": (peak - before) / 1024}))


# --- side by side -------------------------------------------------------------------------------------------------


def compare(name: str, *, rounds: int, tiny: bool, threads: int) -> dict[str, dict[str, float]]:
    """Figures by peer."""
    case = shrink(CASES[name]) if tiny else CASES[name]
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in case.peers}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for peer in case.peers:
                command = [sys.executable, "-W", "ignore", __file__, name, "--peer", peer, "--folder", folder]
                command += ["--threads", str(threads), *(["--tiny"] if tiny else [])]
                limited = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
                done = subprocess.run(command, env=limited, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{peer}: {done.stderr[-2000:]}")
                runs[peer].append(json.loads(done.stdout.strip().splitlines()[-1]))
                print(f"  {name} {peer}: {runs[peer][-1]['seconds']} s", file=sys.stderr, flush=True)
        differences = {peer: gradient_difference(Path(folder), peer, case.peers[0]) for peer in case.peers}
    figures: dict[str, dict[str, float]] = {}
    reference = min(s for run in runs["hf"] for s in run["seconds"])
    reference_median = median(s for run in runs["hf"] for s in run["seconds"])
    for peer, made in runs.items():
        seconds = [s for run in made for s in run["seconds"]]
        figures[peer] = {
            "rows_per_second": case.conversations / min(seconds),
            "rows_per_second_median": case.conversations / median(seconds),
            "times_hf": reference / min(seconds),
            "times_hf_median": reference_median / median(seconds),
            "peak_mib": max(run["peak_mib"] for run in made),
            "step_mib": max(run["step_mib"] for run in made),
            "loss": made[0]["loss"],
            "tokens": made[0]["tokens"],
            "gradient_difference": differences[peer],
        }
    for other in case.peers:
        if other not in ("hf", "ours"):
            figures["ours"][f"times_{other}"] = figures["ours"]["rows_per_second"] / figures[other]["rows_per_second"]
    if "packed" in case.peers:
        ratio = figures["packed"]["tokens"] / figures["ours"]["tokens"]
        figures["ours"]["token_ratio"] = ratio
        figures["ours"]["share_of_token_ratio"] = figures["ours"]["times_packed"] / ratio
    return figures


def gradient_difference(folder: Path, peer: str, reference: str) -> float:
    """|gradient - reference| / |reference| over all trained tensors."""
    from safetensors.torch import load_file

    made, wanted = load_file(folder / f"{peer}.safetensors"), load_file(folder / f"{reference}.safetensors")
    assert made.keys() == wanted.keys(), f"{peer} trains other tensors: {sorted(made.keys() ^ wanted.keys())[:4]}"
    off = sum(float((made[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    whole = sum(float(wanted[name].double().square().sum()) for name in wanted)
    return float((off / whole) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes; the ratios mean nothing")
    parser.add_argument("--record", action="store_true", help="append to results.csv")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        case = CASES[options.cases[0]]
        case = shrink(case) if options.tiny else case
        run_peer(options.peer, case, options.folder, steps=2 if options.tiny else 1, threads=options.threads)
        return
    for name in options.cases or CASES:
        figures = compare(name, rounds=options.rounds, tiny=options.tiny, threads=options.threads)
        print(json.dumps({"benchmark": "train", "case": name, **figures}))
        for peer, measured in figures.items():
            line = "  ".join(f"{key} {value:.4g}" for key, value in measured.items())
            print(f"{name:14} {peer:7} {line}", file=sys.stderr)
            if options.record:
                from record import record

                for metric, value in measured.items():
                    record("train", f"{name}, {peer}", metric, value)


if __name__ == "__main__":
    main()
