"""`llava convert SRC DST --to hf|original|xtuner|gguf`: any layout to any other, checked before it is put in place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from llava.errors import UsageError

if TYPE_CHECKING:
    from llava.checkpoint.convert import ConvertReport


def convert(
    places: Annotated[
        list[str] | None,
        typer.Argument(metavar="SRC DST", help="The model's folder or hub id, and the folder to write."),
    ] = None,
    to: Annotated[str, typer.Option(help="hf, original, xtuner or gguf.")] = "hf",
    base: Annotated[
        str | None, typer.Option(help="The model that a LoRA, projector, delta or XTuner folder stands on.")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="The vision tower's folder, where the config names another place.")
    ] = None,
    merge_lora: Annotated[
        bool, typer.Option("--merge-lora", help="Merge a LoRA into its base (every layout written here needs that).")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; without it numbers stay as they are.")
    ] = None,
    number_format: Annotated[str, typer.Option("--format", help="Numbers of a GGUF file: f16, q8_0 or f32.")] = "f16",
    class_token: Annotated[
        str,
        typer.Option(help="GGUF of a CLIP tower: last for today's llama.cpp, first once its issue 25814 is mended."),
    ] = "last",
    template: Annotated[str | None, typer.Option(help="Chat template, where the source names none.")] = None,
    delta: Annotated[
        str | None, typer.Option(help="A delta folder: add it to --base and write the sum to DST.", metavar="FOLDER")
    ] = None,
    make_delta: Annotated[
        bool, typer.Option("--make-delta", help="Write SRC minus --base to DST, for --delta to add again.")
    ] = False,
    extract_projector: Annotated[
        bool, typer.Option("--extract-projector", help="Write only the projector of SRC (mm_projector.bin).")
    ] = False,
    max_shard_gb: Annotated[float, typer.Option(help="Largest weight file.")] = 5.0,
) -> None:
    """Write a model in another layout: streamed, re-opened and compared tensor by tensor, then moved into place.

    The source is only read. DST must not exist yet.
    """
    source, target = _places(places or [], delta)
    if delta is not None and base is None:
        raise UsageError("--delta needs the model that it is added to: --base FOLDER")
    if make_delta and (base is None or delta is not None):
        raise UsageError("--make-delta needs SRC, DST and --base FOLDER, and no --delta")
    if number_format not in ("f16", "f32", "q8_0") or max_shard_gb <= 0:
        raise UsageError(f"--format {number_format!r}: known are f16, f32, q8_0; --max-shard-gb must be above 0")

    from llava.checkpoint import convert as conversion

    with progress_of_bytes() as begin:
        report: ConvertReport
        if make_delta:
            assert base is not None
            report = conversion.make_delta_folder(source, base, target)
        elif extract_projector:
            report = conversion.extract_projector(source, target, base=base, vision_tower=vision_tower)
        else:
            report = conversion.convert(
                source,
                target,
                to=to,
                base=base,
                vision_tower=vision_tower,
                template=template,
                dtype=dtype,
                number_format=number_format,
                class_token=class_token,
                max_shard_bytes=int(max_shard_gb * 1e9),
                begin=begin,
            )
    print(report)


def _places(places: list[str], delta: str | None) -> tuple[str, str]:
    if delta is not None:
        if len(places) != 1:
            raise UsageError("llava convert --delta D --base B DST takes one folder to write")
        return delta, places[0]
    if len(places) != 2:
        raise UsageError(f"llava convert SRC DST takes two folders, got {len(places)}")
    return places[0], places[1]


@contextmanager
def progress_of_bytes() -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A bar on stderr: `begin(total_bytes)` gives the function that is told of each tensor's bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def begin(total: int) -> Callable[[int], None]:
            task = bar.add_task("writing", total=total)
            return lambda count: bar.advance(task, count)

        yield begin
