"""Options that every command which answers has, and the model that they open."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from llava.errors import UsageError

if TYPE_CHECKING:
    from llava.inference.talk import Model

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Folder or hub id; without it the newest quickstart model.", show_default=False),
]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="The model that a LoRA, projector or delta folder stands on.")
]
TowerOption = Annotated[
    str | None, typer.Option("--vision-tower", help="The vision tower's folder or hub id, where the model has none.")
]
TemplateOption = Annotated[
    str | None, typer.Option("--template", help="Chat template; decided by the model when not given.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps, xpu; chosen when not given.")
]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16; chosen when not given.")]
LoadInOption = Annotated[
    str | None,
    typer.Option("--load-in", metavar="4bit|8bit", help="Quantise the language model's weights (llava[quant])."),
]
UrlsOption = Annotated[
    bool, typer.Option("--allow-urls", help="Fetch pictures named by http(s) addresses; public hosts only.")
]


@dataclass(frozen=True)
class Opening:
    """How a model is to be opened. path: None for the newest quickstart model."""

    path: str | None
    base: str | None = None
    vision_tower: str | None = None
    template: str | None = None
    device: str | None = None
    dtype: str | None = None
    load_in: str | None = None

    def found(self) -> Opening:
        """The same with the model that stands for None. Raises UsageError when there is none, or for a wrong option."""
        if self.load_in not in (None, "4bit", "8bit"):
            raise UsageError(f"--load-in {self.load_in}: it is 4bit or 8bit")
        return self if self.path is not None else replace(self, path=str(_newest_quickstart()))

    def of(self, path: str) -> Opening:
        """Another model on the same device and in the same numbers; its parts and template are its own affair."""
        return replace(self, path=path, base=None, vision_tower=None, template=None)

    def open(self) -> Model:
        """Open it, with a spinner where there is a terminal."""
        opening = self.found()
        assert opening.path is not None
        with working(f"opening {opening.path}"):
            import llava

            return llava.load(
                opening.path,
                base=opening.base,
                vision_tower=opening.vision_tower,
                device=opening.device,
                dtype=opening.dtype,
                load_in=cast(Any, opening.load_in),
                template=opening.template,
            )


def working(what: str) -> AbstractContextManager[Any]:
    """A spinner on stderr while something takes seconds; nothing when stderr is not a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(what)


def _newest_quickstart() -> Path:
    from llava.quickstart.latest import find_latest

    found = find_latest()
    if found is None:
        raise UsageError(
            "no model named, and no quickstart model found; run `llava quickstart` to make one in minutes, "
            "or name a model, llava-hf/llava-1.5-7b-hf for one (`llava model list` knows more)"
        )
    return found
