"""The one way to open a model: `load` a folder of any known layout, or `build` a new LLaVA from two pretrained parts.

What a folder is, is decided by its files and by config.json, never by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from llava.checkpoint import huggingface, mmpretrain, original, paddle, tuned, xtuner
from llava.checkpoint.fingerprint import NEW
from llava.checkpoint.folders import find_folder as find_folder
from llava.checkpoint.folders import read_config as read_config
from llava.checkpoint.opened import EMBEDDINGS, HEAD, LoadReport, Opened, OpenOptions, materialise, set_parameter
from llava.checkpoint.parts import open_language_model, open_tower
from llava.checkpoint.processors import make_processor, open_tokenizer
from llava.checkpoint.quantised import Nf4, Storage, pack_layer
from llava.checkpoint.weights import Source, held
from llava.distributed import pick_device, pick_dtype
from llava.errors import UnknownFormatError
from llava.model.config import LlavaConfig
from llava.model.llava import Llava
from llava.model.projector import build_projector, initialise_projector, scale_output
from llava.model.spread import spread_devices

if TYPE_CHECKING:
    from llava.prompt.processor import Processor


@dataclass(frozen=True)
class Loaded:
    """An opened model, the processor that belongs to it, the account of what was read, and what it was read from."""

    model: Llava
    processor: Processor
    report: LoadReport
    opened: Opened | None = None


@dataclass(frozen=True)
class Format:
    """A layout: whether a folder with this config.json is one, and how it is understood."""

    detect: Callable[[Path, Mapping[str, Any]], bool]
    read: Callable[[Path, Mapping[str, Any], OpenOptions], Opened]
    looks_like: str


FORMATS: dict[str, Format] = {
    "tuned": Format(tuned.detect, tuned.read, "llava.json, what a run with LoRA leaves beside its base"),
    "huggingface": Format(
        huggingface.detect,
        huggingface.read,
        "config.json with model_type llava, llava_next or llava_onevision and a text_config",
    ),
    "xtuner": Format(
        xtuner.detect, xtuner.read, "projector/config.json with model_type projector, beside XTuner's trained parts"
    ),
    "paddlemix": Format(
        paddle.detect, paddle.read, "config.json with mm_vision_tower beside model_state.pdparams, PaddleMIX's"
    ),
    "original": Format(
        original.detect,
        original.read,
        "config.json with mm_vision_tower, beside model weights, mm_projector.bin or a LoRA adapter",
    ),
    "mmpretrain": Format(mmpretrain.detect, mmpretrain.read, "a .pth with keys model.lang_encoder.*, MMPretrain's"),
}


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    load_in: Literal["4bit", "8bit"] | None = None,
    vision_tower: str | Path | None = None,
    merge_lora: bool = True,
    template: str | None = None,
    storage: Callable[[Llava], Mapping[str, Storage]] | None = None,
) -> Loaded:
    """Open a model from a folder or hub id: `loaded = llava.load("llava-hf/llava-1.5-7b-hf")`.

    base: the language model (or whole LLaVA) that a projector, LoRA or delta folder stands on. device, dtype: names
    ("cuda:0", "bfloat16"); chosen for this machine when None; "spread" or "cuda:0,cuda:1" shares the language model's
    blocks between devices. load_in: quantise the language model's linear layers
    (needs `llava[quant]`). vision_tower: the tower's folder, where the one that config.json names is elsewhere.
    merge_lora: False leaves a LoRA beside the weights. template: the chat template, where config.json names none.
    storage: as in `opened.materialise`. Raises UnknownFormatError when no layout fits, CheckpointError when tensors
    are missing, unexpected or of a wrong shape.
    """
    opened = open_checkpoint(path, base=base, vision_tower=vision_tower, merge_lora=merge_lora, template=template)
    spread = spread_devices(device) if device is not None and (device == "spread" or "," in device) else []
    where = spread[0] if spread else pick_device(device)
    what = pick_dtype(where, dtype)
    model, report = materialise(opened, device=where, dtype=what, load_in=load_in, storage=storage, spread=spread)
    return Loaded(model, opened.processor(), report, opened)


def open_checkpoint(
    path: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    merge_lora: bool = True,
    template: str | None = None,
) -> Opened:
    """Understand a folder or hub id without reading its tensors; arguments as in `load`."""
    folder = find_folder(path)
    data = read_config(folder)
    options = OpenOptions(
        base=None if base is None else find_folder(base),
        vision_tower=None if vision_tower is None else find_folder(vision_tower),
        merge_lora=merge_lora,
        template=template,
    )
    for form in FORMATS.values():
        if form.detect(folder, data):
            opened = form.read(folder, data, options)
            given = {"base": base, "vision_tower": vision_tower, "template": template}
            named = {key: str(value) for key, value in given.items() if value is not None}
            return replace(opened, origin={"path": str(path), **named})
    looked = "; ".join(f"{name}: {form.looks_like}" for name, form in FORMATS.items())
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "an empty folder"
    kind = f" (config.json: model_type {data.get('model_type')!r})" if data else ""
    raise UnknownFormatError(f"{folder}: no known layout. Looked for {looked}. Found: {found}{kind}")


def build(
    language_model: str | Path,
    vision_tower: str | Path,
    *,
    projector: str = "mlp2x_gelu",
    template: str = "vicuna_v1",
    image_mode: str = "pad",
    vision_feature_layer: int = -2,
    vision_feature_select: str = "patch",
    image_grid_pinpoints: Sequence[Sequence[int]] = (),
    merge_type: str | None = None,
    start_end_tokens: bool = False,
    seed: int = 0,
    match_embedding_scale: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    storage: Callable[[Llava], Mapping[str, Storage]] | None = None,
) -> Loaded:
    """A new LLaVA from a pretrained causal language model and a pretrained vision tower (folders or hub ids).

    `<image>` is added to the tokenizer unless it is there, with start_end_tokens `<im_start>` and `<im_end>` too (a
    picture then stands between them), and the embedding grows to hold them: new rows are the mean of the old ones and
    the vocabulary is rounded up to a multiple of 64. image_grid_pinpoints: (height, width) of the canvases of anyres,
    v1.6's in units of the tower's picture when none are given. The projector is drawn from `seed`; with
    match_embedding_scale its output on noise has the standard deviation of the word embeddings, so that picture rows
    are no larger than words at the first step. storage: as in `opened.materialise`.
    """
    opened = open_parts(
        language_model,
        vision_tower,
        projector=projector,
        template=template,
        image_mode=image_mode,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select=vision_feature_select,
        image_grid_pinpoints=image_grid_pinpoints,
        merge_type=merge_type,
        start_end_tokens=start_end_tokens,
        seed=seed,
    )
    where = pick_device(device)
    what = pick_dtype(where, dtype)
    if storage is None or not match_embedding_scale:
        model, report = materialise(opened, device=where, dtype=what, storage=storage)
    else:
        # The scale is that of the tower as it is on disk, whatever it is held as afterwards.
        model, report = materialise(opened, device=where, dtype=what, storage=lambda model: _but_tower(storage(model)))
    if match_embedding_scale:
        _match_embedding_scale(model, seed)
        if storage is not None:
            _hold_tower(model, storage(model), where)
    return Loaded(model, opened.processor(), report, opened)


def _but_tower(storage: Mapping[str, Storage]) -> dict[str, Storage]:
    return {name: held_as for name, held_as in storage.items() if not name.startswith("vision_tower.")}


def _hold_tower(model: Llava, storage: Mapping[str, Storage], device: torch.device) -> None:
    """Hold the tower's weights as a run wants them."""
    for name, held_as in storage.items():
        if not name.startswith("vision_tower."):
            continue
        value = model.get_parameter(name).detach()
        if isinstance(held_as, Nf4):
            path = name.rpartition(".")[0]
            pack_layer(model, path, value.to(held_as.compute), load_in="4bit", device=device, training=True)
        else:
            set_parameter(model, name, value.to(held_as))


