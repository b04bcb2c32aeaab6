"""The original's layout (LLaVA v0, v1, v1.5, v1.6 and trainers built on it): full models, projectors, LoRA, deltas.

One folder with the language model's config.json plus `mm_*` keys. The language model's keys are Hugging Face's, the
projector's are `model.mm_projector.*`; the tower comes from the folder or hub id that the config names, unless
`unfreeze_mm_vision_tower` is true: then its weights are in the checkpoint. All of it is read from config.json and
from the files; the original looked at the folder's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava.checkpoint import huggingface
from llava.checkpoint.adapters import is_adapter, merged, read_adapter
from llava.checkpoint.folders import find_folder, read_config
from llava.checkpoint.names import COMPUTED, MULTI_LAYER_PROJECTOR, ORIGINAL, ORIGINAL_MPT, Renaming, refuse_strangers
from llava.checkpoint.opened import HEAD, Decision, Opened, OpenOptions
from llava.checkpoint.original_settings import language_part, language_type, settings
from llava.checkpoint.parts import embedding_name, language_config, open_language_model, open_tower, read_language_model
from llava.checkpoint.processors import choose_template, make_processor, open_tokenizer
from llava.checkpoint.weights import WEIGHT_FILES, Source, read_file, read_folder
from llava.errors import CheckpointError, UnknownFormatError, UsageError

if TYPE_CHECKING:
    from llava.prompt.tokenizer import Tokenizer

PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
START_END = ("<im_start>", "<im_end>")


def detect(folder: Path, data: Mapping[str, Any]) -> bool:
    """Whether config.json has the original's `mm_` keys, or the folder its projector or LoRA files."""
    if "text_config" in data:
        return False
    has_files = (folder / PROJECTOR_FILE).is_file() or (folder / NON_LORA_FILE).is_file()
    return has_files or "mm_vision_tower" in data or "mm_hidden_size" in data


def read(folder: Path, data: Mapping[str, Any], options: OpenOptions) -> Opened:
    """Understand a folder of this layout.

    Raises UsageError when it needs a base and none was given, CheckpointError for settings that are not known here.
    """
    if "mm_vision_tower" not in data:
        raise CheckpointError(
            f"{folder / 'config.json'}: no mm_vision_tower; copy the config.json that was written beside the weights"
        )
    if is_adapter(folder):
        return _read_on_base(folder, data, options, kind="lora")
    if any((folder / name).is_file() for name in WEIGHT_FILES):
        return read_full(folder, data, options)
    if (folder / PROJECTOR_FILE).is_file():
        return _read_on_base(folder, data, options, kind="projector")
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:12])
    looked = ", ".join([*WEIGHT_FILES, PROJECTOR_FILE, "adapter_config.json"])
    raise UnknownFormatError(f"{folder}: config.json is a LLaVA's, but no weights; looked for {looked}; found: {found}")


def outline(folder: Path, data: Mapping[str, Any]) -> tuple[Decision, ...]:
    """What config.json and file names alone say, for a folder whose base is not at hand."""
    kind = "a LoRA adapter" if is_adapter(folder) else "a projector"
    return (
        Decision("weights", f"{kind}, to be put on a base", "the files in the folder"),
        Decision("vision tower", str(data.get("mm_vision_tower")), "config.json: mm_vision_tower"),
        Decision(
            "projector", str(data.get("mm_projector_type", "linear")), _because(data, "mm_projector_type", "linear")
        ),
        Decision(
            "image mode", str(data.get("image_aspect_ratio", "square")), _because(data, "image_aspect_ratio", "square")
        ),
        Decision(
            "merge type", str(data.get("mm_patch_merge_type", "flat")), _because(data, "mm_patch_merge_type", "flat")
        ),
        Decision("base", str(data.get("_name_or_path")), "config.json: _name_or_path, as it was called in training"),
    )


@dataclass(frozen=True)
class _Parts:
    """A language model's side of a checkpoint, before tower and settings are joined to it."""

    text_config: dict[str, Any]
    tensors: dict[str, Source]
    tokenizer_folder: Path
    ignored: dict[str, str]
    decisions: tuple[Decision, ...]
    adapter: Any = None


