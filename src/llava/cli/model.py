"""`llava model show PATH`: what a model folder is, and what decided that; `merge PATH --out DIR`; `list`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from llava.cli.model_list import list_models

app = typer.Typer(no_args_is_help=True, help="Look into a model folder; name models; merge adapters.")
app.command("list")(list_models)


@app.callback()
def _model() -> None:
    """Look into a model folder."""


@app.command()
def show(
    path: Annotated[str, typer.Argument(help="Folder or hub id.")],
    base: Annotated[str | None, typer.Option(help="The model that a LoRA, projector or delta stands on.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="The vision tower's folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say a model's format, parts, sizes, template, tiling and projector, what decided each, and what is missing.

    Reads no tensors. The exit code is 2 when something is missing.
    """
    about = describe(path, base=base, vision_tower=vision_tower)
    if as_json:
        print(json.dumps(about))
    elif "language_model" in about:
        _print(about)
    else:
        _print_end(about)
    if about["problems"]:
        raise typer.Exit(2)


@app.command()
def merge(
    path: Annotated[str, typer.Argument(help="A folder with adapters: what a run with LoRA left.")],
    out: Annotated[str, typer.Option("--out", help="The folder to write; it must not exist yet.")],
    base: Annotated[str | None, typer.Option(help="The base, where it is not where the folder says.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="The vision tower's folder.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; without it the base's own format.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where scores are compared: cpu, cuda, ...")] = None,
) -> None:
    """Add adapters to their base, write one whole model, and compare its scores with those of base and adapters.

    The model opens in `llava chat`, stock transformers, vLLM and SGLang.
    """
    from llava.checkpoint.merging import merge as merge_adapters
    from llava.cli.convert import progress_of_bytes

    with progress_of_bytes() as begin:
        report = merge_adapters(
            path, out, base=base, vision_tower=vision_tower, dtype=dtype, device=device, begin=begin
        )
    print(report)


def describe(path: str, *, base: str | None = None, vision_tower: str | None = None) -> dict[str, Any]:
    """What `llava model show` knows about a folder, as plain values."""
    from llava.checkpoint import original
    from llava.checkpoint.folders import find_folder, read_config
    from llava.checkpoint.load import open_checkpoint
    from llava.checkpoint.opened import check_tensors, empty_model
    from llava.errors import CheckpointError, UsageError

    try:
        opened = open_checkpoint(path, base=base, vision_tower=vision_tower)
    except UsageError as error:
        # a part without its base: what the folder alone says
        folder = find_folder(path)
        data = read_config(folder)
        if base is not None or not original.detect(folder, data):
            raise
        decisions = [{"what": d.what, "value": d.value, "because": d.because} for d in original.outline(folder, data)]
        files = sorted(str(file) for file in folder.iterdir())
        about: dict[str, Any] = {"path": str(folder), "format": "original, without its base", "files": files}
        return {**about, "decisions": decisions, "ignored": {}, "notes": [], "problems": [str(error)]}
    config = opened.config
    problems = []
    try:
        check_tensors(opened, empty_model(config))
    except CheckpointError as error:
        problems.append(str(error))
    parts: dict[str, int] = {}
    for name, source in opened.tensors.items():
        part = name.partition(".")[0]
        count = 1
        for side in source.shape:
            count *= side
        parts[part] = parts.get(part, 0) + count
    dtypes = sorted({str(source.dtype).removeprefix("torch.") for source in opened.tensors.values()})
    return {
        "path": str(opened.folder),
        "format": opened.format,
        "parameters": parts,
        "bytes": sum(source.num_bytes for source in opened.tensors.values()),
        "dtypes": dtypes,
        "files": sorted({str(source.file) for source in opened.tensors.values()}),
        "language_model": {
            "type": config.text_config["model_type"],
            "width": config.text_width,
            "layers": config.text_config.get("num_hidden_layers", config.text_config.get("n_layers")),
            "vocabulary": config.vocab_size,
        },
        "vision_tower": {
            "type": config.vision_config["model_type"],
            "image_size": config.image_size,
            "patches_per_side": config.patches_per_side,
            "feature_layer": config.vision_feature_layer,
            "feature_select": config.vision_feature_select,
        },
        "projector": config.projector,
        "template": config.template,
        "image_mode": config.image_mode,
        "image_grid_pinpoints": [list(point) for point in config.image_grid_pinpoints],
        "merge_type": config.merge_type,
        "features_per_tile": config.features_per_tile,
        "image_token_id": config.image_token_id,
        "image_start_end": config.image_start_end,
        "decisions": [{"what": d.what, "value": d.value, "because": d.because} for d in opened.decisions],
        "ignored": dict(opened.ignored),
        "notes": list(opened.notes),
        "problems": problems,
    }


def _print(about: dict[str, Any]) -> None:
    language, tower = about["language_model"], about["vision_tower"]
    print(f"{about['path']}: {about['format']}")
    size = f"{about['bytes'] / 1e6:,.1f} MB, {', '.join(about['dtypes'])}"
    print(f"  {sum(about['parameters'].values()):,} parameters, {size}")
    for part, count in about["parameters"].items():
        print(f"    {part:<24}{count:>16,}")
    print(
        f"  language model   {language['type']}, {language['layers']} layers x {language['width']}, "
        f"vocabulary {language['vocabulary']}"
    )
    print(
        f"  vision tower     {tower['type']}, {tower['image_size']} px, {tower['patches_per_side']} x "
        f"{tower['patches_per_side']} patches, layer {tower['feature_layer']} ({tower['feature_select']})"
    )
    print(f"  projector        {about['projector']}")
    print(f"  template         {about['template']}" + (", start/end tokens" if about["image_start_end"] else ""))
    tiling = (
        f" from {about['image_grid_pinpoints']}, merged {about['merge_type']}"
        if about["image_mode"] == "anyres"
        else ""
    )
    print(f"  pictures         {about['image_mode']}{tiling}, {about['features_per_tile']} features a tile")
    _print_end(about, headed=True)


def _print_end(about: dict[str, Any], *, headed: bool = False) -> None:
    if not headed:
        print(f"{about['path']}: {about['format']}")
    print("  decided by")
    for decision in about["decisions"]:
        print(f"    {decision['what']}: {decision['value']} ({decision['because']})")
    if about["ignored"]:
        keys = list(about["ignored"].items())
        print(f"  ignored          {len(keys)} keys, the first {keys[0][0]} ({keys[0][1]})")
    for note in about["notes"]:
        print(f"  note             {note}")
    for problem in about["problems"]:
        print(f"  MISSING          {problem}")