def open_parts(
    language_model: str | Path,
    vision_tower: str | Path,
    *,
    projector: str = "mlp2x_gelu",
    template: str = "vicuna_v1",
    image_mode: str = "pad",
    vision_feature_layer: int = -2,
    vision_feature_select: str = "patch",
    image_grid_pinpoints: Sequence[Sequence[int]] = (),
    merge_type: str | None = None,
    start_end_tokens: bool = False,
    seed: int = 0,
) -> Opened:
    """What `build` puts together, before any tensor is read; arguments as there."""
    language, tower = find_folder(language_model), find_folder(vision_tower)
    text_config, tensors = open_language_model(language, read_config(language))
    vision_config, tower_tensors = open_tower(tower, read_config(tower))
    tokenizer = open_tokenizer(language)
    wanted = [*(original.START_END if start_end_tokens else ()), "<image>"]
    added = [token for token in wanted if not tokenizer.has_token(token)]
    new_ids = tokenizer.add_special_tokens(added)
    anyres = image_mode == "anyres"
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=tokenizer.token_id("<image>"),
        projector=projector,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select=vision_feature_select,  # type: ignore[arg-type]  # checked by LlavaConfig
        image_mode=image_mode,  # type: ignore[arg-type]
        image_grid_pinpoints=tuple((int(h), int(w)) for h, w in image_grid_pinpoints)
        or (_v16_canvases(int(vision_config["image_size"])) if anyres else ()),
        merge_type=merge_type or ("spatial_unpad" if anyres else "flat"),  # type: ignore[arg-type]
        template=template,
        image_start_end=start_end_tokens,
    )
    settled = _with_mean_rows(dict(tensors), new_ids, config.vocab_size)
    last_id = max([config.image_token_id, *new_ids])
    config, grown = huggingface.with_rows_up_to(config, {**settled, **tower_tensors}, last_id)
    return Opened(
        format="new from two parts",
        folder=language,
        config=config,
        tensors={**grown, **_new_parts(config, seed)},
        processor=lambda: make_processor(config, tokenizer, tower),
        notes=(f"language model from {language}", f"vision tower from {tower}", f"new parts drawn from seed {seed}"),
        tower_name=str(vision_tower),
        origin={
            "language_model": str(language_model),
            "vision_tower": str(vision_tower),
            "settings": {
                "projector": projector,
                "template": template,
                "image_mode": image_mode,
                "vision_feature_layer": vision_feature_layer,
                "vision_feature_select": vision_feature_select,
                "image_grid_pinpoints": [list(point) for point in config.image_grid_pinpoints],
                "merge_type": merge_type,
                "start_end_tokens": start_end_tokens,
            },
        },
    )


