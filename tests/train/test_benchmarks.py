"""The benchmark scripts run, at tiny sizes. Slow: each starts several processes that import torch and transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.slow


def run_script(name: str, *arguments: str) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(BENCHMARKS / name), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("case", ["stage2-2", "stage1-small"])
def test_every_peer_has_the_same_gradient(case: str) -> None:
    (figures,) = run_script("train.py", case, "--tiny", "--rounds", "1")
    for peer in ("hf", "fused", "ours"):
        assert figures[peer]["gradient_difference"] < 1e-5, peer  # type: ignore[index]


def test_the_gpu_script_runs_to_its_end_on_a_cpu() -> None:
    device, attention, *measured = run_script("gpu.py", "--tiny")
    assert device["peak_tflops"]
    assert attention["attention_error_over_that_of_a_mask"] < 3  # type: ignore[operator]
    assert [(line["stage"], line["per_picture"]) for line in measured] == [(1, 1), (2, 1), (2, 2), (2, 4)]
    assert all(line["mfu"] > 0 and line["recomputed"] == "none" for line in measured)  # type: ignore[operator]
