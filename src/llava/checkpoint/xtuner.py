"""XTuner's layout: trained parts side by side, each in a folder of its own, on a base model named elsewhere.

    (root)                    the language model with its tokenizer, if it was trained in full
    llm_adapter/              or its LoRA
    visual_encoder/           the vision tower, if it was trained in full
    visual_encoder_adapter/   or its LoRA
    projector/                always
    xtuner_config.py          the training's settings; searched for a few words, never run

LoRA is merged in float32 into the base's own 16-bit weights, whatever precision the base had in training: that is how
a QLoRA run, which XTuner cannot export, becomes a model again. Not covered: .pth files before `xtuner convert`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava.checkpoint.adapters import Adapter, is_adapter, merged, read_adapter
from llava.checkpoint.folders import find_folder
from llava.checkpoint.names import COMPUTED, LANGUAGE_MODEL, TOWER, Renaming
from llava.checkpoint.opened import HEAD, Decision, Opened, OpenOptions
from llava.checkpoint.parts import language_config, open_language_model, open_tower, read_language_model
from llava.checkpoint.processors import choose_template, make_processor, open_tokenizer
from llava.checkpoint.weights import WEIGHT_FILES, Source, read_folder, write_safetensors, write_text
from llava.errors import CheckpointError, UsageError
from llava.model.config import LlavaConfig

if TYPE_CHECKING:
    from llava.prompt.processor import Processor

PROJECTOR, TOWER_FOLDER = "projector", "visual_encoder"
LANGUAGE_ADAPTER, TOWER_ADAPTER = "llm_adapter", "visual_encoder_adapter"
RECIPE = "xtuner_config.py"
# Slots of a Sequential: even numbers are linear, odd ones the activation.
PROJECTOR_NAMES = Renaming(tuple((f"model.{2 * n}.", f"multi_modal_projector.linear_{n + 1}.") for n in range(8)))
# XTuner's PROMPT_TEMPLATE names to ours, and ours of the same families to XTuner's wording of them.
XTUNER_TEMPLATES = {"vicuna": "xtuner_vicuna", "mistral": "xtuner_mistral"}
SAME_FAMILY = {
    "vicuna_v1": "xtuner_vicuna",
    "mistral_instruct": "xtuner_mistral",
    "llama_3": "llama3_chat",
    "qwen_1_5": "qwen_chat",
    "chatml_direct": "internlm2_chat",
}
KEPT_SETTINGS = ("template", "image_mode", "vision_feature_layer", "image_position", "text_after_image", "boxes")


def detect(folder: Path, data: Mapping[str, Any]) -> bool:
    """Whether a folder has XTuner's projector/ in it."""
    return _json(folder / PROJECTOR / "config.json").get("model_type") == "projector"


def read(folder: Path, data: Mapping[str, Any], options: OpenOptions) -> Opened:
    """Understand a folder; `data` is the config.json of a language model at its root, {} when there is none.

    Raises UsageError when the language model or the tower is not in the folder and was not given.
    """
    recipe = _Recipe.read(folder)
    text_config, language, base, adapter, about_language = _language_model(folder, data, options, recipe)
    vision_config, tower, tower_folder, about_tower = _tower(folder, options, recipe)
    projector, name = _projector(folder / PROJECTOR)
    block = data.get("llava") or {}
    # XTuner opens every tokenizer as transformers' fast class; one written here is as it was
    tokenizer = open_tokenizer(base, original_kind=None if block else "fast")
    image_token_id = (
        tokenizer.token_id("<image>")
        if tokenizer.has_token("<image>")
        else tokenizer.add_special_tokens(["<image>"])[0]
    )
    template, why = _template(tokenizer, _json(base / "config.json"), options, recipe, block)
    layer = int(block.get("vision_feature_layer", recipe.select_layer))
    mode = str(block.get("image_mode", "crop" if recipe.pads is False else "pad"))
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=image_token_id,
        projector=name,
        vision_feature_layer=layer,
        image_mode=mode,  # type: ignore[arg-type]  # checked by LlavaConfig
        template=template,
        # XTuner tokenizes the words on either side of a picture apart
        extra={"text_after_image": block.get("text_after_image", "restart"), **_carried(block)},
    )
    from_recipe = RECIPE if recipe.found else f"no {RECIPE}: XTuner's default"
    return Opened(
        format="xtuner",
        folder=folder,
        config=config,
        tensors={**language, **tower, **projector},
        processor=lambda: make_processor(config, tokenizer, tower_folder),
        decisions=(
            Decision("format", "xtuner", f"{PROJECTOR}/config.json: model_type 'projector'"),
            *about_language,
            *about_tower,
            Decision("projector", name, f"{PROJECTOR}/config.json: depth"),
            Decision("template", template, why),
            Decision("image mode", mode, "config.json: llava block" if "image_mode" in block else from_recipe),
            Decision(
                "vision layer",
                str(layer),
                "config.json: llava block" if "vision_feature_layer" in block else from_recipe,
            ),
        ),
        adapter=adapter,
    )