def read_full(
    folder: Path,
    data: Mapping[str, Any],
    options: OpenOptions,
    *,
    raw: Mapping[str, Source] | None = None,
    name: str = "original",
    tokenizer_folder: Path | None = None,
) -> Opened:
    """A whole model. raw, tokenizer_folder: its tensors under this layout's names and where its tokenizer is, for
    formats that keep the same model in other files; `name` is then theirs.
    """
    kind = language_type(data, folder)
    text_config = language_config({**language_part(data), "model_type": kind}, folder)
    raw = read_language_model(read_folder(folder) if raw is None else raw, kind, data, folder)
    tensors, ignored = _renamed(raw, kind)
    because = f"config.json: model_type {data.get('model_type')!r}"
    parts = _Parts(
        text_config, tensors, tokenizer_folder or folder, ignored, (Decision("language model", kind, because),)
    )
    if options.base is not None and name == "original":
        parts = _on_delta_base(folder, parts, options.base)
    return _join(folder, data, options, parts, name=name)


def _read_on_base(folder: Path, data: Mapping[str, Any], options: OpenOptions, *, kind: str) -> Opened:
    """A projector-only or LoRA folder: its language model, tokenizer and maybe projector come from the base."""
    what = {"projector": f"only a projector ({PROJECTOR_FILE})", "lora": "a LoRA adapter"}[kind]
    if options.base is None:
        named = data.get("_name_or_path")
        hint = f" (config.json was made from {named!r})" if named else ""
        raise UsageError(f"{folder}: holds {what}; name the model it was trained on with base=, --base{hint}")
    parts = read_base(options.base)
    extra = projector_tensors(folder / PROJECTOR_FILE) if kind == "projector" else _non_lora(folder / NON_LORA_FILE)
    if kind == "lora" and not any(
        name.startswith("multi_modal_projector.") for name in {**parts.tensors, **extra.tensors}
    ):
        raise CheckpointError(
            f"{folder / NON_LORA_FILE}: holds no projector, and neither does {options.base}; the original writes it at "
            "the end of training: copy it, or give a LLaVA as the base"
        )
    parts.tensors.update(extra.tensors)
    adapter = None
    if kind == "lora":
        adapter = replace(read_adapter(folder), rename=naming(parts.text_config["model_type"]).rename)
        if options.merge_lora:
            parts = replace(parts, tensors=merged(parts.tensors, adapter, adapter.rename))
    because = f"{kind} files" if kind == "lora" else PROJECTOR_FILE
    decisions = (*parts.decisions, Decision("weights", f"{what} on {options.base}", because))
    parts = replace(parts, decisions=decisions, adapter=None if options.merge_lora else adapter)
    name = {"projector": "original projector", "lora": "original LoRA"}[kind]
    return _join(folder, data, options, parts, name=name, token_rows=extra.embedding)


def read_base(base: Path) -> _Parts:
    """The base of a projector, LoRA or delta: a language model's folder, or a whole LLaVA."""
    path = base / "config.json"
    data = read_config(base)
    if not data:
        raise CheckpointError(f"{base}: no config.json; the base must be a language model's or a LLaVA's folder")
    ignored: dict[str, str] = {}
    if "text_config" in data:
        whole = huggingface.read(base, data, OpenOptions())
        text_config, tensors = dict(whole.config.text_config), dict(whole.tensors)
        kind = str(text_config["model_type"])
    elif detect(base, data):
        kind = language_type(data, base)
        text_config = language_config({**language_part(data), "model_type": kind}, base)
        tensors, ignored = _renamed(read_language_model(read_folder(base), kind, data, base), kind)
    else:
        kind = str(data.get("model_type"))
        text_config, tensors = open_language_model(base, data)
    return _Parts(text_config, tensors, base, ignored, (Decision("language model", kind, f"{path}: model_type"),))


def naming(kind: str, *, layered: bool = False) -> Renaming:
    """The table of a language model's family; layered: for a projector of several layers."""
    if layered:
        return MULTI_LAYER_PROJECTOR[kind == "mpt"]
    return ORIGINAL_MPT if kind == "mpt" else ORIGINAL


def _renamed(raw: Mapping[str, Source], kind: str) -> tuple[dict[str, Source], dict[str, str]]:
    tensors, unknown = naming(kind).rename_all(raw)
    ignored = {name: "computed, not learnt" for name in raw if COMPUTED.search(name)}
    refuse_strangers(raw, unknown, f"a {kind} LLaVA")
    return {name: source for name, source in tensors.items() if not COMPUTED.search(name)}, ignored


