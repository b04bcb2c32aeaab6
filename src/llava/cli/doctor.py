"""`llava doctor`: what this machine offers, what is missing, and the command that gets it.

The figures are gathered by functions that return plain values; the printing is apart, so that `--json` says the same.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Annotated, Any

import typer

import llava

# Libraries whose version explains behaviour; torchvision only to say that it is there.
_CORE = ("torch", "transformers", "tokenizers", "sentencepiece", "safetensors", "peft", "numpy", "pillow")

# What an extra is for. Its packages are read from this installation's own metadata.
_EXTRAS = {
    "quant": "models in 4 and 8 bit",
    "export": "writing GGUF files",
    "track": "numbers of a run in TensorBoard, Weights & Biases or trackio",
    "parquet": "data sets in parquet files",
    "serve": "answering over HTTP",
    "caption": "METEOR and the tokenizer of COCO Caption's scores (needs Java too)",
    "xlsx": "the file that MMBench's server takes",
    "test": "this project's own tests",
}

_GIB = 2**30


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Say what this machine offers, what is missing and how to get it."""
    about = {**read_machine(), "packages": read_versions(), "extras": read_extras(), "problems": find_problems()}
    if as_json:
        about["compute"] = read_compute()
        print(json.dumps(about))
        return
    print(f"llava {about['llava']} on Python {about['python']}, {about['system']}")
    print(f"  in {about['installed_in']}")
    print("packages")
    for name, version in about["packages"].items():
        print(f"  {name:<14}{version or 'missing: pip install --upgrade llava'}")
    print("machine")
    memory = about["memory_gib"]
    print(f"  cores         {about['cores']}")
    if memory is not None:
        print(f"  memory        {memory['free']:.1f} of {memory['total']:.1f} GiB free")
    print(
        f"  disk          {about['disk_free_gib']:.1f} GiB free here, {about['cache_free_gib']:.1f} in {about['cache']}"
    )
    _print_compute()
    print("extras")
    for name, extra in about["extras"].items():
        state = "ready" if not extra["missing"] else f"missing {', '.join(extra['missing'])}: {extra['command']}"
        print(f"  {name:<14}{_EXTRAS[name]}: {state}")
    problems = about["problems"]
    print("problems" if problems else "no problems found")
    for problem in problems:
        print(f"  {problem}")


def read_machine() -> dict[str, Any]:
    """Versions, cores, memory and disk, without importing torch. Sizes are GiB."""
    cache = cache_folder()
    return {
        "llava": llava.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "installed_in": str(Path(llava.__file__).parent),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gib": read_memory(),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / _GIB, 1),
        "cache": str(cache),
        "cache_free_gib": round(shutil.disk_usage(_existing(cache)).free / _GIB, 1),
    }


