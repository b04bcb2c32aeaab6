"""`llava train RECIPE key=value...`: train as a recipe says; the same command again goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava.distributed import is_main

if TYPE_CHECKING:
    from llava.train.sections import Recipe


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one (`llava recipe list`).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Values that replace the recipe's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; it becomes a model that `llava chat` opens.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes to start on this machine, one a device.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Open and check everything, train nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start anew instead of going on.")] = False,
) -> None:
    """Train a model as a recipe says. Stopped with Ctrl-C it saves; the same command goes on from there.

    Example: llava train llava-v1.5-7b-instruct model.path=runs/align data.files=[mine.json] --out runs/mine
    """
    from llava.train.recipe import load_recipe

    changes = list(overrides or [])
    if out is not None:
        changes.append(f"run.out={_as_yaml(str(out))}")
    loaded = load_recipe(recipe, changes)
    if check:
        _check(loaded)
        return
    from llava.cli.processes import one_voice, start_processes

    start_processes(context.obj, devices)
    from llava.train.progress import TerminalWatcher
    from llava.train.run import run_recipe

    with one_voice():
        result = run_recipe(loaded, resume=not restart, watcher=TerminalWatcher())
    if not is_main():
        return
    if result.first_step == result.total_steps:
        typer.echo(f"{result.out_dir}: finished already ({result.total_steps} steps); --restart trains it anew")
        return
    typer.echo(f"{result.out_dir}: done, {result.total_steps} steps, loss {result.loss:.3f}, {result.seconds:.0f} s")
    typer.echo(f"Next: llava chat {result.out_dir}")


def _check(recipe: Recipe) -> None:
    """Print what a run would do."""
    from llava.train.prepare import prepare_run

    prepared = prepare_run(recipe)
    info = prepared.info
    for part, mode, parameters, trained, rate, rank, held_in in info.table:
        more = f"  rate {rate}" * bool(rate) + f"  LoRA rank {rank}" * bool(rank) + f"  in {held_in}" * bool(held_in)
        typer.echo(f"{part:<14}  {mode:<11}  {parameters:>16}  {trained}{more}".rstrip())
    first = prepared.loader.make(0)
    tokens = sum(batch.num_tokens for batch in first.micro_batches)
    positions = sum(batch.input_ids.numel() for batch in first.micro_batches)
    typer.echo(
        f"{info.conversations:,} conversations, {info.total_steps:,} steps on {info.device} in {info.dtype}; "
        f"the first step: {len(first.conversations)} conversations, {tokens:,} tokens "
        f"({first.num_answer_tokens:,} of them answers, {1 - tokens / positions:.0%} padding), "
        f"{len(first.micro_batches)} micro-batches"
    )
    typer.echo("all well; nothing was trained")


def _as_yaml(text: str) -> str:
    """A string as YAML that stays a string ("2024" is a folder, not a number)."""
    return "'" + text.replace("'", "''") + "'"