@dataclass(frozen=True)
class _Extra:
    """Tensors beside a language model: a projector under common names, and rows for the start and end tokens."""

    tensors: dict[str, Source]
    embedding: Source | None


def projector_tensors(path: Path, *, rounded: bool = True) -> _Extra:
    """mm_projector.bin in any of its spellings: whatever stands before `mm_projector.` is dropped.

    rounded: to float16, as the original's loader does with this file: answers then equal the original's.
    """
    extra = _split_extra(read_file(path), path)
    if not rounded:
        return extra
    return replace(extra, tensors={name: _in_float16(source) for name, source in extra.tensors.items()})


def _in_float16(source: Source) -> Source:
    return Source(source.shape, torch.float16, source.file, source.key, lambda: source.read().to(torch.float16))


def _non_lora(path: Path) -> _Extra:
    """non_lora_trainables.bin, if there is one: every trained tensor that is not LoRA's, under peft's names."""
    if not path.is_file():
        return _Extra({}, None)
    return _split_extra(read_file(path), path)


def _split_extra(raw: Mapping[str, Source], path: Path) -> _Extra:
    out: dict[str, Source] = {}
    embedding = None
    for key, source in raw.items():
        if "mm_projector." in key:
            plain = "model.mm_projector." + key.split("mm_projector.", 1)[1]
        else:
            plain = key.removeprefix("base_model.")
            while plain.startswith(("model.model.", "model.lm_head.")):
                plain = plain.removeprefix("model.")
        if plain.endswith("embed_tokens.weight") and not out.get("embed"):
            embedding = source
            continue
        if plain == "image_newline":
            plain = "model.image_newline"
        common = ORIGINAL.rename(plain)
        if common is None:
            raise CheckpointError(f"{path}: unexpected key {key!r} of shape {list(source.shape)}")
        out[common] = source
    return _Extra(out, embedding)


def _on_delta_base(folder: Path, parts: _Parts, base: Path) -> _Parts:
    """A whole model with a base given is a delta: base + delta, tensor by tensor. Refused when it is no delta."""
    from llava.checkpoint.delta import apply_delta, looks_like_delta

    under = read_base(base)
    if not looks_like_delta(parts.tensors, under.tensors):
        raise UsageError(
            f"{folder}: is a complete model, no delta (its weights are nearer to {base} than to zero); leave base out"
        )
    decision = Decision(
        "weights", f"delta on {base}", "a base was given, and the weights are nearer to zero than to it"
    )
    tensors = apply_delta(parts.tensors, under.tensors)
    return replace(parts, tensors=tensors, decisions=(*parts.decisions, decision))


def _join(
    folder: Path,
    data: Mapping[str, Any],
    options: OpenOptions,
    parts: _Parts,
    *,
    name: str,
    token_rows: Source | None = None,
) -> Opened:
    """Tower, tokenizer and settings joined to a language model's side."""
    tower = find_tower(str(data["mm_vision_tower"]), folder, options)
    vision_config, tower_tensors = open_tower(tower, read_config(tower))
    tensors, ignored = dict(parts.tensors), dict(parts.ignored)
    inside = {key: source for key, source in tensors.items() if key.startswith("vision_tower.")}
    if data.get("unfreeze_mm_vision_tower"):
        if not inside:
            raise CheckpointError(
                f"{folder / 'config.json'}: unfreeze_mm_vision_tower is true, but the checkpoint holds no tower weights"
            )
        from_where = Decision("vision tower weights", "the checkpoint's", "config.json: unfreeze_mm_vision_tower")
    else:
        for key, source in inside.items():
            ignored[source.key] = "the tower is taken from mm_vision_tower: unfreeze_mm_vision_tower is not true"
            del tensors[key]
        tensors.update(tower_tensors)
        from_where = Decision("vision tower weights", str(tower), "config.json: mm_vision_tower")
    tokenizer = open_tokenizer(parts.tokenizer_folder, original_kind=parts.text_config["model_type"])
    if data.get("mm_use_im_start_end") and not all(tokenizer.has_token(token) for token in START_END):
        tokenizer.add_special_tokens(list(START_END))
        tensors, parts = _with_token_rows(tensors, parts, tokenizer, token_rows)
    elif token_rows is not None and data.get("mm_use_im_start_end"):
        tensors, parts = _with_token_rows(tensors, parts, tokenizer, token_rows)
    image_token_id = _image_token(tokenizer, parts.text_config)
    template, why = choose_template(tokenizer, data, options.template)
    config = settings(folder, data, parts.text_config, vision_config, image_token_id, template)
    if not config.has_newline and "image_newline" in tensors:
        ignored[tensors.pop("image_newline").key] = f"merge type {config.merge_type!r} has no newline"
    return Opened(
        format=name,
        folder=folder,
        config=config,
        tensors=tensors,
        processor=lambda: make_processor(config, tokenizer, tower),
        decisions=(
            Decision("format", name, "config.json: mm_vision_tower"),
            *parts.decisions,
            from_where,
            Decision("projector", config.projector, _because(data, "mm_projector_type", "linear")),
            Decision("template", template, why),
            Decision("image mode", config.image_mode, _because(data, "image_aspect_ratio", "square")),
            Decision("merge type", config.merge_type, _because(data, "mm_patch_merge_type", "flat")),
            Decision("start/end tokens", str(config.image_start_end), _because(data, "mm_use_im_start_end", False)),
        ),
        ignored=ignored,
        adapter=parts.adapter,
        naming=naming(parts.text_config["model_type"], layered=config.projector.startswith("mlp")),
        tokenizer_is_its_own=parts.tokenizer_folder == folder,
        tower_name=str(data["mm_vision_tower"]),
    )