def _v16_canvases(side: int) -> tuple[tuple[int, int], ...]:
    """LLaVA-1.6's canvases, (height, width): two tiles either way, four in a square, three in a row either way."""
    return tuple((side * rows, side * columns) for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))


def _with_mean_rows(tensors: dict[str, Source], new_ids: Sequence[int], vocab_size: int) -> dict[str, Source]:
    """Give new tokens whose rows the base has already (a padded vocabulary) the mean of the rows before them."""
    inside = [token for token in new_ids if token < vocab_size]
    for name in (*EMBEDDINGS, HEAD):
        if inside and name in tensors:
            tensors[name] = _mean_rows(tensors[name], inside)
    return tensors


def _mean_rows(source: Source, ids: Sequence[int]) -> Source:
    def read() -> torch.Tensor:
        value = source.read().clone()
        value[list(ids)] = value[: min(ids)].float().mean(dim=0).to(value.dtype)
        return value

    return source.changed(read)


def _new_parts(config: LlavaConfig, seed: int) -> dict[str, Source]:
    """Projector and newline of a new LLaVA, as sources marked new."""
    from llava.model.merge import new_newline

    projector = build_projector(config.projector, config.vision_width, config.text_width)
    initialise_projector(projector, seed=seed)
    values = {f"multi_modal_projector.{name}": p.detach() for name, p in projector.named_parameters()}
    if config.has_newline:
        values["image_newline"] = new_newline(config.text_width).detach()
    return {name: held(f"new:{name}", value, file=NEW) for name, value in values.items()}


@torch.no_grad()
def _match_embedding_scale(model: Llava, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = model.config.image_size
    noise = torch.randn(4, 3, size, size, generator=generator)
    from llava.model.vision import select_features

    features = select_features(
        model.vision_tower,
        noise.to(model.device),
        layer=model.config.vision_feature_layer,
        skipped_tokens=model.config.skipped_tokens,
    )
    target = model.embed_tokens.weight.float().std().item()
    scale_output(model.multi_modal_projector, features.to(model.dtype), target_std=target)
