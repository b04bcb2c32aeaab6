"""`llava data check | show | convert`: look at a data set before hours are spent on it, or write it anew."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Check, show and convert data sets.")

_Images = Annotated[Path | None, typer.Option(help="The folder that picture paths begin in (default: the file's own).")]
_Model = Annotated[str | None, typer.Option(help="A model folder or hub id: tokens as it would see them.")]
_Template = Annotated[str | None, typer.Option(help="Another chat template than the model's own.")]


@app.callback()
def _data() -> None:
    """Check, show and convert data sets."""


@app.command()
def check(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="Conversation files; key=value with --recipe.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Check all that a recipe reads, with its model and limits, instead of files.")
    ] = None,
    images: _Images = None,
    model: _Model = None,
    template: _Template = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest conversation, pictures included (default 2048).")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for check.json and check.html.")] = Path("data-check"),
    headers: Annotated[
        bool, typer.Option("--headers", help="Read pictures' headers only: quick, but truncated files are not seen.")
    ] = False,
    show: Annotated[int, typer.Option(min=0, help="How many findings to print; all are in check.json.")] = 20,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode pictures.")] = 4,
) -> None:
    """Read every record, open every picture, and say what is wrong; exit code 2 when a run would leave something out.

    Writes every finding to check.json, and a page with pictures, histograms and coloured tokens to check.html.
    """
    import time
    import warnings

    from PIL.Image import DecompressionBombWarning

    from llava.cli.data_opening import open_files, open_recipe
    from llava.cli.data_tables import finding_lines, make_console, print_report, verdict
    from llava.data.check import check_conversations
    from llava.data.check_report import write_page

    # The picture reader has limits of its own, and names the record; Pillow's warning does not.
    warnings.filterwarnings("ignore", category=DecompressionBombWarning)
    if recipe is not None:
        opened = open_recipe(recipe, files or [], model=model, template=template, max_tokens=max_tokens)
    else:
        opened = open_files(files or [], images=images, model=model, template=template, max_tokens=max_tokens)
    begun = time.monotonic()
    with _progress("checking") as tell:
        report = check_conversations(
            opened.conversations,
            processor=opened.processor,
            limits=opened.limits,
            decode=not headers,
            workers=workers,
            progress=tell,
        )
    console = make_console()
    for line in finding_lines(report, show):
        typer.echo(line)
    print_report(report, console)
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "model": opened.model or None,
        "template": None if opened.processor is None else opened.processor.template.name,
        "pictures_decoded": not headers,
        "seconds": round(time.monotonic() - begun, 1),
    }
    report.log.write_json(out / "check.json", {**report.summary(), **facts})
    shown = {
        "verdict": "No errors: a run would use every conversation." if report.ok else verdict(report),
        "model": opened.model or "none (give --model to see tokens)",
        "checked": f"{time.strftime('%Y-%m-%d %H:%M')}, {facts['seconds']} s",
        "pictures": "headers only" if headers else "decoded in full",
    }
    write_page(out / "check.html", report, processor=opened.processor, facts=shown)
    typer.echo(f"every finding: {out / 'check.json'}; pictures, histograms, coloured tokens: {out / 'check.html'}")
    if not report.ok:
        raise typer.Exit(2)


@app.command()
def show(
    file: Annotated[str, typer.Argument(help="A file of conversations, of any format.")],
    number: Annotated[int, typer.Argument(metavar="N", help="The record's number, counted from 0.")] = 0,
    line: Annotated[int | None, typer.Option(min=1, help="Instead of N: the record at this line of the file.")] = None,
    images: _Images = None,
    model: _Model = None,
    template: _Template = None,
    html: Annotated[Path | None, typer.Option(help="Write the record as an HTML page.")] = None,
    save: Annotated[Path | None, typer.Option(help="Draw the record as a PNG.")] = None,
) -> None:
    """Show one record: its turns, its pictures, and (with --model) the prompt with what is learnt in green."""
    from llava.cli.data_opening import find_record, open_files, raw_record
    from llava.cli.data_tables import harmless, make_console, print_record
    from llava.data.record_view import draw_record, look_at_record, write_record_page
    from llava.errors import DataError

    opened = open_files([file], images=images, model=model, template=template, max_tokens=None)
    (records,) = opened.conversations.files
    index = find_record(records, number, line)
    try:
        view = look_at_record(records, index, opened.processor)
    except DataError:
        typer.echo(harmless(raw_record(records, index)))  # what the error is about
        raise
    print_record(view, make_console())
    if html is not None:
        write_record_page(html, view)
    if save is not None:
        draw_record(save, view)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A file of conversations, a table, or a folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A .json or .jsonl file; .parquet; .tar or a folder.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options of the reader, such as split=test.")
    ] = None,
    read_as: Annotated[
        str,
        typer.Option(
            "--from",
            help="llava, pairs, sharegpt, openai, parquet, webdataset, scienceqa, refcoco, coco-captions, csv, folder.",
        ),
    ] = "auto",
    to: Annotated[str, typer.Option(help="llava, pairs, sharegpt, openai, parquet, webdataset.")] = "llava",
    images: Annotated[
        Path | None, typer.Option(help="The folder of the pictures, for parquet and webdataset, which hold them.")
    ] = None,
    extract: Annotated[
        Path | None, typer.Option(help="Write pictures that lie in records to this folder, and name them there.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Put this before every picture path.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out records that cannot be converted, and list them.")
    ] = False,
) -> None:
    """Write conversations in another format, record by record; what OUT cannot hold is refused by name.

    Options of the readers: scienceqa: split, prompt (QCM-LEA); refcoco: task, wordings, split, refs, limit, seed;
    coco-captions: prompt, captions; csv: image, question, answer, id (names of columns), prompt, delimiter; folder:
    prompt, answer.
    """
    from llava.cli.data_opening import read_options
    from llava.cli.data_tables import harmless
    from llava.data.conversion import convert as convert_data

    with _progress("converting") as tell:
        done = convert_data(
            source,
            target,
            to=to,
            read_as=read_as,
            images=images,
            extract=extract,
            prefix=prefix,
            options=read_options(options or []),
            force=force,
            skip_bad=skip_bad,
            progress=lambda count: tell(count, None),
        )
    extracted = f", and {done.pictures_extracted:,} pictures to {extract}" if extract is not None else ""
    for line in done.skipped:
        typer.echo(f"left out: {harmless(line)}", err=True)
    left_out = f"; left out {len(done.skipped):,}" if done.skipped else ""
    typer.echo(f"wrote {done.records:,} records to {target} ({to}){extracted}{left_out}")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar with the time that is left, on a terminal's standard error; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
