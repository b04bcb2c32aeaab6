"""What a step made of the device: the share of its peak rate, and the memory that was taken."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from llava.model.llava import Llava
from llava.train.throughput import Cost, Device, Work, measure_rate, this_device

if TYPE_CHECKING:
    from llava.train.loop import StepRecord


class Meter:
    """Reads a run's steps. model: stage applied; dtype: of matrix products; processes: how many share each step."""

    def __init__(self, model: Llava, *, device: torch.device, dtype: torch.dtype, processes: int = 1) -> None:
        self._cost = Cost.of_model(model)
        self._device = device
        self._dtype = dtype
        self._processes = processes
        self._seen = 0.0  # TFLOP/s, where a measured peak turned out too low

    @property
    def device(self) -> Device:
        """The device that the shares are of; on a CPU its rate is measured at the first call (some 50 ms)."""
        return _known_device(self._device, self._dtype)

    def mfu(self, record: StepRecord) -> float:
        """Needed FLOPs of a step over what all devices could have done in its time, waiting for data included."""
        work = Work(record.tokens, record.answer_tokens, record.tiles, record.pairs)
        seconds = self._processes * (record.seconds + record.waited_seconds)
        reached = self._cost.of(work) / max(seconds, 1e-9) / 1e12
        peak = max(self.device.teraflops, self._seen)
        if reached > peak and self.device.measured:
            # Measured while other programs had the processor: measure again, and no step is faster than the peak.
            peak = self._seen = max(reached, measure_rate(self._device, self._dtype))
        return reached / max(peak, 1e-12)

    def memory(self) -> int:
        """The most bytes that were taken so far: of the device's allocator, or of this process on a CPU."""
        if self._device.type == "cpu":
            return _peak_resident()
        most = getattr(torch.accelerator, "max_memory_allocated", None)
        return int(most(self._device)) if most is not None else 0


@lru_cache(maxsize=8)
def _known_device(device: torch.device, dtype: torch.dtype) -> Device:
    return this_device(device, dtype)


def _peak_resident() -> int:
    """Bytes of main memory that this process held at most; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
