"""What the two processes of test_parallel.py run: importable functions that return plain data."""

from __future__ import annotations

from dataclasses import dataclass
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
from llava.train.sections import OptimSection, TuneSection
from llava.train.stages import apply_stage
from tests.train.tiny_training import IMAGE_ID, build_tiny_llava, grow, make_conversation

Modality = Literal["pictures", "text", "both", "nothing", "silent"]


@dataclass(frozen=True)
class Case:
    """One step. shares: what each of two processes has; one process alone has both.

    many: micro-batches of one row each rather than one batch a process.
    """

    mode: Mode = "ddp"
    shares: tuple[Modality, Modality] = ("both", "both")
    many: bool = False
    cpu_offload: bool = False
    tune: tuple[tuple[str, str], ...] = (("language_model", "full"), ("vision_tower", "full"))
    dtype: str = "float32"
    steps: int = 1
    max_grad_norm: float = 1e9


def make_share(kind: Modality, seed: int) -> list[list[Encoded]]:
    rng = np.random.default_rng(seed)
    groups: list[list[Encoded]] = []
    if kind in ("pictures", "both"):
        groups += [[make_conversation(rng, picture=p, answer=3) for _ in range(2)] for p in (seed, seed + 2)]
    if kind in ("text", "both"):
        groups += [[make_conversation(rng, picture=None, answer=a)] for a in (2, 5)]
    if kind == "silent":
        groups += [[make_conversation(rng, picture=seed)]]
        for encoded in groups[0]:
            encoded.labels[:] = -100
    return groups


def make_batches(case: Case, share: int) -> list[Batch]:
    layout = Layout(64, 64, 1 if case.many else 10_000, IMAGE_ID, 0)
    return list(lay_out(grow(make_share(case.shares[share], share)), layout))


def prepare(case: Case) -> Trainer:
    model: Llava = build_tiny_llava()
    dtype = getattr(torch, case.dtype)
    apply_stage(model, TuneSection(**dict(case.tune)))  # type: ignore[arg-type]
    mode = case.mode if process_count() > 1 else "one"
    parallel = Parallel(model, mode=mode, device=torch.device("cpu"), dtype=dtype, cpu_offload=case.cpu_offload)
    optim = OptimSection(
        learning_rate=3e-3, warmup_share=0.0, schedule="constant", max_grad_norm=case.max_grad_norm, eps=1e-4
    )
    return Trainer(model, optim=optim, total_steps=100, dtype=dtype, parallel=parallel)


def own_step(case: Case, number: int = 0) -> GlobalStep:
    """This process's part of the step; all of it where there is one process."""
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
    weights = {name: p.detach().numpy() for name, p in trainer.model.named_parameters()} if whole else {}
    return {"records": records, "weights": weights, "sharded": sharded}
