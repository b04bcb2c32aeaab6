"""`llava train RECIPE key=value...`: train as a recipe says; the same command again goes on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava.distributed import is_main
from llava.errors import TrainingError, UsageError
from llava.train.stopping import leaving_on_request

if TYPE_CHECKING:
    from llava.train.sections import Recipe


def _tell_stopped() -> None:
    if is_main():
        typer.echo("llava train: stopped", err=True)


@leaving_on_request(_tell_stopped)
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
    check: Annotated[
        bool,
        typer.Option("--check", help="Open everything, count, estimate memory and hours, try a save; train nothing."),
    ] = False,
    shapes: Annotated[
        bool, typer.Option("--shapes", help="With --check: reckon from configurations alone, without weights or data.")
    ] = False,
    on: Annotated[
        str | None, typer.Option(metavar="GPU", help="With --check: reckon for this device (h100, a100, 4090, ...).")
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="With --check: the share of the device's peak to reckon with.")
    ] = 0.4,
    sample: Annotated[
        int, typer.Option(min=0, metavar="N", help="With --check: count tokens over N conversations; 0: all.")
    ] = 512,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on (as without it), but refuse to begin where nothing was saved.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start anew instead of going on.")] = False,
) -> None:
    """Train a model as a recipe says. Stopped with Ctrl-C it saves; the same command goes on from there.

    Example: llava train llava-v1.5-7b-instruct model.path=runs/align data.files=\\[mine.json] --out runs/mine
    """
    from llava.train.recipe import load_recipe

    changes = list(overrides or [])
    if out is not None:
        changes.append(f"run.out={_as_yaml(str(out))}")
    loaded = load_recipe(recipe, changes)
    if check:
        fits = _check(loaded, shapes=shapes, on=on, processes=devices or 1, mfu=mfu, sample=sample)
        raise typer.Exit(0 if fits else 1)
    if shapes or on is not None:
        raise UsageError("--shapes and --on go with --check; a run takes the device that run.device names")
    if resume and is_main():
        _require_checkpoint(loaded, restart=restart)
    from llava.cli.processes import one_voice, start_processes

    start_processes(context.obj, devices)
    from llava.train.progress import TerminalWatcher
    from llava.train.run import run_recipe

    with one_voice(), _memory_named(loaded):
        result = run_recipe(loaded, resume=not restart, watcher=TerminalWatcher())
    if not is_main():
        return
    if result.first_step == result.total_steps:
        typer.echo(f"{result.out_dir}: finished already ({result.total_steps} steps); --restart trains it anew")
        return
    typer.echo(f"{result.out_dir}: done, {result.total_steps} steps, loss {result.loss:.3f}, {result.seconds:.0f} s")
    typer.echo(f"Next: llava chat {shlex.quote(str(result.out_dir))}")


@contextmanager
def _memory_named(recipe: Recipe) -> Iterator[None]:
    """A device that ran out of memory is a line that says what helps."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the device ran out of memory; lower run.micro_batch_tokens (now {recipe.run.micro_batch_tokens}), set "
            "run.activation_checkpointing=full, or let fewer weights learn (tune.language_model=lora or qlora); "
            "--check estimates what each needs, and the same command goes on from the newest checkpoint"
        ) from error


def _check(recipe: Recipe, *, shapes: bool, on: str | None, processes: int, mfu: float, sample: int) -> bool:
    """Print what a run would be; whether it fits."""
    from llava.cli.train_report import print_report
    from llava.distributed import pick_device, pick_dtype
    from llava.train.preflight import check_run, plan_run
    from llava.train.throughput import DEVICES, named_device, this_device

    device = None if on is None else named_device(on)
    if not shapes:
        report = check_run(recipe, on=device, processes=processes, mfu=mfu, sample=sample)
    else:
        if device is None:
            here = pick_device(recipe.run.device)
            if here.type == "cpu":
                raise UsageError(f"--shapes on a CPU: name the device to reckon for with --on: {', '.join(DEVICES)}")
            device = this_device(here, pick_dtype(here, recipe.run.dtype))
        report = plan_run(recipe, on=device, processes=processes, mfu=mfu)
    print_report(report)
    return report.fits


def _require_checkpoint(recipe: Recipe, *, restart: bool) -> None:
    """Raise UsageError when --resume has nothing to go on from."""
    from llava.train.prepare import out_dir_of
    from llava.train.state import list_checkpoints

    if restart:
        raise UsageError("--resume goes on and --restart starts anew; give one of them")
    out_dir = out_dir_of(recipe)
    if not list_checkpoints(out_dir / "checkpoints") and not (out_dir / "run.json").is_file():
        raise UsageError(f"{out_dir}: nothing to resume, no run was saved there; leave --resume out to begin one")


def _as_yaml(text: str) -> str:
    """A string as YAML that stays a string ("2024" is a folder, not a number)."""
    return "'" + text.replace("'", "''") + "'"
