"""The `llava` command: names every command, imports only the one that was asked for, turns errors into one line.

A new command is one row in COMMANDS and one file in this folder. The row's target is a function with Typer's
annotations, or a `typer.Typer` when the command has commands of its own (`llava recipe list`). Modules of this folder
import torch, transformers and the rooms that need them inside their functions: `llava --help` and `llava train --help`
must answer in a fraction of a second.

Exit codes: 0 done; 1 a bug of ours (with its traceback); 2 something the user can set right (one line on stderr);
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer

from llava import __version__
from llava.distributed import is_main
from llava.errors import LlavaError


@dataclass(frozen=True)
class Command:
    """Where a command lives: `target` is "module:attribute"; `help` is its line in `llava --help`."""

    target: str
    help: str


COMMANDS: dict[str, Command] = {
    "quickstart": Command("llava.cli.quickstart:quickstart", "Train a tiny LLaVA in minutes and see how well it sees."),
    "chat": Command("llava.cli.chat:chat", "Talk with a model about pictures, or ask one question and leave."),
    "serve": Command("llava.cli.serve:serve", "Answer OpenAI chat-completions requests over HTTP."),
    "caption": Command("llava.cli.caption:caption", "Describe all pictures of a folder into a file."),
    "vqa": Command("llava.cli.vqa:vqa", "Answer a file of questions about pictures into a file."),
    "eval": Command("llava.cli.eval:app", "Measure a model with the family's benchmarks, by their official rules."),
    "train": Command("llava.cli.train:train", "Train a model as a recipe says; run it again to resume."),
    "recipe": Command("llava.cli.recipe:app", "List, show and explain training recipes."),
    "data": Command("llava.cli.data:app", "Check, show and convert data sets."),
    "convert": Command("llava.cli.convert:convert", "Write a model in another layout, compared tensor by tensor."),
    "model": Command("llava.cli.model:app", "Say what a model folder is, and what decided each part of that."),
    "doctor": Command("llava.cli.doctor:doctor", "Say what this machine offers, what is missing and how to get it."),
}

# The machine's or the user's doing, not a bug: these get one line and exit code 2.
_DISK_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "permission denied; change the permissions or choose another place",
}


def build_app(chosen: str | None) -> typer.Typer:
    """The Typer application in which only the command `chosen` is imported; the others are names with a help line."""
    app = typer.Typer(
        name="llava",
        help="Train, run, serve and measure vision-language assistants of the LLaVA family.",
        epilog="First time here? Run `llava quickstart`, then `llava chat`.",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_global_options)
    for name, command in COMMANDS.items():
        if name != chosen:
            app.command(name, help=command.help)(_placeholder)
            continue
        module, attribute = command.target.split(":")
        target = getattr(import_module(module), attribute)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name, help=command.help)
        else:
            app.command(name)(target)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (sys.argv when `arguments` is None); returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader left (`llava ... | head`). Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: Sequence[str]) -> int:
    arguments = list(arguments) or ["--help"]
    chosen = _chosen_command(arguments)
    label = "llava" if chosen is None else f"llava {chosen}"
    try:
        command = typer.main.get_command(build_app(chosen))
        result = command.main(args=arguments, prog_name="llava", standalone_mode=False, obj=arguments)
        status = result if isinstance(result, int) else 0
        if status == 130:
            return _fail(label, "stopped", status=130)
        return status
    except (KeyboardInterrupt, typer.Abort):
        return _fail(label, "stopped", status=130)
    except LlavaError as error:
        return _fail(label, str(error))
    except Exception as error:
        line = _usage_line(error) or _disk_line(error)
        if line is None:
            raise
        return _fail(label, line)


def _chosen_command(arguments: Sequence[str]) -> str | None:
    """The command that the arguments name; while the shell completes a line, the one on that line."""
    if "_LLAVA_COMPLETE" in os.environ:
        words = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
        arguments = words.split()[1:]
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    return name if name in COMMANDS else None


def _fail(label: str, message: str, *, status: int = 2) -> int:
    if status == 130 and not is_main():
        return status  # one process of several says that all have stopped
    print(f"{label}: {' '.join(message.split()) or 'failed'}", file=sys.stderr)
    return status


def _usage_line(error: Exception) -> str | None:
    """One line for a wrong option or argument; None when the error is something else.

    Typer carries click under its own name in newer versions, so the class is known by what it can do.
    """
    describe: Callable[[], str] | None = getattr(error, "format_message", None)
    if describe is None or not hasattr(error, "exit_code"):
        return None
    context: Any = getattr(error, "ctx", None)
    where = "llava" if context is None else context.command_path
    if type(error).__name__ == "NoArgsIsHelpError":
        return f"say what to do; see `{where} --help`"
    return f"{describe().rstrip('.')} (see `{where} --help`)"


def _disk_line(error: Exception) -> str | None:
    """One line for a disk that cannot be written; None when the error is something else."""
    if isinstance(error, OSError) and error.errno in _DISK_ADVICE:
        where = f"{error.filename}: " if error.filename else ""
        return where + _DISK_ADVICE[error.errno]
    # safetensors and torch wrap the system's error in their own classes and keep only its words.
    if "No space left on device" in str(error):
        return _DISK_ADVICE[errno.ENOSPC]
    return None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llava {__version__}")
        raise typer.Exit


def _global_options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    del version  # its callback has answered


def _placeholder() -> None:
    raise AssertionError("a command that was not imported ran")


if __name__ == "__main__":
    sys.exit(main())
