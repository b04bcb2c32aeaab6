"""The guards around an optimizer step: numbers that are not finite, and the loss scale that float16 needs.

A step whose loss or gradient is not finite leaves the weights alone, is counted, and its records are written to
`bad_steps.jsonl`; too many in a row end the run. Under float16 a gradient that overflows because the loss was scaled
too high is another matter: the scale is halved, the step is skipped and counted apart. Both counts and the scale are
part of a checkpoint, so that a resumed run decides as the uninterrupted one did.

Not covered: gradients that are finite but absurd (optim.max_grad_norm clips those).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from llava.errors import TrainingError
from llava.train.journal import Journal

_log = logging.getLogger(__name__)

Verdict = Literal["good", "overflow", "bad"]

# As torch.amp.GradScaler: start high, halve at each overflow, double after so many steps without one.
_FIRST_SCALE = 2.0**16
_LARGEST_SCALE = 2.0**40
_STEPS_TO_DOUBLE = 2000


@dataclass
class LossScale:
    """The factor on the loss that keeps float16 gradients from vanishing: a power of two, so undoing it is exact.

    Written out rather than torch's GradScaler: the norm of the step's gradient is known here in any case and agreed
    between processes, and the state is two numbers.
    """

    value: float = _FIRST_SCALE
    good_steps: int = 0

    def halve(self) -> None:
        """The gradient overflowed at this scale."""
        self.value = max(1.0, self.value / 2)
        self.good_steps = 0

    def count_good(self) -> None:
        """A step went well; after enough of them a higher scale is tried."""
        self.good_steps += 1
        if self.good_steps == _STEPS_TO_DOUBLE:
            self.value = min(2 * self.value, _LARGEST_SCALE)
            self.good_steps = 0


class StepGuard:
    """Judges each step's loss and gradient norm, counts, and gives up after `max_bad_steps` bad ones in a row."""

    def __init__(self, *, max_bad_steps: int, dtype: torch.dtype = torch.float32) -> None:
        self.bad_steps = 0
        self.overflows = 0
        self.bad_in_a_row = 0
        self._max_bad_steps = max_bad_steps
        self._scale = LossScale() if dtype == torch.float16 else None
        self._journal: Journal | None = None
        self._origins: Callable[[Sequence[int]], Sequence[str]] = lambda numbers: [f"conversation {n}" for n in numbers]

    @property
    def scale(self) -> float:
        """What the loss is multiplied by before the backward pass."""
        return 1.0 if self._scale is None else self._scale.value

    def report_to(self, journal: Journal | None, origins: Callable[[Sequence[int]], Sequence[str]]) -> None:
        """Write the records of bad steps to a file; `origins` names conversations by their numbers ("mix.json:17")."""
        self._journal, self._origins = journal, origins

    def unscale(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the loss scale out of the gradients again."""
        if self._scale is not None:
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, 1.0 / self._scale.value)

    def judge(self, step: int, *, loss: float, grad_norm: float, conversations: Sequence[int]) -> Verdict:
        """Whether step number `step` (from 1) may move the weights.

        loss: of the whole step, not scaled; grad_norm: of the unscaled gradient. Raises TrainingError with the counts
        and the records when this is one bad step too many.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.bad_in_a_row = 0
            if self._scale is not None:
                self._scale.count_good()
            return "good"
        if self._scale is not None and math.isfinite(loss) and self._scale.value > 1:
            self.overflows += 1
            self._scale.halve()
            _log.info("step %d: the gradient overflowed float16; the loss scale is now %g", step, self._scale.value)
            return "overflow"
        self._count_bad(step, loss, grad_norm, self._origins(conversations))
        return "bad"

    def _count_bad(self, step: int, loss: float, grad_norm: float, origins: Sequence[str]) -> None:
        self.bad_steps += 1
        self.bad_in_a_row += 1
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        shown = ", ".join(origins[:3]) + (f" and {len(origins) - 3} more" if len(origins) > 3 else "")
        listed = ""
        if self._journal is not None:
            listed = f"; all are in {self._journal.path}"
            # As text: JSON has no word for what is not finite.
            self._journal.write({"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "records": [*origins]})
        if self.bad_in_a_row >= self._max_bad_steps:
            raise TrainingError(
                f"{what}: not finite for {self.bad_in_a_row} steps in a row, {self.bad_steps} of the run in all "
                f"({shown}{listed}); lower optim.learning_rate, or look at these records with `llava data check`"
            )
        _log.warning("%s; the weights were left alone (%s%s)", what, shown, listed)

    def state_dict(self) -> dict[str, Any]:
        """What the next step's judgement depends on, and the counts so far."""
        state: dict[str, Any] = {
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self.bad_in_a_row,
            "overflows": self.overflows,
        }
        if self._scale is not None:
            state |= {"loss_scale": self._scale.value, "good_steps": self._scale.good_steps}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the guard whose state_dict this is."""
        self.bad_steps = int(state["bad_steps"])
        self.bad_in_a_row = int(state["bad_in_a_row"])
        self.overflows = int(state["overflows"])
        if self._scale is not None:
            self._scale = LossScale(float(state["loss_scale"]), int(state["good_steps"]))
