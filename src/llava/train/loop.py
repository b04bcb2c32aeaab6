"""The training loop: one optimizer step from one global step's micro-batches, and the guards around it.

`Trainer.step` is all there is to it: forward, loss over answer tokens divided by the answer tokens of the whole step,
backward, guards, clip, AdamW. Where the batches come from and when to save is train/run.py's business; how a step is
spread over processes is train/parallel.py's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llava.data.batch import Batch
from llava.data.loader import GlobalStep
from llava.distributed import gather_rows, process_number, sum_over_processes
from llava.model.llava import Llava
from llava.train.guards import StepGuard
from llava.train.optimizer import build_optimizer, rate_share, set_rate
from llava.train.parallel import Parallel
from llava.train.sections import OptimSection
from llava.train.stages import check_reached
from llava.train.step_loss import make_blank_batch
from llava.train.throughput import Work


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did, all processes together.

    loss: mean over the step's answer tokens; learning_rate: of the first group; grad_norm: before clipping;
    tokens: without padding, positions: with it; seconds: of the step itself; waited_seconds: for the loader before it;
    skipped: the weights were left alone because the gradient was not finite; overflowed: because float16's loss scale
        was too high, which is no fault of the data; tiles, pairs: what went through, as in llava.train.throughput.Work;
    dropped, truncated, bad: conversations left out as too long, cut to fit, and left out as of no use.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    positions: int
    answer_tokens: int
    conversations: int
    dropped: int
    seconds: float
    waited_seconds: float
    skipped: bool
    overflowed: bool = False
    tiles: int = 0
    pairs: int = 0
    truncated: int = 0
    bad: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds + self.waited_seconds, 1e-9)

    @property
    def supervised_share(self) -> float:
        """Answer tokens among all tokens."""
        return self.answer_tokens / max(self.tokens, 1)


@dataclass(frozen=True)
class _Totals:
    """What a step holds, all processes together; micro_batches: the most that any process has."""

    answer_tokens: int
    tokens: int
    positions: int
    dropped: int
    truncated: int
    bad: int
    with_pictures: int
    tiles: int
    pairs: int
    micro_batches: int

    @classmethod
    def of(cls, step: GlobalStep, batches: Sequence[Batch]) -> _Totals:
        """Agree with the other processes; `batches` are those of the step that this one has to compute."""
        work = Work.of(step.micro_batches)
        rows = gather_rows(
            work.answer_tokens,
            work.tokens,
            sum(batch.input_ids.numel() for batch in step.micro_batches),
            step.dropped,
            step.truncated,
            len(step.bad),
            sum(batch.pixel_values is not None for batch in batches),
            work.tiles,
            work.pairs,
            len(batches),
        )
        *sums, _ = (int(sum(column)) for column in zip(*rows, strict=True))
        return cls(*[*sums, int(max(row[-1] for row in rows))])


class Trainer:
    """A model with its optimizer and schedule. `dtype` is what matrix products are computed in, under autocast.

    parallel: how the step is spread (one process when not given); the model is wrapped by it already. seed: dropout
    draws from a generator of (seed, process, step), so that a run that was stopped goes on with the same draws.
    """

    def __init__(
        self,
        model: Llava,
        *,
        optim: OptimSection,
        total_steps: int,
        dtype: torch.dtype,
        max_bad_steps: int = 10,
        parallel: Parallel | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.parallel = parallel or Parallel(model, mode="one", device=model.device, dtype=dtype)
        self.device = self.parallel.device
        self._seed = seed
        self._blank = make_blank_batch(image_token_id=model.config.image_token_id).to(self.device)
        self.optimizer = build_optimizer(model.named_parameters(), optim)
        self.done = 0
        self._optim = optim
        self._total_steps = total_steps
        self.guard = StepGuard(max_bad_steps=max_bad_steps, dtype=dtype)
        self._reach_checked = False
        self._trained = [p for p in model.parameters() if p.requires_grad]

    def run(self, steps: Iterator[GlobalStep]) -> Iterator[StepRecord]:
        """Train on each global step; the record comes after the weights have moved."""
        while True:
            started = time.perf_counter()
            step = next(steps, None)
            if step is None:
                return
            yield self.step(step, waited_seconds=time.perf_counter() - started)

    def step(self, step: GlobalStep, *, waited_seconds: float = 0.0) -> StepRecord:
        """One optimizer step. Raises TrainingError when gradients stay non-finite or a trained part gets none."""
        started = time.perf_counter()
        share = rate_share(step.step, self._total_steps, self._optim)
        set_rate(self.optimizer, share)
        torch.manual_seed(_mix(self._seed, process_number(), step.step))
        # Without an answer there is nothing to learn, and without pictures in it no process waits for this one.
        batches = [batch for batch in step.micro_batches if batch.num_answer_tokens]
        totals = _Totals.of(step, batches)
        answer_tokens = totals.answer_tokens
        self.parallel.step_loss.pictures.begin_step(batches)
        summed = self._accumulate(batches, answer_tokens, count=totals.micro_batches) if answer_tokens else 0.0
        loss = summed / max(answer_tokens, 1)
        self.guard.unscale(self._trained)
        if totals.with_pictures and math.isfinite(loss) and self.guard.scale == 1.0:
            self._check_once()  # before clipping: one gradient that is not finite makes all of them so
        grad_norm = self.parallel.clip(self._trained, self._optim.max_grad_norm) if answer_tokens else 0.0
        verdict = self.guard.judge(step.step + 1, loss=loss, grad_norm=grad_norm, conversations=step.conversations)
        if verdict == "good" and answer_tokens:
            if totals.with_pictures:
                self._check_once()  # under float16's scale only a step without overflow can tell
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done = step.step + 1
        return StepRecord(
            step=step.step + 1,
            epoch=step.epoch,
            loss=loss,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            grad_norm=grad_norm,
            tokens=totals.tokens,
            positions=totals.positions,
            answer_tokens=answer_tokens,
            conversations=len(step.conversations),
            dropped=totals.dropped,
            truncated=totals.truncated,
            bad=totals.bad,
            seconds=time.perf_counter() - started,
            waited_seconds=waited_seconds,
            skipped=verdict != "good" or not answer_tokens,
            overflowed=verdict == "overflow",
            tiles=totals.tiles,
            pairs=totals.pairs,
        )

    def _check_once(self) -> None:
        """The run's first backward pass with a picture: what should learn has a finite gradient, or the run stops."""
        if not self._reach_checked:
            check_reached(self.model)
            self._reach_checked = True

    def _accumulate(self, batches: Sequence[Batch], answer_tokens: int, *, count: int | None = None) -> float:
        """Gradients of (summed loss / answer_tokens) over all micro-batches; returns the summed loss, of all processes.

        count: how many micro-batches every process computes; what is missing here are blank ones.
        """
        summed = torch.zeros((), dtype=torch.float64)
        count = len(batches) if count is None else count
        for number in range(count):
            batch = batches[number].to(self.device) if number < len(batches) else self._blank
            scale = self.guard.scale / answer_tokens
            summed += self.parallel.backward(batch, scale=scale, last=number + 1 == count).double().cpu()
        return sum_over_processes(float(summed))[0]

    def summed_loss(self, batch: Batch) -> Tensor:
        """The summed cross-entropy of a batch that lies on the model's device."""
        loss: Tensor = self.parallel.step_loss(batch)
        return loss


def _mix(*numbers: int) -> int:
    """One seed from several numbers, no two alike in practice."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
