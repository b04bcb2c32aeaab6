"""Does sharing a picture's tokens cost quality? Grouped against shuffled on the quickstart's task, several seeds.

    python benchmarks/grouping.py WORK_FOLDER [--seeds 3] [--steps 400] [--batch 48] [--scenes 3000] [--record]

Stage 1 of the quickstart once a seed; then stage 2 from there, the same scenes and number of steps: with up to 12
conversations on a picture in one tree (`data.group_by_picture=true`, what `llava train` does), with up to 4, and
shuffled over the epoch one by one. A grouped step holds the same number of conversations about fewer pictures: that is
what could cost.
Held-out accuracy by kind, and a table for docs/speed.md: each layout's mean, and the spread over the seeds.
Unfinished runs go on when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev

# Changes of the quickstart's stage 2, whose trees hold up to 12 conversations.
LAYOUTS = {
    "grouped": ["data.group_by_picture=true"],
    "grouped-by-4": ["data.group_by_picture=true", "data.conversations_per_tree=4"],
    "shuffled": ["data.group_by_picture=false"],
}


def run_seed(
    folder: Path, seed: int, *, steps: int, batch: int, scenes: int, held_out: int
) -> dict[str, dict[str, float]]:
    """Accuracy by layout and kind."""
    from llava.data.scene_files import write_scenes
    from llava.quickstart.answering import open_answerer
    from llava.quickstart.bases import shipped_bases
    from llava.quickstart.measure import measure
    from llava.train.recipe import load_recipe
    from llava.train.run import run_recipe

    place = folder / f"seed-{seed}"
    data, bases = place / "data", shipped_bases()
    if not data.exists():
        half_done = data.with_name("data.partial")
        write_scenes(half_done, scenes, seed)
        half_done.replace(data)
    common = [f"data.images={quoted(data / 'images')}", f"run.seed={seed}"]
    align = [
        f"model.language_model={quoted(bases.language_model)}",
        f"model.vision_tower={quoted(bases.vision_tower)}",
        f"model.vision_feature_layer={bases.facts['vision_feature_layer']}",
        f"data.files=[{quoted(data / 'captions.json')}]",
        f"run.out={quoted(place / 'align')}",
        "optim.epochs=1.0",
        f"optim.max_steps={max(1, steps // 2)}",
    ]
    run_recipe(load_recipe("quickstart-align", [*common, *align]))
    found: dict[str, dict[str, float]] = {}
    for layout, changes in LAYOUTS.items():
        instruct = [
            f"model.path={quoted(place / 'align')}",
            f"data.files=[{quoted(data / 'conversations.json')}]",
            f"optim.max_steps={steps}",
            f"optim.batch_conversations={batch}",
            f"run.out={quoted(place / layout)}",
            *changes,
        ]
        run_recipe(load_recipe("quickstart-instruct", [*common, *instruct]))
        measured = measure(open_answerer(place / layout), seed=seed, num_scenes=held_out)
        found[layout] = {kind: accuracy.model for kind, accuracy in measured.accuracy().items()}
    return found


def quoted(path: Path) -> str:
    """A path as YAML that stays a string."""
    return json.dumps(str(path))


def table(seeds: Mapping[int, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown: a line a kind, means over seeds and their largest spread (standard deviation)."""
    kinds = list(next(iter(seeds.values()))["grouped"])
    lines = [f"| kind | {' | '.join(LAYOUTS)} | spread over seeds |", "|---" * (len(LAYOUTS) + 2) + "|"]
    for kind in [*kinds, "mean"]:
        values = {
            layout: [fmean(one[layout].values()) if kind == "mean" else one[layout][kind] for one in seeds.values()]
            for layout in LAYOUTS
        }
        spread = max(stdev(v) if len(v) > 1 else 0.0 for v in values.values())
        means = " | ".join(f"{fmean(v):.3f}" for v in values.values())
        lines.append(f"| {kind} | {means} | {spread:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of stage 2; stage 1 takes half")
    parser.add_argument("--batch", type=int, default=48, help="conversations a step of stage 2")
    parser.add_argument("--scenes", type=int, default=3000)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    seeds = {}
    for seed in range(options.seeds):
        seeds[seed] = run_seed(
            options.folder,
            seed,
            steps=options.steps,
            batch=options.batch,
            scenes=options.scenes,
            held_out=options.held_out,
        )
        print(json.dumps({"benchmark": "grouping", "seed": seed, **seeds[seed]}), flush=True)
    print(table(seeds))
    if options.record:
        from record import record

        for seed, layouts in seeds.items():
            for layout, kinds in layouts.items():
                for kind, accuracy in kinds.items():
                    record("grouping", f"{layout}, seed {seed}", f"{kind}_accuracy", accuracy)


if __name__ == "__main__":
    main()
