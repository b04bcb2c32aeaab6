"""Hugging Face layout: `llava`, `llava_next`, and `llava_onevision` for pictures. Read and written.

What is written opens in stock transformers (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration), vLLM
and SGLang; every reader takes the tower's classic `vision_tower.vision_model.` names, so those are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava.checkpoint.folders import replaced_folder
from llava.checkpoint.names import COMPUTED, HUGGINGFACE, common_name, refuse_strangers
from llava.checkpoint.opened import EMBEDDINGS, HEAD, Decision, Opened, OpenOptions
from llava.checkpoint.processors import choose_template, make_processor, naming_errors, open_tokenizer, picture_settings
from llava.checkpoint.weights import Source, held, read_folder, write_safetensors, write_text
from llava.errors import CheckpointError, UsageError
from llava.model.config import LlavaConfig
from llava.model.llava import Llava
from llava.model.lora import merged_parameters

if TYPE_CHECKING:
    from llava.prompt.processor import Processor

MODEL_TYPES = ("llava", "llava_next", "llava_onevision")
SECOND_LAYER = "multi_modal_projector.linear_2."


def detect(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder with this config.json is in this layout. The original's v0 also says "llava", without parts."""
    return config.get("model_type") in MODEL_TYPES and "text_config" in config


def read(folder: Path, data: Mapping[str, Any], options: OpenOptions) -> Opened:
    """Understand a folder; `data` is its config.json. Raises CheckpointError for keys that no name fits."""
    if options.base is not None:
        raise UsageError(f"{folder}: is a complete Hugging Face model; leave base out")
    config = LlavaConfig.from_dict(data, origin=str(folder / "config.json"))
    activation = data.get("projector_hidden_act", "gelu")
    if activation != "gelu" and config.projector.startswith("mlp"):
        raise CheckpointError(f"{folder / 'config.json'}: projector_hidden_act {activation!r}; only gelu is known here")
    tensors = read_tensors(folder)
    by_block = "config.json: llava block"
    why_template, why_mode = by_block, by_block
    processor: Callable[[], Processor] = partial(load_processor, folder)
    if "llava" not in data:
        by_block = f"config.json: model_type {data['model_type']!r}"
        config, why_template, why_mode = _with_stock_settings(config, data, folder)
        processor = partial(_stock_processor, config, folder)
    if options.template is not None:
        from llava.prompt.templates import get_template

        template = get_template(options.template)
        config, why_template = config.with_changes(template=template.name), "asked for"
        processor = partial(_with_template, processor, template.name)
    return Opened(
        format=f"huggingface {data['model_type']}",
        folder=folder,
        config=_with_present_parts(config, tensors),
        tensors=_without_padding_layers(tensors, config, folder),
        processor=processor,
        decisions=(
            Decision("format", f"huggingface {data['model_type']}", "config.json: model_type and text_config"),
            Decision("language model", str(config.text_config["model_type"]), "config.json: text_config.model_type"),
            Decision("vision tower", str(config.vision_config["model_type"]), "config.json: vision_config.model_type"),
            Decision("projector", config.projector, by_block),
            Decision("template", config.template, why_template),
            Decision("image mode", config.image_mode, why_mode),
            Decision("merge type", config.merge_type, by_block),
        ),
        naming=HUGGINGFACE,
    )


def _with_stock_settings(config: LlavaConfig, data: Mapping[str, Any], folder: Path) -> tuple[LlavaConfig, str, str]:
    """Template and image mode of a folder without a `llava` block, each with what decided it."""
    from llava.prompt.images import ImageSettings

    why_template, why_mode = "no tokenizer in the folder", f"config.json: model_type {data['model_type']!r}"
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        template, why_template = choose_template(open_tokenizer(folder), data, None)
        config = config.with_changes(template=template)
    picture = picture_settings(folder)
    if picture is not None and config.image_mode != "anyres":
        mode = ImageSettings.from_preprocessor_config(picture).mode
        if mode != "anyres":
            config, why_mode = config.with_changes(image_mode=mode), "preprocessor_config.json"
    return config, why_template, why_mode


