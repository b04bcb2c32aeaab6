"""How long `llava --help` and `import llava` take as whole processes, against an empty Python, run in turn.

python benchmarks/help.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

from record import record

CASES = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import llava": [sys.executable, "-c", "import llava"],
    "llava --help": [sys.executable, "-m", "llava.cli.main", "--help"],
}
ROUNDS = 7


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS + 1):
        for name, command in CASES.items():
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first run warms the disk
    for name, value in medians.items():
        record("help", name, "seconds_median", value)
    print(json.dumps({"benchmark": "help", "seconds_median": medians, "rounds": ROUNDS}))


if __name__ == "__main__":
    main()
