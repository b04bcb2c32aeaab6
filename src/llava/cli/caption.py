"""`llava caption PICTURES...`: a text for every picture of a folder, printed or into a file that can be continued."""

from __future__ import annotations

from typing import Annotated

import typer

from llava.cli.answering import (
    BeamsOption,
    ForceOption,
    OutOption,
    SeedOption,
    ShowOption,
    TemperatureOption,
    TokensOption,
    Wording,
    answer_questions,
)
from llava.cli.opening import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    LoadInOption,
    ModelOption,
    Opening,
    TemplateOption,
    TowerOption,
    UrlsOption,
)


def caption(
    pictures: Annotated[list[str], typer.Argument(help="Folders, picture files, or JSONL files naming pictures.")],
    model: ModelOption = None,
    prompt: Annotated[str, typer.Option("--prompt", help="What is asked of every picture.")] = "Describe the picture.",
    beams: BeamsOption = 1,
    out: OutOption = None,
    show_dir: ShowOption = None,
    force: ForceOption = False,
    allow_urls: UrlsOption = False,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    max_new_tokens: TokensOption = 512,
    base: BaseOption = None,
    vision_tower: TowerOption = None,
    template: TemplateOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    load_in: LoadInOption = None,
) -> None:
    """Describe pictures, many at a time.

    With --out it goes on where it was stopped or killed. A picture that cannot be read is a line with an "error" there,
    counted at the end; the exit code stays 0.
    """
    from llava.inference.questions import read_questions

    answer_questions(
        read_questions(pictures, ask=[prompt], allow_urls=allow_urls),
        Opening(
            model, base=base, vision_tower=vision_tower, template=template, device=device, dtype=dtype, load_in=load_in
        ),
        Wording(beams, temperature, seed, max_new_tokens),
        command="llava caption",
        out=out,
        show_dir=show_dir,
        force=force,
    )
