"""The quickstart from start to end: wall-clock by phase and accuracy by kind, as one JSON line and rows in results.csv.

    python benchmarks/quickstart.py [--seeds 0 1 2] [--out DIR]

Every seed is a whole run in a folder of its own. The controls stand beside each accuracy; a speed without them would
say nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from llava.quickstart.run import QuickstartSettings, run_quickstart
from record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llava-quickstart-") as temporary:
        root = arguments.out or Path(temporary)
        for seed in arguments.seeds:
            figures: dict[str, Any] = run_quickstart(root / f"seed-{seed}", QuickstartSettings(seed=seed)).figures
            write_rows(f"seed {seed}", figures)
            print(json.dumps({"benchmark": "quickstart", "seed": seed, **figures}))


def write_rows(case: str, figures: dict[str, Any]) -> None:
    """Rows of one run: seconds of each phase and in all, and each kind's accuracy over its best control."""
    for phase, seconds in figures["seconds"].items():
        record("quickstart", case, f"{phase}_seconds", seconds)
    record("quickstart", case, "all_seconds", sum(figures["seconds"].values()))
    for kind, row in figures["accuracy"].items():
        controls = [value for name, value in row.items() if name != "model" and value is not None]
        record("quickstart", case, f"{kind}_accuracy", row["model"])
        record("quickstart", case, f"{kind}_best_control", max(controls))


if __name__ == "__main__":
    main()
