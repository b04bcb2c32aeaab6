"""Measure the quickstart's base models against their gates and print JSON; exit 1 where one falls short.

    python benchmarks/quickstart_bases.py [--bases FOLDER] [--scenes 400]

Tower: shape, colour and box per patch that lies on an object, on held-out scenes painted by either renderer. Language
model: held-out scenes of two to four objects as text. Without --bases the files shipped in the package are measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from llava.quickstart.bases import load_bases, open_bases, recipe_hash, shipped_bases
from llava.quickstart.gates import list_short_gates, measure_bases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=Path, help="a folder that rebuild_bases wrote")
    parser.add_argument("--scenes", type=int, default=400)
    arguments = parser.parse_args()
    bases = open_bases(arguments.bases) if arguments.bases else shipped_bases()
    folder = bases.vision_tower.parent
    started = time.monotonic()
    device = torch.device("cpu")
    gates = measure_bases(*load_bases(folder, device=device), device=device, num_scenes=arguments.scenes)
    short = list_short_gates(gates)
    facts = {
        "gates": {part: {kind: round(value, 4) for kind, value in marks.items()} for part, marks in gates.items()},
        "short": short,
        "scenes": arguments.scenes,
        "recipe_matches": bases.facts["recipe_hash"] == recipe_hash(),
        "megabytes": round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 2),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(facts, indent=2))
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
