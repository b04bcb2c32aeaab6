"""The training loop: one optimizer step from one global step's micro-batches, and the guards around it.

`Trainer.step` is all there is to it: forward, loss over answer tokens divided by the answer tokens of the whole step,
backward, guards, clip, AdamW. Where the batches come from and when to save is train/run.py's business.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.data.batch import Batch
from llava.data.loader import GlobalStep
from llava.model.llava import Llava
from llava.model.tree_attention import enable_tree_attention
from llava.train.guards import StepGuard
from llava.train.loss import answer_loss
from llava.train.optimizer import build_optimizer, clip_gradients, rate_share, set_rate
from llava.train.sections import OptimSection
from llava.train.stages import check_reached


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did.

    loss: mean over the step's answer tokens; learning_rate: of the first group; grad_norm: before clipping;
    tokens: without padding, positions: with it; seconds: of the step itself; waited_seconds: for the loader before it;
    skipped: the weights were left alone because the gradient was not finite; overflowed: because float16's loss scale
        was too high, which is no fault of the data.
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

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds + self.waited_seconds, 1e-9)

    @property
    def supervised_share(self) -> float:
        """Answer tokens among all tokens."""
        return self.answer_tokens / max(self.tokens, 1)


class Trainer:
    """A model with its optimizer and schedule. `dtype` is what matrix products are computed in, under autocast."""

    def __init__(
        self, model: Llava, *, optim: OptimSection, total_steps: int, dtype: torch.dtype, max_bad_steps: int = 10
    ) -> None:
        self.model = model
        self.device = model.device
        self.optimizer = build_optimizer(model.named_parameters(), optim)
        self.done = 0
        self._optim = optim
        self._total_steps = total_steps
        self._dtype = dtype
        self.guard = StepGuard(max_bad_steps=max_bad_steps, dtype=dtype)
        self._reach_checked = False
        # 3x less time in attention than with the mask; families that cannot take the mask.
        self._by_trees = enable_tree_attention(model.language_model)
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
        answer_tokens = step.num_answer_tokens
        summed = self._accumulate(step.micro_batches, answer_tokens) if answer_tokens else 0.0
        loss = summed / max(answer_tokens, 1)
        self.guard.unscale(self._trained)
        grad_norm = clip_gradients(self._trained, self._optim.max_grad_norm) if answer_tokens else 0.0
        verdict = self.guard.judge(step.step + 1, loss=loss, grad_norm=grad_norm, conversations=step.conversations)
        if verdict == "good" and answer_tokens:
            if not self._reach_checked and any(batch.pixel_values is not None for batch in step.micro_batches):
                check_reached(self.model)
                self._reach_checked = True
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done = step.step + 1
        return StepRecord(
            step=step.step + 1,
            epoch=step.epoch,
            loss=loss,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            grad_norm=grad_norm,
            tokens=sum(batch.num_tokens for batch in step.micro_batches),
            positions=sum(batch.input_ids.numel() for batch in step.micro_batches),
            answer_tokens=answer_tokens,
            conversations=len(step.conversations),
            dropped=step.dropped,
            seconds=time.perf_counter() - started,
            waited_seconds=waited_seconds,
            skipped=verdict != "good" or not answer_tokens,
            overflowed=verdict == "overflow",
        )

    def _accumulate(self, batches: Sequence[Batch], answer_tokens: int) -> float:
        """Gradients of (summed loss / answer_tokens) over all micro-batches; returns the summed loss."""
        summed = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            if not batch.num_answer_tokens:
                continue
            loss = self.summed_loss(batch.to(self.device))
            torch.autograd.backward(loss * self.guard.scale / answer_tokens)
            summed += loss.detach().double().cpu()
        return float(summed)

    def summed_loss(self, batch: Batch) -> Tensor:
        """The summed cross-entropy of a batch that lies on the model's device."""
        with self._autocast():
            hidden = self.model(
                batch.input_ids,
                pixel_values=batch.pixel_values,
                image_sizes=batch.image_sizes,
                tiles_per_image=batch.tiles_per_image,
                position_ids=batch.position_ids,
                attention_mask=None if self._by_trees else batch.attention_mask(),
                tree_layout=batch.layout if self._by_trees else None,
            )
            return answer_loss(hidden, self.model.logits, predictors=batch.predictors, targets=batch.targets)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._dtype in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)
