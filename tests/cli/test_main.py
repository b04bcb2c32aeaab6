from __future__ import annotations

import errno
import subprocess
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import typer

import llava
from llava.cli import main as cli
from llava.errors import CheckpointError

HEAVY = ("torch", "transformers", "numpy", "PIL", "prompt_toolkit")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "llava.cli.main", *arguments], capture_output=True, text=True)


def with_command(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Make `llava probe` run a function."""
    module = ModuleType("probe_module")
    module.probe = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "probe_module", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("probe_module:probe", "Probe."))


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["doctor", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from llava.cli.main import main; status = main(sys.argv[1:]);"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []")


def test_every_command_of_the_table_exists() -> None:
    for name, command in cli.COMMANDS.items():
        module, attribute = command.target.split(":")
        assert callable(getattr(import_module(module), attribute)), name


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "quickstart" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llava {llava.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chatt"], "did you mean 'chat'"),
        (["--wrong"], "--wrong"),
        (["chat", "--wrong"], "llava chat --help"),
        (["chat", "--temperature", "warm"], "--temperature"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert says.lower() in shown.err.lower()
    assert shown.err.count("\n") == 1


def raising(error: BaseException) -> Any:
    def probe() -> None:
        raise error

    return probe


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (CheckpointError("model.safetensors: damaged;\n download it again"), 2, "damaged; download it again"),
        (KeyboardInterrupt(), 130, "stopped"),
        (typer.Abort(), 130, "stopped"),
        (typer.Exit(3), 3, ""),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors"),
            2,
            "out/model.safetensors: the disk",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "/root/x: permission denied"),
    ],
)
def test_errors_are_one_line_and_their_own_exit_code(
    error: BaseException,
    status: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_command(monkeypatch, raising(error))
    assert cli.main(["probe"]) == status
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("\n") == (1 if says else 0)


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "No such file", "x")])
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with_command(monkeypatch, raising(error))
    with pytest.raises(type(error)):
        cli.main(["probe"])


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "import sys, time; from llava.cli.main import main; time.sleep(0.3); sys.exit(main(['--help']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_a_command_with_commands_of_its_own_is_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()
    app.command("one")(lambda: typer.echo("one ran"))
    app.command("two")(lambda: typer.echo("two ran"))
    with_command(monkeypatch, app)
    assert cli.main(["probe", "two"]) == 0
    assert capsys.readouterr().out == "two ran\n"
    assert cli.main(["probe", "three"]) == 2


def test_the_shell_completes_a_commands_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_LLAVA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "llava doctor --j")
    monkeypatch.setenv("COMP_CWORD", "2")
    done = subprocess.run([sys.executable, "-m", "llava.cli.main"], capture_output=True, text=True)
    assert "--json" in done.stdout