@dataclass(frozen=True)
class _Recipe:
    """What `xtuner_config.py` says, found by its spelling; None where it says nothing."""

    found: bool = False
    template: str | None = None
    language_model: str | None = None
    tower: str | None = None
    select_layer: int = -2
    pads: bool | None = None

    @classmethod
    def read(cls, folder: Path) -> _Recipe:
        path = folder / RECIPE
        if not path.is_file():
            return cls()
        text = path.read_text("utf-8", errors="replace")

        def find(pattern: str) -> str | None:
            match = re.search(pattern, text, re.MULTILINE)
            return match[1] if match else None

        pads = find(r"pad_image_to_square\s*=\s*(True|False)")
        return cls(
            found=True,
            template=find(r"^prompt_template\s*=\s*(?:PROMPT_TEMPLATE\.|['\"]xtuner\.utils\.PROMPT_TEMPLATE\.)(\w+)"),
            language_model=find(r"^llm_name_or_path\s*=\s*['\"]([^'\"]+)"),
            tower=find(r"^visual_encoder_name_or_path\s*=\s*['\"]([^'\"]+)"),
            select_layer=int(find(r"visual_select_layer\s*=\s*(-?\d+)") or -2),
            pads=None if pads is None else pads == "True",
        )


def _language_model(
    folder: Path, data: Mapping[str, Any], options: OpenOptions, recipe: _Recipe
) -> tuple[dict[str, Any], dict[str, Source], Path, Adapter | None, tuple[Decision, ...]]:
    """Configuration, tensors (common names), the folder they are from, an adapter left beside, and what decided."""
    own = any((folder / name).is_file() for name in WEIGHT_FILES)
    lora = folder / LANGUAGE_ADAPTER
    if own:
        base, because = folder, "weights at the root"
    elif options.base is not None:
        base, because = options.base, "base= was given; the folder holds no whole language model"
    else:
        hint = f" (it was trained on {recipe.language_model!r})" if recipe.language_model else ""
        what = "a LoRA of the language model" if is_adapter(lora) else "no language model"
        raise UsageError(f"{folder}: holds {what}; name the one it was trained on with base=, --base{hint}")
    config = data if own else _json(base / "config.json")
    if "quantization_config" in config:
        raise CheckpointError(
            f"{base}: is quantised; XTuner trained on 4 bits made from the 16-bit model, and that one is the base"
        )
    decisions: tuple[Decision, ...] = (Decision("language model", str(config.get("model_type")), because),)
    if not is_adapter(lora):
        text_config, tensors = open_language_model(base, config)
        return text_config, tensors, base, None, decisions
    adapter = read_adapter(lora)
    decisions = (*decisions, Decision("LoRA of the language model", str(len(adapter.pairs)), f"{LANGUAGE_ADAPTER}/"))
    kind = str(config.get("model_type"))
    if not options.merge_lora:
        if kind == "internlm2":
            raise UsageError(f"{lora}: adapts InternLM2's fused weights, so it can only be merged")
        text_config, tensors = open_language_model(base, config)
        return text_config, tensors, base, replace(adapter, rename=LANGUAGE_MODEL.rename), decisions
    # merged under the base's own names, before anything is renamed: InternLM2's LoRA is on its fused weights
    raw = merged(read_folder(base), adapter, lambda name: name)
    renamed, unknown = LANGUAGE_MODEL.rename_all(read_language_model(raw, kind, config, base))
    strangers = [name for name in unknown if not COMPUTED.search(name)]
    if strangers:
        raise CheckpointError(f"{base}: unexpected key {strangers[0]!r}; not a causal language model's name")
    learnt = {name: source for name, source in renamed.items() if not COMPUTED.search(name)}
    return language_config(config, base), learnt, base, None, decisions


