"""A run's folder reproduces the run: its recipe.yaml trains the same weights, to the byte."""

import json
from pathlib import Path

import pytest

from llava.train.metrics import read_metrics
from llava.train.recipe import load_recipe
from llava.train.run import run_recipe
from tests.train.test_run import make_recipe
from tests.train.test_run import world as world


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["tune.language_model=frozen", "data.template=plain", "run.seed=7"],
        ["tune.language_model=lora", "data.workers=2", "run.micro_batch_tokens=300"],
    ],
    ids=["full", "projector", "lora"],
)
def test_the_recipe_in_a_runs_folder_gives_the_same_weights(world: Path, tmp_path: Path, changes: list[str]) -> None:
    first = run_recipe(make_recipe(world, tmp_path / "first", *changes))
    again = run_recipe(load_recipe(first.out_dir / "recipe.yaml", [f"run.out={tmp_path / 'elsewhere' / 'again'}"]))
    weights = sorted(path.name for path in first.out_dir.glob("*.safetensors"))
    assert weights
    for name in weights:
        assert (again.out_dir / name).read_bytes() == (first.out_dir / name).read_bytes()
    losses = [[line["loss"] for line in read_metrics(run.metrics_path)] for run in (first, again)]
    assert losses[0] == losses[1]


def test_the_folder_says_what_made_it(world: Path, tmp_path: Path) -> None:
    made = run_recipe(make_recipe(world, tmp_path / "run", "run.seed=3", "optim.max_steps=1"))
    described = json.loads((made.out_dir / "run.json").read_text())
    assert described["seed"] == 3
    assert {"llava", "python", "torch", "transformers"} <= set(described["versions"])
    assert described["recipe"] == load_recipe(made.out_dir / "recipe.yaml").model_dump(mode="json")
    assert described["data"], "a fingerprint of the data"