def read_memory() -> dict[str, float] | None:
    """Total and free main memory in GiB; None where the system does not say. A container's limit counts."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    except (AttributeError, ValueError, OSError):
        return None
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        free = int(available[1]) * 1024 if available else free
    limit, used = (_read_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is not None and limit < total:
        total = limit
        free = min(free, limit - (used or 0))
    return {"total": round(total / _GIB, 1), "free": round(free / _GIB, 1)}


def read_versions() -> dict[str, str | None]:
    """Versions of the libraries that decide results; None for one that is not installed."""
    return {name: _version(name) for name in _CORE}


def read_extras() -> dict[str, dict[str, Any]]:
    """For each extra the packages that are missing, and the command that installs them."""
    extras: dict[str, dict[str, Any]] = {}
    for name in _EXTRAS:
        wanted = _packages_of(name)
        missing = [package for package in wanted if _version(package) is None]
        extras[name] = {"missing": missing, "command": f"pip install 'llava[{name}]'"}
    return extras


def find_problems() -> list[str]:
    """What is known to go wrong with this installation, each with its way out."""
    problems = [*find_other_llavas(Path(llava.__file__).parent)]
    if util.find_spec("torchvision") is not None:
        problems.append(
            f"torchvision {_version('torchvision') or ''} is installed: it is not needed, and one that does not match "
            "torch breaks transformers; pip uninstall torchvision"
        )
    if util.find_spec("torchao") is not None:
        problems.append(
            "torchao is installed: it is not needed, and transformers prints its loading errors; pip uninstall torchao"
        )
    for name, version in read_versions().items():
        if version is None:
            problems.append(f"{name} is missing; pip install --upgrade llava")
    return problems


def find_other_llavas(ours: Path) -> list[str]:
    """Other packages named `llava` that are, or could be, imported instead of this one.

    ours: this package's folder. The original LLaVA, LLaVA-NeXT and several forks install a package of the same name.
    """
    problems = []
    seen = {ours.resolve()}
    for place in sys.path:
        folder = Path(place or ".") / "llava"
        if not (folder / "__init__.py").is_file() or folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        first = sys.path.index(place) < _index_of(ours.parent)
        effect = "it is imported instead of this one from here" if first else "it is hidden by this one"
        problems.append(
            f"another package named llava is in {folder.resolve()}: {effect}; pip uninstall llava, or use a virtual "
            "environment of its own for each"
        )
    others = {
        str(found.metadata["Name"])
        for found in metadata.distributions()
        if "llava" in (found.read_text("top_level.txt") or "").split() and str(found.metadata["Name"]) != "llava"
    }
    problems += [
        f"package {name!r} also installs a module named llava; pip uninstall {name}, then reinstall this one"
        for name in sorted(others)
    ]
    registered = _version("llava")
    if registered not in (None, llava.__version__):
        problems.append(
            f"the installed package llava is version {registered}, but this one is {llava.__version__}: another "
            "project of that name was installed over it; pip uninstall llava, then reinstall this one"
        )
    return problems


def read_compute() -> dict[str, Any]:
    """Devices and the number format that is chosen, with the reason. Imports torch (about 2 seconds)."""
    try:
        import torch

        from llava.distributed import pick_device, pick_dtype
    except (ImportError, OSError) as error:
        return {"error": f"torch does not load: {error}"}
    device = pick_device()
    dtype = str(pick_dtype(device)).removeprefix("torch.")
    devices = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        devices += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    about: dict[str, Any] = {
        "device": str(device),
        "devices": devices,
        "dtype": dtype,
        "dtype_reason": _dtype_reason(device.type, dtype),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        about["device_name"] = torch.cuda.get_device_name(device)
        about["device_memory_gib"] = {"total": round(total / _GIB, 1), "free": round(free / _GIB, 1)}
    return about


def cache_folder() -> Path:
    """Where models from the hub are kept."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"


def _print_compute() -> None:
    if sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("asking torch"):
            compute = read_compute()
    else:
        compute = read_compute()
    if "error" in compute:
        print(f"  {compute['error']}")
        return
    name = f" ({compute['device_name']})" if "device_name" in compute else ""
    print(f"  device        {compute['device']}{name}; found: {', '.join(compute['devices'])}")
    if "device_memory_gib" in compute:
        memory = compute["device_memory_gib"]
        print(f"                {memory['free']:.1f} of {memory['total']:.1f} GiB free")
    print(f"  dtype         {compute['dtype']}: {compute['dtype_reason']}")
    print(f"  threads       {compute['threads']}")


def _dtype_reason(device: str, dtype: str) -> str:
    if device == "cpu":
        if dtype == "bfloat16":
            return "this processor multiplies it natively"
        return "this processor has no native bfloat16, and float16 is slower on every CPU"
    return "native on this device" if dtype == "bfloat16" else "this device has no bfloat16"


def _packages_of(extra: str) -> list[str]:
    """Names of the packages of one of our extras."""
    try:
        requirements = metadata.requires("llava") or []
    except metadata.PackageNotFoundError:
        return []
    pattern = re.compile(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]")
    return [re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0] for line in requirements if pattern.search(line)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _index_of(folder: Path) -> int:
    """Where a folder stands on the import path; behind everything when it is found in another way."""
    resolved = [Path(place or ".").resolve() for place in sys.path]
    return resolved.index(folder.resolve()) if folder.resolve() in resolved else len(resolved)


def _read_number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