def _because(data: Mapping[str, Any], key: str, default: object) -> str:
    return f"config.json: {key} {data[key]!r}" if key in data else f"config.json: no {key}, which means {default!r}"


def find_tower(named: str, folder: Path, options: OpenOptions) -> Path:
    """The tower's folder: the one given, else the name as a path from here, checkpoint or base, else the hub."""
    if options.vision_tower is not None:
        return options.vision_tower
    bases = [] if options.base is None else [options.base, options.base.parent]
    # a moved folder that holds its own tower, then the name as a path from several places
    places = [folder / Path(named).name, *(place / named for place in (Path(), folder, folder.parent, *bases))]
    for place in places:
        if (place / "config.json").is_file():
            return place
    try:
        return find_folder(named)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: mm_vision_tower {named!r} is neither a folder here nor on the hub; pass the "
            f"tower's folder with vision_tower=, --vision-tower ({error})"
        ) from error


def _with_token_rows(
    tensors: dict[str, Source], parts: _Parts, tokenizer: Tokenizer, rows: Source | None
) -> tuple[dict[str, Source], _Parts]:
    """Rows for `<im_start>` and `<im_end>`: the mean of all before, or on the input side those of the projector file.

    rows: (2, D), or a whole embedding whose last two are taken.
    """
    first = tokenizer.token_id(START_END[0])
    size = max(first + 2, int(parts.text_config["vocab_size"]))
    embedding = embedding_name(tensors)
    out = dict(tensors)
    for name in (embedding, HEAD):
        if name in out:
            out[name] = _placed_rows(out[name], first, size, rows if name == embedding else None)
    return out, replace(parts, text_config={**parts.text_config, "vocab_size": size})


def _placed_rows(source: Source, first: int, size: int, rows: Source | None) -> Source:
    if rows is not None and (len(rows.shape) != 2 or rows.shape[0] < 2 or rows.shape[1] != source.shape[1]):
        raise CheckpointError(
            f"{rows.file}: {rows.key!r} has shape {list(rows.shape)}, expected [2, {source.shape[1]}] or more"
        )

    def read() -> torch.Tensor:
        old = source.read()
        new = torch.zeros(size, old.shape[1], dtype=old.dtype)
        new[: old.shape[0]] = old
        if old.shape[0] < first + 2:
            new[first : first + 2] = old[:first].float().mean(dim=0).to(old.dtype)
        if rows is not None:
            new[first : first + 2] = rows.read()[-2:].to(old.dtype)
        return new

    return source.changed(read, shape=(size, *source.shape[1:]))


def _image_token(tokenizer: Tokenizer, text_config: Mapping[str, Any]) -> int:
    """The placeholder's id: the tokenizer's `<image>`, added behind everything else when it has none."""
    if tokenizer.has_token("<image>"):
        return tokenizer.token_id("<image>")
    return tokenizer.add_special_tokens(["<image>"])[0]
