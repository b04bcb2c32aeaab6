"""Fail when the quickstart's report misses a kind, or its assistant does not see.

The bars here are far below what a run reaches (README), so that a slow machine passes and a blind model does not.
"""

import json
import sys
from pathlib import Path

KINDS = (
    "existence", "colour", "shape", "size", "count", "count_all", "region", "relation", "multiple_choice", "box",
    "refer", "caption", "detail",
)  # fmt: skip
BARS = {"existence": 0.8, "colour": 0.8, "shape": 0.8, "count_all": 0.8, "region": 0.7, "caption": 0.7}

report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
accuracy = report["accuracy"]
missing = [kind for kind in KINDS if kind not in accuracy]
if missing:
    sys.exit(f"report.json has no accuracy for {', '.join(missing)}")
for kind in KINDS:
    row = accuracy[kind]
    print(f"{kind:16}", *(f"{name} {value:.2f}" for name, value in row.items() if value is not None))
low = {kind: accuracy[kind]["model"] for kind, bar in BARS.items() if accuracy[kind]["model"] < bar}
if low:
    sys.exit(f"the quickstart's assistant does not see: {low}")
print("seconds:", report["seconds"])