def _stock_processor(config: LlavaConfig, folder: Path) -> Processor:
    return make_processor(config, open_tokenizer(folder), folder)


def _with_template(make: Callable[[], Processor], template: str) -> Processor:
    return make().with_template(template)


def load_processor(folder: Path) -> Processor:
    """The Processor of a folder in this layout."""
    from llava.prompt.processor import Processor

    with naming_errors(folder):
        return Processor.load(folder)


def _with_present_parts(config: LlavaConfig, tensors: Mapping[str, Source]) -> LlavaConfig:
    """SigLIP's pooling head and a stock anyres model's newline are there or not; the keys decide."""
    if config.vision_config["model_type"] == "siglip_vision_model":
        has_head = any(name.startswith("vision_tower.vision_model.head.") for name in tensors)
        config = config.with_changes(vision_config={**config.vision_config, "vision_use_head": has_head})
    return config


def _without_padding_layers(tensors: Mapping[str, Source], config: LlavaConfig, folder: Path) -> Mapping[str, Source]:
    """Undo `_as_two_layers`: leave out the identity layers that stand in for a projector of fewer than two layers."""
    if config.projector not in ("linear", "identity"):
        return tensors
    kept = {}
    for name, source in tensors.items():
        filler = name.startswith(SECOND_LAYER if config.projector == "linear" else "multi_modal_projector.")
        if not filler:
            kept[name] = source
            continue
        value = source.read().float()
        unit = torch.eye(value.shape[0]) if value.dim() == 2 else torch.zeros(value.shape[0])
        if not torch.equal(value, unit):
            raise CheckpointError(
                f"{source.file}: {source.key!r} is not an identity layer, but config.json says projector "
                f"{config.projector!r}; set llava.projector to 'mlp2x_gelu' if it was trained as one"
            )
    return kept


