"""The shipped recipes at a glance: whose they are, what learns, and the numbers that decide a run.

`llava recipe list` prints it, docs/recipes.md holds it as a table (a test compares the two).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from llava.train.recipe import load_recipe, shipped_recipes
from llava.train.sections import LoraSection, Recipe

# By the first word of a recipe's name, in the order of the list.
FAMILIES = {
    "quickstart": "Quickstart",
    "llava": "LLaVA (Liu et al.)",
    "xtuner": "XTuner",
    "paddlemix": "PaddleMIX",
}
COLUMNS = ("recipe", "starts from", "data", "learns", "batch", "rate", "epochs", "tokens")
_PART_WORDS = {"vision_tower": "tower", "projector": "projector", "language_model": "language model"}


@dataclass(frozen=True)
class Entry:
    """A shipped recipe with its family's heading."""

    family: str
    name: str
    recipe: Recipe

    @property
    def cells(self) -> tuple[str, ...]:
        """One text for each of COLUMNS."""
        recipe = self.recipe
        model, data, optim = recipe.model, recipe.data, recipe.optim
        files = [*data.files, *(source.file for source in data.sources)]
        first = PurePosixPath(files[0]).name
        return (
            self.name,
            model.path or f"{model.language_model} + {model.vision_tower}",
            first if len(files) == 1 else f"{first} and {len(files) - 1} more",
            describe_learning(recipe),
            str(optim.batch_conversations),
            _rates(recipe),
            f"{optim.epochs:g}",
            str(data.max_tokens),
        )


def catalogue() -> list[Entry]:
    """Every shipped recipe, family by family."""
    entries = [Entry(name.split("-")[0], name, load_recipe(name)) for name in shipped_recipes()]
    order = list(FAMILIES)
    return sorted(entries, key=lambda entry: (order.index(entry.family), entry.name))


def by_family() -> Iterator[tuple[str, list[Entry]]]:
    """(heading, recipes), in the order of the list."""
    entries = catalogue()
    for family, heading in FAMILIES.items():
        yield heading, [entry for entry in entries if entry.family == family]


def describe_learning(recipe: Recipe) -> str:
    """What a recipe trains, in words: "projector, language model QLoRA r512, tower LoRA r64"."""
    tune = recipe.tune
    said, held = [], ""
    for part in ("projector", "language_model", "vision_tower"):
        mode: str = getattr(tune, part)
        lora: LoraSection = getattr(tune, f"{part}_lora")
        words = {
            "full": "",
            "lora": f" LoRA r{lora.rank}",
            "qlora": f" QLoRA r{lora.rank}",
            "last_layers": f" last {getattr(tune, f'{part}_layers')} layers",
        }
        if mode in words:
            said.append(_PART_WORDS[part] + words[mode])
        elif mode == "frozen_4bit":
            held += f" ({_PART_WORDS[part]} frozen in 4 bits)"
    return ", ".join(said) + held


def markdown_table(entries: Sequence[Entry]) -> str:
    """The entries as a Markdown table under COLUMNS."""
    rows = [COLUMNS, tuple("-" * len(column) for column in COLUMNS)]
    rows += [(f"`{cells[0]}`", *cells[1:]) for cells in (entry.cells for entry in entries)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rates(recipe: Recipe) -> str:
    """The peak rate, and those of parts that have their own."""
    optim = recipe.optim
    own = {
        "projector": optim.projector_learning_rate,
        "tower": optim.vision_tower_learning_rate,
        "language model": optim.language_model_learning_rate,
    }
    said = [f"{_short(optim.learning_rate)}"] + [f"{part} {_short(rate)}" for part, rate in own.items() if rate]
    return ", ".join(said)


def _short(rate: float) -> str:
    """2e-5 as people write it."""
    mantissa, exponent = f"{rate:.6e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
