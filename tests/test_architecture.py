"""The house rules that code can check: who imports whom, what stays light, that the map names every module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "llava"

# cli > quickstart > web, eval > serve, train > inference, data > checkpoint > model > prompt > errors, distributed
LEVEL = {
    "errors": 0,
    "distributed": 1,
    "prompt": 2,
    "model": 3,
    "checkpoint": 4,
    "inference": 5,
    "data": 5,
    "serve": 6,
    "train": 6,
    "web": 7,
    "eval": 7,
    "quickstart": 8,
    "cli": 9,
    "__main__": 10,
}
NO_TORCH = ["llava", "llava.errors", "llava.distributed", "llava.prompt.conversation", "llava.prompt.templates",
            "llava.prompt.tiling", "llava.prompt.processor", "llava.cli.main"]  # fmt: skip


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of a llava room in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" if node.module == "llava" else node.module for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "llava" and len(parts) > 1 and parts[1] in LEVEL:
                yield node.lineno, parts[1]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        pytest.skip("the package's front door names its rooms lazily")
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {other}"
        for line, other in imported_rooms(path)
        if other != room and LEVEL[other] >= LEVEL[room]
    ]
    assert not wrong, wrong


def test_every_room_has_a_place_in_the_order() -> None:
    assert {room_of(path) for path in modules()} - {"__init__"} <= set(LEVEL)


@pytest.mark.parametrize("module", NO_TORCH)
def test_light_modules_import_neither_torch_nor_transformers(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'gradio') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_map_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = [str(path.relative_to(SOURCE)) for path in modules() if path.name != "__init__.py"]
    missing = [name for name in names if f"`{name}`" not in text]
    assert not missing, f"docs/architecture.md has no line for {missing}"


def test_the_map_names_no_module_that_is_gone() -> None:
    import re

    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([a-z_]+(?:/[a-z_0-9]+)*\.py)`", text, flags=re.MULTILINE))
    gone = [name for name in sorted(named) if not (SOURCE / name).exists()]
    assert not gone


def test_broad_excepts_stand_only_at_the_borders() -> None:
    allowed = {"cli/main.py"}
    wrong = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                names = [name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)] if node.type else [""]
                cleans_up = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None  # and hides nothing
                if {"", "Exception", "BaseException"} & set(names) and not cleans_up:
                    wrong.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert [place for place in wrong if place.split(":")[0] not in allowed and not place.startswith("serve/")] == []


def test_the_code_never_reaches_for_what_the_project_refuses() -> None:
    refused = ("trust_remote_code=True", "import torchvision", "pickle.load", "weights_only=False")
    wrong = [
        f"{path.relative_to(SOURCE)}: {word}"
        for path in modules()
        for word in refused
        if word in path.read_text(encoding="utf-8")
    ]
    assert not wrong
