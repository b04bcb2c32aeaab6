"""`llava data check FILE --images DIR`: every record and every picture, before hours are spent on them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Check a data set before hours are spent on it.")


@app.callback()
def _data() -> None:
    """Check a data set before hours are spent on it."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A LLaVA JSON or JSONL file.")],
    images: Annotated[Path | None, typer.Option(help="The folder that picture paths begin in.")] = None,
    model: Annotated[str | None, typer.Option(help="A model folder: counts tokens as it would see them.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Name conversations that are longer.")] = None,
    show: Annotated[int, typer.Option(min=0, help="How many problems to print.")] = 20,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode pictures.")] = 4,
) -> None:
    """Read every record and open every picture; exit code 2 when there are problems."""
    from llava.data.check import check_conversations
    from llava.data.sources import read_conversations
    from llava.errors import UsageError

    if images is not None and not images.is_dir():
        raise UsageError(f"--images {images}: no such folder")
    processor = None
    if model is not None:
        from llava.checkpoint.load import find_folder
        from llava.prompt.processor import Processor

        processor = Processor.load(find_folder(model))

    def tell(done: int, total: int) -> None:
        if sys.stderr.isatty():
            typer.echo(f"\r{done:,}/{total:,}", nl=done == total, err=True)

    opened = read_conversations(file, image_root=images)
    report = check_conversations(opened, processor=processor, max_tokens=max_tokens, workers=workers, progress=tell)
    for line in report.lines(shown=show):
        typer.echo(line)
    if not report.ok:
        raise typer.Exit(2)
