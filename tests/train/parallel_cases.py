"""What the two processes of test_parallel.py run: importable functions that return plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from llava.data.batch import Batch
from llava.data.loader import GlobalStep, Layout, lay_out
from llava.distributed import process_count, process_number
from llava.model.llava import Llava
from llava.prompt.processor import Encoded
from llava.train.loop import StepRecord, Trainer
from llava.train.parallel import Mode, Parallel, sharded_modules
from llava.train.sections import LoraSection, OptimSection, TuneSection
from llava.train.stages import apply_stage
from tests.train.tiny_training import IMAGE_ID, build_tiny_llava, grow, make_conversation

Modality = Literal["pictures", "text", "both", "nothing", "silent", "poison", "again"]

WITHOUT_DROPOUT: dict[str, Any] = {
    f"{part}_lora": LoraSection(rank=4, alpha=8.0, dropout=0.0) for part in ("vision_tower", "language_model")
}


@dataclass(frozen=True)
class Case:
    """One step. shares: what each of two processes has; one process alone has both.

    many: micro-batches of one row each rather than one batch a process.
    """

    mode: Mode = "ddp"
    shares: tuple[Modality, Modality] = ("both", "both")
    many: bool = False
    cpu_offload: bool = False
    tune: tuple[tuple[str, Any], ...] = (("language_model", "full"), ("vision_tower", "full"))
    dtype: str = "float32"
    model: str = "llava"
    steps: int = 1
    max_grad_norm: float = 1e9
    poisoned_step: int | None = None


def build_changed(**changes: Any) -> Llava:
    torch.manual_seed(0)
    return Llava.from_config(build_tiny_llava().config.with_changes(**changes))


def build_with_newline() -> Llava:
    """A model that ends the rows of tiled pictures with a learnt newline."""
    return build_changed(merge_type="spatial_unpad", image_mode="anyres", image_grid_pinpoints=((8, 16), (16, 8)))


def build_with_another_tower() -> Llava:
    """A tower whose own forward is run with hidden states returned; the others are run block by block."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return build_changed(vision_config={"model_type": "dinov2", **sizes})


def build_with_added_rows() -> Llava:
    """Tied embeddings, of which two rows will learn."""
    tied = build_tiny_llava().config.text_config | {"tie_word_embeddings": True}
    return build_changed(text_config=tied)


MODELS: dict[str, Callable[[], Llava]] = {
    "llava": build_tiny_llava,
    "newline": build_with_newline,
    "dinov2": build_with_another_tower,
    "added rows": build_with_added_rows,
}


def make_share(kind: Modality, seed: int, *, extra_features: int = 0) -> list[list[Encoded]]:
    """extra_features: how many more than its patches a picture has."""
    groups = _make_share(kind, seed)
    for group in groups:
        group[:] = [_with_more_features(encoded, extra_features) for encoded in group]
    return groups


def _with_more_features(encoded: Encoded, count: int) -> Encoded:
    if not count or not len(encoded.pixel_values):
        return encoded
    place = int(np.flatnonzero(encoded.input_ids == IMAGE_ID)[0])
    return replace(
        encoded,
        input_ids=np.insert(encoded.input_ids, place, [IMAGE_ID] * count),
        labels=np.insert(encoded.labels, place, [-100] * count),
        tokens_per_image=tuple(features + count for features in encoded.tokens_per_image),
    )


def _make_share(kind: Modality, seed: int) -> list[list[Encoded]]:
    rng = np.random.default_rng(seed)
    groups: list[list[Encoded]] = []
    if kind in ("pictures", "both"):
        groups += [[make_conversation(rng, picture=p, answer=3) for _ in range(2)] for p in (seed, seed + 2)]
    if kind in ("text", "both"):
        groups += [[make_conversation(rng, picture=None, answer=a)] for a in (2, 5)]
    if kind == "again":  # one picture in several trees, and so in several micro-batches
        groups += [[make_conversation(rng, picture=4, answer=3)] for _ in range(3)]
    if kind == "silent":
        groups += [[make_conversation(rng, picture=seed)]]
        for encoded in groups[0]:
            encoded.labels[:] = -100
    if kind == "poison":
        groups += [[make_conversation(rng, picture=seed)]]
        groups[0][0].pixel_values[:] = np.nan
    return groups


def make_batches(case: Case, share: int) -> list[Batch]:
    layout = Layout(64, 64, 1 if case.many else 10_000, IMAGE_ID, 0)
    groups = make_share(case.shares[share], share, extra_features=case.model in ("newline", "dinov2"))
    return list(lay_out(grow(groups), layout))


def prepare(case: Case) -> Trainer:
    model = MODELS[case.model]()
    dtype = getattr(torch, case.dtype)
    added = [21, 24] if case.model == "added rows" else []
    apply_stage(model, TuneSection(**{**WITHOUT_DROPOUT, **dict(case.tune)}), compute=dtype, added_ids=added)
    mode = case.mode if process_count() > 1 else "one"
    parallel = Parallel(model, mode=mode, device=torch.device("cpu"), dtype=dtype, cpu_offload=case.cpu_offload)
    optim = OptimSection(
        learning_rate=3e-3, warmup_share=0.0, schedule="constant", max_grad_norm=case.max_grad_norm, eps=1e-4
    )
    return Trainer(model, optim=optim, total_steps=100, dtype=dtype, parallel=parallel)


def own_step(case: Case, number: int = 0) -> GlobalStep:
    """This process's part of the step; all of it where there is one process. The poison is process 1's."""
    if number == case.poisoned_step:
        case = replace(case, shares=(case.shares[0], "poison"))
    shares = [process_number()] if process_count() > 1 else [0, 1]
    batches = [batch for share in shares for batch in make_batches(case, share)]
    return GlobalStep(number, 0.0, (0, 1, 2), tuple(batches), 0)


def take_gradients(case: Case) -> dict[str, Any]:
    """Loss and whole gradients before the first optimizer step, from the step's own functions."""
    trainer = prepare(case)
    kept: dict[str, torch.Tensor] = {}
    before = trainer.optimizer.step

    def keep(*args: Any, **kwargs: Any) -> Any:
        named = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        kept.update({name: tensor.clone() for name, tensor in trainer.parallel.gather(named).items()})
        return before(*args, **kwargs)

    trainer.optimizer.step = keep  # type: ignore[method-assign]
    record = trainer.step(own_step(case))
    return {"record": record, "gradients": {name: tensor.numpy() for name, tensor in kept.items()}}


def take_steps(case: Case) -> dict[str, Any]:
    """Records and final weights after several steps."""
    trainer = prepare(case)
    records: list[StepRecord] = [trainer.step(own_step(case, number)) for number in range(case.steps)]
    sharded = list(sharded_modules(trainer.parallel.step_loss))
    whole = trainer.parallel.make_whole()
    learnt = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad and whole}
    weights = {name: p.detach().numpy() for name, p in learnt.items()}
    return {"records": records, "weights": weights, "sharded": sharded}
