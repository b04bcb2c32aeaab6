"""The memory table of docs/train.md: gigabytes a device, by recipe and way of recomputing, from `plan_run`.

python benchmarks/memory_table.py        # prints the table; tests/train/test_memory_table.py holds the page to it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava.train.preflight import MODES, Report, plan_run
from llava.train.recipe import load_recipe
from llava.train.throughput import named_device

# What every row is reckoned with: some four conversations of LLaVA-1.5's mix at once.
TOKENS = 4096
HEAD = ("what learns", "recipe", "devices", *MODES, "hours")


@dataclass(frozen=True)
class Row:
    """A line of the table. hours: on so many A100, at the assumed share of their peak."""

    learns: str
    recipe: str
    devices: int = 1
    changes: Sequence[str] = ()

    def plan(self) -> Report:
        """Reckon it for an A100 with 80 GB."""
        recipe = load_recipe(self.recipe, [f"run.micro_batch_tokens={TOKENS}", *self.changes])
        return plan_run(recipe, on=named_device("a100"), processes=self.devices)

    def cells(self) -> tuple[str, ...]:
        """One text for each of HEAD."""
        report = self.plan()
        sizes = [f"{report.memory[mode].total / 1e9:.0f}" for mode in MODES]
        shared = "" if self.devices == 1 else f" x {report.sharding.mode}"
        return (self.learns, f"`{self.recipe}`", f"{self.devices}{shared}", *sizes, f"{report.hours:.0f}")


ROWS = (
    Row("7B: projector", "llava-v1.5-7b-align"),
    Row("7B: QLoRA, projector", "llava-v1.5-7b-qlora"),
    Row("7B: LoRA, projector", "llava-v1.5-7b-lora"),
    Row("7B: everything but the tower", "llava-v1.5-7b-instruct", changes=("optim.optimizer=adamw_8bit",)),
    Row("7B: everything but the tower", "llava-v1.5-7b-instruct", 8),
    Row("13B: LoRA, projector", "llava-v1.5-13b-lora"),
    Row("13B: everything but the tower", "llava-v1.5-13b-instruct", 8),
)


def format_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print(format_row(HEAD))
    print(format_row(["---"] * 3 + ["---:"] * 4))
    for row in ROWS:
        print(format_row(row.cells()), flush=True)