def _tower(
    folder: Path, options: OpenOptions, recipe: _Recipe
) -> tuple[dict[str, Any], dict[str, Source], Path, tuple[Decision, ...]]:
    """Configuration and tensors of the vision tower, the folder with its picture settings, and what decided."""
    own = folder / TOWER_FOLDER
    if own.is_dir():
        where, because = own, f"{TOWER_FOLDER}/ in the folder"
    elif options.vision_tower is not None:
        where, because = options.vision_tower, "vision_tower= was given; the folder holds none"
    elif recipe.tower is not None:
        where, because = find_folder(recipe.tower), f"{RECIPE}: visual_encoder_name_or_path"
    else:
        raise UsageError(f"{folder}: holds no vision tower; name the one it was trained with by vision_tower=")
    data = _json(where / "config.json")
    if data.get("model_type") not in ("clip", "clip_vision_model"):
        raise CheckpointError(f"{where}: a tower of type {data.get('model_type')!r}; XTuner's LLaVA has CLIP")
    config, tensors = open_tower(where, data)
    decisions: tuple[Decision, ...] = (Decision("vision tower", str(where), because),)
    lora = folder / TOWER_ADAPTER
    if is_adapter(lora):
        adapter = read_adapter(lora)
        tensors = merged(tensors, adapter, TOWER.rename)
        decisions = (*decisions, Decision("LoRA of the tower", str(len(adapter.pairs)), f"{TOWER_ADAPTER}/"))
    # a tower that was trained may come without its picture settings; those of the one it began as hold
    has_settings = (where / "preprocessor_config.json").is_file() or options.vision_tower is None
    return config, tensors, where if has_settings else options.vision_tower or where, decisions


def _projector(folder: Path) -> tuple[dict[str, Source], str]:
    """Tensors (common names) and our name of a projector/ folder."""
    data = _json(folder / "config.json")
    depth = int(data.get("depth", 2))
    if depth > 1 and data.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{folder / 'config.json'}: hidden_act {data['hidden_act']!r}; only gelu is known here")
    if not data.get("bias", True):
        raise CheckpointError(f"{folder / 'config.json'}: a projector without bias is not known here")
    raw = read_folder(folder)
    tensors, unknown = PROJECTOR_NAMES.rename_all(raw)
    if unknown:
        raise CheckpointError(f"{raw[unknown[0]].file}: unexpected key {unknown[0]!r}; not a projector's name")
    return tensors, "linear" if depth == 1 else f"mlp{depth}x_gelu"


def _template(
    tokenizer: Any, data: Mapping[str, Any], options: OpenOptions, recipe: _Recipe, block: Mapping[str, Any]
) -> tuple[str, str]:
    from llava.prompt.templates import TEMPLATES, get_template

    if options.template is not None:
        return get_template(options.template).name, "asked for"
    if "template" in block:
        return get_template(str(block["template"])).name, "config.json: llava block"
    if recipe.template is not None:
        name = XTUNER_TEMPLATES.get(recipe.template, recipe.template)
        if name in TEMPLATES:
            return name, f"{RECIPE}: prompt_template"
    name, why = choose_template(tokenizer, {key: data[key] for key in ("model_type",) if key in data}, None)
    return SAME_FAMILY.get(name, name), f"{why}; XTuner's wording"