def save(model: Llava, processor: Processor, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> Path:
    """Write a model and its processor as a folder that stock transformers opens; returns the folder.

    An attached LoRA is merged into what is written; the model itself is left as it is.
    Written to a temporary folder beside it, put on the disk, then moved into place: a reader sees the old state or
    the new one. Raises CheckpointError for parameters that are not held here (sharded or quantised).
    """
    tensors = {}
    for name, value in merged_parameters(model):
        if value.is_meta or not value.is_floating_point():
            raise CheckpointError(f"cannot save {name!r}: it is quantised or not on this process; merge or gather it")
        common = common_name(name, model)
        tensors[common] = held(common, value, file=Path("memory"))
    return write(model.config, tensors, processor, folder, max_shard_bytes=max_shard_bytes)


def write(
    config: LlavaConfig,
    tensors: Mapping[str, Source],
    processor: Processor,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write tensors under common names as a folder of this layout; dtype of floating tensors, None keeps each."""
    config, tensors = prepare(with_processor(config, processor), tensors)
    with replaced_folder(Path(folder)) as temporary:
        fill(temporary, config, tensors, processor, dtype=dtype, max_shard_bytes=max_shard_bytes)
    return Path(folder)


def fill(
    temporary: Path,
    config: LlavaConfig,
    tensors: Mapping[str, Source],
    processor: Processor,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write what `prepare` made into an existing folder; advance is called with the bytes of each tensor written."""
    write_safetensors(temporary, tensors, dtype=dtype, max_shard_bytes=max_shard_bytes, advance=advance)
    processor.save(temporary)
    # where answers end, for `generate` and the engines that read it: the template's end as well as EOS
    ends = {"eos_token_id": list(processor.stop_token_ids), "do_sample": False}
    write_text(temporary / "generation_config.json", json.dumps(ends, indent=2) + "\n")
    # after the processor, which writes a config.json of its own where there is none
    write_text(temporary / "config.json", json.dumps(_config_json(config, tensors, dtype), indent=2) + "\n")


def read_tensors(folder: Path) -> dict[str, Source]:
    """Every tensor of a folder of this layout under its common name. Raises CheckpointError for a stranger's key."""
    raw = read_folder(folder)
    tensors, unknown = HUGGINGFACE.rename_all(raw)
    refuse_strangers(raw, unknown, "a Hugging Face LLaVA")
    return {name: source for name, source in tensors.items() if not COMPUTED.search(name)}


def with_processor(config: LlavaConfig, processor: Processor) -> LlavaConfig:
    """The configuration with what its processor decides (template, picture settings) as the processor has it."""
    block = {**config.to_dict()["llava"], **processor.block()}
    return LlavaConfig.from_dict({**config.to_dict(), "llava": block})


def prepare(config: LlavaConfig, tensors: Mapping[str, Source]) -> tuple[LlavaConfig, dict[str, Source]]:
    """Config and tensors as this layout holds them: two projector layers, a row for the image token, head last."""
    config, grown = with_row_for_image(config, dict(tensors))
    if config.text_config["model_type"] == "mpt" and config.text_config.get("tie_word_embeddings"):
        # stock LLaVA ties by Llama's names, which MPT's decoder does not have: written untied, with its own copy
        config = config.with_changes(text_config={**config.text_config, "tie_word_embeddings": False})
        grown[HEAD] = next(grown[name] for name in EMBEDDINGS if name in grown)
    if config.text_config.get("tie_word_embeddings"):
        grown.pop(HEAD, None)
    return config, _as_two_layers(config, grown)


def _config_json(config: LlavaConfig, tensors: Mapping[str, Source], dtype: torch.dtype | None) -> dict[str, Any]:
    data = config.to_dict()
    used = dtype or next(tensors[name].dtype for name in EMBEDDINGS if name in tensors)
    data["dtype"] = data["torch_dtype"] = str(used).removeprefix("torch.")
    return data


def _as_two_layers(config: LlavaConfig, tensors: dict[str, Source]) -> dict[str, Source]:
    """Stock classes always have two projector layers: a linear projector is written with an identity as the second
    (and projector_hidden_act "linear"), the identity projector with two. Deeper ones open here only."""
    if config.projector not in ("linear", "identity"):
        return tensors
    dtype = next(source.dtype for source in tensors.values() if source.dtype.is_floating_point)
    width = config.text_width
    for layer in (1, 2) if config.projector == "identity" else (2,):
        for leaf, value in (("weight", torch.eye(width, dtype=dtype)), ("bias", torch.zeros(width, dtype=dtype))):
            name = f"multi_modal_projector.linear_{layer}.{leaf}"
            tensors[name] = held(name, value, file=Path("memory"))
    return tensors


def with_row_for_image(config: LlavaConfig, tensors: dict[str, Source]) -> tuple[LlavaConfig, dict[str, Source]]:
    """Grow the embedding and the output layer so that the image token's id is one of their rows.

    Stock classes look the placeholder up before they overwrite it. New rows are the mean of the old ones, so no
    answer ever prefers them; the vocabulary is rounded up to a multiple of 64, as published folders do.
    """
    if config.image_token_id < 0:
        raise CheckpointError(f"image_token_id {config.image_token_id} cannot be written: give the token a row first")
    return with_rows_up_to(config, tensors, config.image_token_id)


def with_rows_up_to(
    config: LlavaConfig, tensors: dict[str, Source], token_id: int
) -> tuple[LlavaConfig, dict[str, Source]]:
    """Grow the embedding and the output layer until this id is one of their rows; as `with_row_for_image` does."""
    if token_id < config.vocab_size:
        return config, tensors
    wanted = -(-(token_id + 1) // 64) * 64
    for name in (*EMBEDDINGS, HEAD):
        if name in tensors:
            tensors[name] = grown_rows(tensors[name], wanted)
    return config.with_changes(text_config={**config.text_config, "vocab_size": wanted}), tensors


def grown_rows(source: Source, rows: int) -> Source:
    """A matrix (V, D) with rows added up to `rows`, each the mean of the old ones (in float32)."""

    def read() -> torch.Tensor:
        old = source.read()
        mean = old.float().mean(dim=0, keepdim=True).to(old.dtype)
        return torch.cat([old, mean.expand(rows - old.shape[0], -1)])

    return source.changed(read, shape=(rows, *source.shape[1:]))
