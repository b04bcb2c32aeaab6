"""Append measurements to results.csv, with what is needed to read them later: date, device, versions, commit."""

from __future__ import annotations

import csv
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = ("date", "benchmark", "case", "metric", "value", "device", "versions", "commit")


def record(benchmark: str, case: str, metric: str, value: float, *, device: str = "cpu", path: Path = RESULTS) -> None:
    """Append one row; the file is made with its header when it is missing. value is written with 4 digits."""
    new = not path.exists()
    row = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "benchmark": benchmark,
        "case": case,
        "metric": metric,
        "value": f"{value:.4g}",
        "device": describe_device(device),
        "versions": " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers")),
        "commit": read_commit(),
    }
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def describe_device(device: str) -> str:
    """The processor's or accelerator's name."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if (cpuinfo.exists())
        else []
    )
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def read_commit() -> str:
    """The commit of the working tree, with a + when files differ from it."""
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "diff", "--quiet", "HEAD", "--", "../src", "."], cwd=folder, capture_output=True
        ).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")