def _carried(block: Mapping[str, Any]) -> dict[str, Any]:
    return {key: block[key] for key in ("image_position", "boxes") if key in block}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); restore it") from error
    return data if isinstance(data, dict) else {}


def write_model(
    temporary: Path,
    config: LlavaConfig,
    tensors: Mapping[str, Source],
    processor: Processor,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write a whole model into an existing folder: language model at the root, visual_encoder/, projector/.

    XTuner opens it with `--llava DIR --visual-encoder DIR/visual_encoder`. Raises CheckpointError for what it cannot
    hold: tiled pictures, towers other than CLIP, several feature layers.
    """
    _refuse_what_xtuner_lacks(config)
    language: dict[str, Source] = {}
    tower: dict[str, Source] = {}
    projector: dict[str, Source] = {}
    tied = config.text_config.get("tie_word_embeddings")
    is_mpt = config.text_config["model_type"] == "mpt"
    for name, source in tensors.items():
        for table, part in ((PROJECTOR_NAMES, projector), (TOWER, tower), (LANGUAGE_MODEL, language)):
            restored = table.restore(name)
            if restored is not None:
                if is_mpt and part is language:
                    restored = restored.replace("model.", "transformer.", 1)
                if not (tied and name == HEAD):
                    part[restored] = source
                break
        else:
            raise CheckpointError(f"{source.file}: {source.key!r} has no place in XTuner's layout")
    main = next(iter(language.values())).dtype if dtype is None else dtype
    write_safetensors(temporary, language, dtype=dtype, max_shard_bytes=max_shard_bytes, advance=advance)
    processor.save(temporary)
    (temporary / "config.json").unlink(missing_ok=True)
    (temporary / "processor_config.json").unlink(missing_ok=True)
    settings = {**config.to_dict()["llava"], **processor.block()}
    root = {
        **config.text_config,
        "architectures": [_architecture(config)],
        "torch_dtype": str(main).removeprefix("torch."),
        # nobody else reads this; here it keeps what XTuner's own files do not say
        "llava": {key: settings[key] for key in KEPT_SETTINGS if key in settings},
    }
    write_text(temporary / "config.json", json.dumps(root, indent=2) + "\n")
    _write_part(temporary / TOWER_FOLDER, tower, dict(config.vision_config), dtype=dtype, advance=advance)
    (temporary / "preprocessor_config.json").rename(temporary / TOWER_FOLDER / "preprocessor_config.json")
    about_projector = {
        "architectures": ["ProjectorModel"],
        "model_type": "projector",
        "visual_hidden_size": config.vision_width,
        "llm_hidden_size": config.text_width,
        "depth": len(projector) // 2,
        "hidden_act": "gelu",
        "bias": True,
        "torch_dtype": str(main).removeprefix("torch."),
    }
    _write_part(temporary / PROJECTOR, projector, about_projector, dtype=dtype, advance=advance)


def _refuse_what_xtuner_lacks(config: LlavaConfig) -> None:
    problem = None
    if config.image_mode == "anyres":
        problem = "pictures in tiles"
    elif config.vision_config["model_type"] != "clip_vision_model":
        problem = f"tower of type {config.vision_config['model_type']!r}"
    elif not isinstance(config.vision_feature_layer, int) or config.vision_feature_select != "patch":
        problem = "features of several layers, or with the class token"
    elif config.projector == "identity":
        problem = "identity projector"
    elif config.image_start_end:
        problem = "tokens around a picture (<im_start>, <im_end>)"
    if problem is not None:
        raise CheckpointError(f"XTuner's LLaVA has no {problem}; convert with --to hf instead")


def _architecture(config: LlavaConfig) -> str:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    return str(AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[config.text_config["model_type"]]].__name__)


def _write_part(
    folder: Path,
    tensors: Mapping[str, Source],
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None,
    advance: Callable[[int], None] | None,
) -> None:
    folder.mkdir()
    write_safetensors(folder, tensors, dtype=dtype, advance=advance)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
