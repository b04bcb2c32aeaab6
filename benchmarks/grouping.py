"""Does training on pictures' conversations together cost quality? Grouped against shuffled, the quickstart's task.

    python benchmarks/grouping.py [--record] [--seeds 3] [--steps 280] [--out FOLDER]

Per seed: scenes are drawn and stage 1 trained once; then stage 2 is trained twice for the same number of steps of 144
conversations: grouped (12 pictures with 12 turns each, prefix-shared) and shuffled (144 conversations, each with its
own copy of its picture, drawn without regard to pictures). Both are asked the same held-out questions. Prints the
share right of each seed and kind as one JSON line; the difference means something only beside the seeds' spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from llava.quickstart.answering import open_answerer
from llava.quickstart.bases import shipped_bases
from llava.quickstart.measure import measure
from llava.quickstart.run import Audience as Quiet
from llava.quickstart.run import QuickstartSettings, _align_overrides, _draw, _instruct_overrides, _quoted
from llava.train.recipe import load_recipe
from llava.train.run import run_recipe

ORDERS = {"grouped": [], "shuffled": ["data.group_by_picture=false", "data.conversations_per_tree=1"]}


def run_seed(folder: Path, seed: int, steps: int, held_out: int) -> dict[str, dict[str, float]]:
    """Share right by kind of question for both orders."""
    # As many scenes as the steps will show; stage 1 as long as the quickstart's own.
    settings = QuickstartSettings(
        seed=seed, num_scenes=12 * steps, align_overrides=(f"optim.epochs={0.3 * 10_000 / (12 * steps):.3f}",)
    )
    bases = shipped_bases()
    data, align = folder / "data", folder / "align"
    if not data.exists():
        _draw(data, settings, Quiet())
    run_recipe(load_recipe("quickstart-align", [*_align_overrides(data, bases, settings), f"run.out={_quoted(align)}"]))
    found = {}
    for order, changes in ORDERS.items():
        out = folder / order
        overrides = [
            *_instruct_overrides(data, align, settings),
            f"run.out={_quoted(out)}",
            f"optim.max_steps={steps}",
            *changes,
        ]
        started = time.perf_counter()
        run_recipe(load_recipe("quickstart-instruct", overrides))
        seconds = time.perf_counter() - started
        result = measure(open_answerer(out), seed=seed, num_scenes=held_out)
        found[order] = {**{str(kind): share.model for kind, share in result.accuracy().items()}, "seconds": seconds}
        print(seed, order, {kind: round(share, 3) for kind, share in found[order].items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append mean and spread to results.csv")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--held-out", type=int, default=128, help="pictures asked about")
    parser.add_argument("--out", type=Path, default=None, help="keep the runs here; finished ones are not run again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.out or Path(temporary)
        found = [
            run_seed(root / f"seed-{seed}", seed, arguments.steps, arguments.held_out)
            for seed in range(arguments.seeds)
        ]
    kinds = [kind for kind in found[0]["grouped"] if kind != "seconds"]
    table: dict[str, dict[str, list[float]]] = {
        order: {kind: [seed[order][kind] for seed in found] for kind in kinds} for order in ORDERS
    }
    for order in ORDERS:
        table[order]["mean of all kinds"] = [statistics.fmean(seed[order][kind] for kind in kinds) for seed in found]
    print(json.dumps({order: {k: [round(v, 4) for v in vs] for k, vs in row.items()} for order, row in table.items()}))
    if arguments.record:
        from record import record

        for order, rows in table.items():
            for kind, values in rows.items():
                case = f"{order}, {kind}, {arguments.steps} steps, {len(values)} seeds"
                record("grouping", case, "mean share right", statistics.fmean(values))
                if len(values) > 1:
                    record("grouping", case, "standard deviation over seeds", statistics.stdev(values))


if __name__ == "__main__":
    main()
