"""MFU is needed work over possible work; memory is what the process took."""

from dataclasses import replace

import pytest
import torch

from llava.train import meter
from llava.train.meter import Meter
from llava.train.sections import TuneSection
from llava.train.stages import apply_stage
from llava.train.throughput import Cost, Device, Work
from tests.train.test_metrics import record
from tests.train.tiny_training import build_tiny_llava

CPU = torch.device("cpu")


def test_mfu_is_the_share_of_what_all_devices_could_have_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_known_device", lambda device, dtype: Device("toy", 2.0, 0))
    model = build_tiny_llava()
    apply_stage(model, TuneSection())
    step = record(1, tiles=3, pairs=700)
    needed = Cost.of_model(model).of(Work(step.tokens, step.answer_tokens, 3, 700))
    possible = 2e12 * (step.seconds + step.waited_seconds)
    one, four = (Meter(model, device=CPU, dtype=torch.float32, processes=n) for n in (1, 4))
    assert one.mfu(step) == pytest.approx(needed / possible)
    assert four.mfu(step) == pytest.approx(needed / possible / 4)


def test_a_peak_measured_too_low_is_measured_again_and_no_step_is_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_known_device", lambda device, dtype: Device("busy", 1e-12, 0, measured=True))
    monkeypatch.setattr(meter, "measure_rate", lambda device, dtype: 1e-11)
    model = build_tiny_llava()
    apply_stage(model, TuneSection())
    read = Meter(model, device=CPU, dtype=torch.float32)
    quick, slow = record(1), record(2)
    assert read.mfu(quick) == pytest.approx(1.0)
    assert read.mfu(replace(slow, seconds=2 * quick.seconds + quick.waited_seconds)) == pytest.approx(0.5)


def test_memory_is_what_the_process_took_at_most() -> None:
    read = Meter(build_tiny_llava(), device=CPU, dtype=torch.float32)
    before = read.memory()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert read.memory() >= max(before, held.nbytes)
    assert 50 << 20 < before < 1 << 40


def test_the_rate_is_measured_once_a_process() -> None:
    first, second = (Meter(build_tiny_llava(), device=CPU, dtype=torch.float32).device for _ in range(2))
    assert first is second
    assert first.measured
