"""What a run with LoRA leaves: adapters and trained tensors, and a manifest that says which base they belong to.

    llava.json                    the manifest: base and its fingerprint, configuration, what was trained, the recipe
    adapter_config.json,          the language model's LoRA under its own names, as peft and the original read it
    adapter_model.safetensors
    visual_encoder_adapter/       the tower's LoRA, where XTuner keeps it, as peft reads it on the tower alone
    non_lora_trainables.bin       every other trained tensor under the original's names (tensors only, no code)
    config.json                   in the original's words where it could open the folder, else in Hugging Face's
    tokenizer and picture settings

The base is opened by the path in the manifest, or by `base=` where it lies elsewhere now, and refused when its weights
are not the ones that were tuned. Merging is W + scale * B @ A in float32 into the base's own weights, whatever format
they had in training: that is how a QLoRA run becomes a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava.checkpoint.adapters import Adapter, LoraPair, merged, read_adapter
from llava.checkpoint.fingerprint import file_digest, fingerprint
from llava.checkpoint.names import LANGUAGE_MODEL, ORIGINAL, ORIGINAL_MPT, TOWER
from llava.checkpoint.opened import Decision, Opened, OpenOptions
from llava.checkpoint.processors import make_processor, open_tokenizer
from llava.checkpoint.weights import Source, read_file
from llava.errors import CheckpointError
from llava.model.config import LlavaConfig

if TYPE_CHECKING:
    from llava.prompt.processor import Processor

MANIFEST = "llava.json"
FORMAT = "llava tuned"
VERSION = 1
TRAINED = "non_lora_trainables.bin"
PEFT_PREFIX = "base_model.model."
TOWER_ADAPTER = "visual_encoder_adapter"
ROWS = ".added_rows"  # in place of ".weight": rows of added tokens, whose ids are in the manifest


@dataclass(frozen=True)
class Manifest:
    """llava.json. base: `Opened.origin` of what was tuned; weights: its fingerprint; files: digests by name."""

    base: Mapping[str, Any]
    weights: str
    config: Mapping[str, Any]
    trained: tuple[Mapping[str, Any], ...]
    added_ids: tuple[int, ...]
    files: Mapping[str, str]
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **vars(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises CheckpointError for a file that is not such a manifest, or of a later version."""
        path = folder / MANIFEST
        try:
            data = json.loads(path.read_text("utf-8"))
            if data["version"] > VERSION:
                raise CheckpointError(f"{path}: version {data['version']}, written by a newer llava; upgrade this one")
            return cls(
                base=dict(data["base"]),
                weights=str(data["weights"]),
                config=dict(data["config"]),
                trained=tuple(data["trained"]),
                added_ids=tuple(int(token) for token in data["added_ids"]),
                files=dict(data["files"]),
                recipe=dict(data["recipe"]),
                versions=dict(data["versions"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a manifest ({type(error).__name__}: {error}); restore it") from error


def detect(folder: Path, data: Mapping[str, Any]) -> bool:
    """Whether a folder has such a manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def read(folder: Path, data: Mapping[str, Any], options: OpenOptions) -> Opened:
    """Understand a folder: its base opened and compared, trained tensors in place, adapters merged or beside.

    Raises CheckpointError when the base is not there or is another one, or a file is damaged.
    """
    manifest = Manifest.read(folder)
    _check_files(folder, manifest)
    base = reopen(manifest.base, options, folder)
    found = fingerprint(base.tensors)
    if found != manifest.weights:
        raise CheckpointError(
            f"{folder}: was tuned on {_spoken(manifest.base)} (weights {manifest.weights[:19]}...), but "
            f"{_spoken(base.origin)} holds other weights ({found[:19]}...); name the right one with base=, --base"
        )
    config = LlavaConfig.from_dict(manifest.config, origin=str(folder / MANIFEST))
    why = "llava.json"
    if options.template is not None:
        from llava.prompt.templates import get_template

        config, why = config.with_changes(template=get_template(options.template).name), "asked for"
    tensors, ignored = _with_trained(dict(base.tensors), folder, manifest, config)
    pairs = _pairs(folder)
    adapter: Adapter | None = None
    if pairs:
        adapter = Adapter(folder, {}, pairs, {})
        if options.merge_lora:
            tensors, adapter = merged(tensors, adapter, lambda name: name), None
    return Opened(
        format="tuned",
        folder=folder,
        config=config,
        tensors=tensors,
        processor=lambda: _processor(config, folder),
        decisions=(
            Decision("format", "tuned", f"{MANIFEST}: format"),
            Decision("base", _spoken(base.origin), "base= was given" if options.base else f"{MANIFEST}: base"),
            Decision("trained", _listed(manifest.trained), f"{MANIFEST}: trained"),
            Decision("template", config.template, why),
            Decision("image mode", config.image_mode, f"{MANIFEST}: config"),
        ),
        ignored={**base.ignored, **ignored},
        adapter=adapter,
        naming=base.naming,
        tower_name=base.tower_name,
    )


def reopen(origin: Mapping[str, Any], options: OpenOptions, folder: Path) -> Opened:
    """What `Opened.origin` says, opened again; options.base and options.vision_tower take the recorded places' place.

    folder: who asks. Raises CheckpointError naming it when the recorded base is not there.
    """
    from llava.checkpoint.load import open_checkpoint, open_parts

    try:
        if "path" in origin:
            named = {key: origin[key] for key in ("template",) if key in origin}
            if "base" in origin and options.base is None:
                named["base"] = _place(origin["base"], folder)
            tower = options.vision_tower or origin.get("vision_tower")
            path = options.base or _place(origin["path"], folder)
            return open_checkpoint(path, vision_tower=tower, **named)
        return open_parts(
            options.base or _place(origin["language_model"], folder),
            options.vision_tower or _place(origin["vision_tower"], folder),
            **origin["settings"],
        )
    except CheckpointError as error:
        if options.base is not None:
            raise
        raise CheckpointError(
            f"{folder}: was tuned on {_spoken(origin)}, which does not open ({error}); name the base with base=, --base"
        ) from error


def _place(recorded: str, folder: Path) -> str | Path:
    """A recorded path as it is, or seen from the folder that recorded it (moved together with its base)."""
    if Path(recorded).expanduser().is_dir():
        return recorded
    for start in (folder, *folder.absolute().parents):
        if (start / recorded).is_dir():
            return start / recorded
    beside = folder.absolute().parent / Path(recorded).name
    return beside if Path(recorded).is_absolute() and beside.is_dir() else recorded


def _spoken(origin: Mapping[str, Any]) -> str:
    if "path" in origin:
        return str(origin["path"])
    return f"{origin.get('language_model')} with {origin.get('vision_tower')}"


def _listed(trained: tuple[Mapping[str, Any], ...]) -> str:
    return ", ".join(f"{part['part']} {part['mode']}" for part in trained if part.get("trained"))


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name, digest in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file, but {MANIFEST} lists it; the copy is incomplete")
        if file_digest(path) != digest:
            raise CheckpointError(f"{path}: not the file that {MANIFEST} describes; it is damaged or was replaced")


def _pairs(folder: Path) -> dict[str, LoraPair]:
    """Every adapted weight's pair, by the common name of its module."""
    found: dict[str, LoraPair] = {}
    for place, table in ((folder, LANGUAGE_MODEL), (folder / TOWER_ADAPTER, TOWER)):
        if not (place / "adapter_config.json").is_file():
            continue
        for module, pair in read_adapter(place).pairs.items():
            common = table.rename(f"{module}.weight")
            if common is None:
                raise CheckpointError(f"{pair.a.file}: {pair.a.key!r} adapts {module!r}; no name of that part")
            found[common.removesuffix(".weight")] = pair
    return {module: replace(pair) for module, pair in found.items()}


def _with_trained(
    tensors: dict[str, Source], folder: Path, manifest: Manifest, config: LlavaConfig
) -> tuple[dict[str, Source], dict[str, str]]:
    """The base's tensors with the trained ones in their places; and what of the base has no place any more."""
    ignored: dict[str, str] = {}
    if (folder / TRAINED).is_file():
        table = ORIGINAL_MPT if config.text_config["model_type"] == "mpt" else ORIGINAL
        for key, source in read_file(folder / TRAINED).items():
            common = table.rename(key.removeprefix(PEFT_PREFIX))
            if common is None:
                raise CheckpointError(f"{folder / TRAINED}: unexpected key {key!r} of shape {list(source.shape)}")
            if common.endswith(ROWS):
                weight = common.removesuffix(ROWS) + ".weight"
                tensors[weight] = with_rows(tensors[weight], manifest.added_ids, source)
            else:
                tensors[common] = source
    if not config.has_newline and "image_newline" in tensors:
        ignored[tensors.pop("image_newline").key] = f"merge type {config.merge_type!r} has no newline"
    return tensors, ignored


def with_rows(weight: Source, ids: tuple[int, ...], rows: Source) -> Source:
    """A matrix (V, D) with rows (K, D) in the places `ids`, in the wider of both number formats."""
    if rows.shape != (len(ids), *weight.shape[1:]):
        raise CheckpointError(
            f"{rows.file}: {rows.key!r} has shape {list(rows.shape)}, expected {[len(ids), *weight.shape[1:]]}"
        )
    dtype = torch.promote_types(weight.dtype, rows.dtype)

    def read() -> torch.Tensor:
        value = weight.read().to(dtype, copy=True)
        value[list(ids)] = rows.read().to(dtype)
        return value

    return Source(weight.shape, dtype, weight.file, weight.key, read)


def _processor(config: LlavaConfig, folder: Path) -> Processor:
    return make_processor(config, open_tokenizer(folder), folder)
