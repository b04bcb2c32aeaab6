"""What `llava train RECIPE --check` prints."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from llava.train.estimate import MemoryEstimate
from llava.train.preflight import Counted, Report

_GB, _MB = (1e9, "GB"), (1e6, "MB")
_SAVERS = (
    "run.micro_batch_tokens (fewer at once), run.activation_checkpointing=full, optim.optimizer=adamw_8bit, "
    "tune.language_model=lora or qlora, or with --devices run.parallel=zero3 and run.cpu_offload=true"
)


def print_report(report: Report) -> None:
    """The report for people, on standard output."""
    from rich.console import Console

    from llava.train.progress import make_table, say_duration

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file has no width; rich would take 80 and cut numbers
    console.print(make_table(report.table, title="what trains"))
    print(_say_data(report.counted))
    print(f"Device: {_say_device(report)}")
    largest = max(estimate.total for estimate in report.memory.values())
    unit = _GB if largest >= 2e9 else _MB
    batch = report.batch
    print(
        f"Memory: a device, in {unit[1]}, by run.activation_checkpointing, with {batch.rows} x {batch.tokens:,} tokens "
        f"and {batch.tiles} tiles at once:"
    )
    console.print(_memory_table(report, unit[0]))
    chosen = report.memory[report.chosen]
    need = f"{_say_size(chosen.total)} a device"
    if not report.usable:
        print(f"Memory: {need}; how much this one has is not known")
    elif report.fits:
        print(f"Memory: fits, with {report.chosen}: {need} of {_say_size(report.usable)} usable")
    else:
        print(f"Memory: does NOT fit: {need}, {_say_size(report.usable)} are usable. What helps: {_SAVERS}")
    if chosen.host:
        print(f"        and {_say_size(chosen.host)} of main memory for each process (run.cpu_offload)")
    count = report.sharding.processes
    peak = f"{count} x {report.device.teraflops:.3g}" if count > 1 else f"{report.device.teraflops:.3g}"
    print(
        f"Time:   {say_duration(3600 * report.hours)}: {_say_flops(report.flops)} needed, at {report.mfu:.0%} of "
        f"{peak} TFLOP/s (the share is an assumption: --mfu; a run shows its own)"
    )
    print(f"Disk:   {_say_size(report.disk_bytes)} for the model and its checkpoints")
    if report.out_dir is not None:
        print(f"{report.out_dir}: a checkpoint was written there, read back and taken away again")
    print("all well; nothing was trained" if report.fits else "nothing was trained")


def _say_data(counted: Counted) -> str:
    work = counted.work
    share = work.answer_tokens / max(work.tokens, 1)
    sizes = f"{_say_count(work.tokens)} tokens ({share:.1%} of them answers), {_say_count(work.tiles)} tiles"
    if counted.assumed is not None:
        return f"Data:   assumed: {counted.assumed}; in {counted.steps:,} steps {sizes}"
    how = (
        f"counted over all {counted.counted:,}"
        if counted.is_exact
        else f"counted over {counted.counted:,} of {counted.trained:,}, the rest in proportion"
    )
    return (
        f"Data:   {counted.conversations:,} conversations, {counted.steps:,} steps; {how}: {sizes}, "
        f"{counted.padding:.1%} padding"
    )


def _say_device(report: Report) -> str:
    device, sharding = report.device, report.sharding
    rate = f"{device.teraflops:.3g} TFLOP/s {'measured' if device.measured else 'by its data sheet'}"
    memory = f", {device.memory / 2**30:.0f} GiB" if device.memory else ""
    many = f"{sharding.processes} x " if sharding.processes > 1 else ""
    mode = f", {sharding.mode}" if sharding.processes > 1 else ""
    return f"{many}{device.name} ({rate}{memory}), {report.dtype}{mode}"


def _memory_table(report: Report, unit: float) -> Any:
    from rich.table import Table

    table = Table()
    table.add_column("component")
    for mode in report.memory:
        table.add_column(f"{mode} *" if mode == report.chosen else mode, justify="right")
    columns = [dict(estimate.rows()) for estimate in report.memory.values()]
    found = {name for column in columns for name in column}
    names = [field.name.replace("_", " ") for field in fields(MemoryEstimate)]
    for name in [name for name in names if name in found]:
        table.add_row(name, *(f"{column.get(name, 0) / unit:,.2f}" for column in columns))
    table.add_section()
    table.add_row("total", *(f"{column['total'] / unit:,.2f}" for column in columns))
    return table


def _say_size(size: float) -> str:
    unit, name = _GB if size >= 2e9 else _MB
    return f"{size / unit:,.1f} {name}"


def _say_count(number: int) -> str:
    for unit, name in ((1_000_000_000, "G"), (1_000_000, "M")):
        if number >= 10 * unit or (number >= unit and name == "M"):
            return f"{number / unit:.1f} {name}"
    return f"{number:,}"


def _say_flops(flops: float) -> str:
    for unit, name in ((1e18, "exaFLOP"), (1e15, "petaFLOP"), (1e12, "teraFLOP")):
        if flops >= unit:
            return f"{flops / unit:.3g} {name}"
    return f"{flops / 1e9:.3g} gigaFLOP"
