"""`llava quickstart`: from nothing to an assistant that sees, in about five minutes on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llava.quickstart.run import Audience


def quickstart(
    out: Annotated[Path, typer.Option(help="Where data, runs, model and report go.")] = Path("llava-quickstart"),
    seed: Annotated[int, typer.Option(help="Decides scenes, questions and training order.", min=0)] = 0,
    rebuild_bases: Annotated[
        bool, typer.Option("--rebuild-bases", help="Train the two tiny bases anew instead (up to 2 hours on a CPU).")
    ] = False,
) -> None:
    """Draw pictures, train a tiny LLaVA on them in two stages, and report how well it sees.

    Run it again after an interruption: finished work is kept.
    """
    if rebuild_bases:
        _rebuild_bases(out, seed)
        return
    from rich.console import Console
    from rich.table import Table

    from llava.quickstart.latest import remember
    from llava.quickstart.run import QuickstartSettings, next_commands, run_quickstart

    console = Console()
    result = run_quickstart(out, QuickstartSettings(seed=seed), audience=_terminal_audience())
    remember(result.model)
    figures = result.figures
    table = Table("kind", "model", "wrong picture", "no binding", "majority", title="Held-out accuracy")
    accuracy = figures["accuracy"]
    assert isinstance(accuracy, dict)
    for kind, row in accuracy.items():
        cells = [row["model"], row["wrong_picture"], row["no_binding"], row["majority"]]
        table.add_row(kind, *("" if value is None else f"{value:.2f}" for value in cells))
    console.print(table)
    seconds = figures["seconds"]
    assert isinstance(seconds, dict)
    console.print("seconds: " + ", ".join(f"{phase} {value:.0f}" for phase, value in seconds.items()))
    console.print(f"report: {result.report.resolve()}", soft_wrap=True)
    console.print("\nnext:")
    for what, command in next_commands(result.model):
        # no markup: a command may hold brackets
        console.print(f"  {command}    # {what}", highlight=False, markup=False, soft_wrap=True)


def _rebuild_bases(out: Path, seed: int) -> None:
    """Train the bases from nothing into OUT/bases, showing each part's progress."""
    import time

    from llava.distributed import pick_device
    from llava.quickstart.bases import RebuildProgress, rebuild_bases

    told = 0.0

    def show(now: RebuildProgress) -> None:
        nonlocal told
        if now.step < now.num_steps and time.monotonic() - told < 10:
            return
        told = time.monotonic()
        figures = ", ".join(f"{name} {value:.3f}" for name, value in now.figures.items())
        left = f"{now.seconds_left / 60:.0f} min left"
        typer.echo(f"{now.part}: step {now.step:,}/{now.num_steps:,}, {left}; {figures}", err=True)

    bases = rebuild_bases(out / "bases", seed=seed, device=pick_device(), progress=show)
    for part, gates in bases.facts["gates"].items():
        typer.echo(f"{part}: " + ", ".join(f"{kind} {value:.3f}" for kind, value in gates.items()))
    typer.echo(f"bases: {(out / 'bases').resolve()}")


def _terminal_audience() -> Audience:
    """Lines and bars on stderr; without a terminal, lines only."""
    from collections.abc import Callable, Iterator
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from llava.quickstart.run import Audience
    from llava.train.progress import TerminalWatcher, Watcher

    console = Console(stderr=True)

    class Terminal(Audience):
        def say(self, line: str) -> None:
            console.print(f"[bold]{line}[/bold]", highlight=False)

        @contextmanager
        def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
            columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
            with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
                task = progress.add_task(title, total=total)
                yield lambda done: progress.update(task, completed=done)

        def watcher(self, label: str) -> Watcher:
            return TerminalWatcher(label=label)

    return Terminal()
