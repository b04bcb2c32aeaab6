"""The Processor that belongs to a checkpoint: its tokenizer's dialect, its chat template, its picture settings."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import CheckpointError
from llava.model.config import LlavaConfig

if TYPE_CHECKING:
    from llava.prompt.processor import Processor
    from llava.prompt.tokenizer import Tokenizer

# The original opens Llama's tokenizer as sentencepiece ("slow") and every other one as its fast class.
SLOW_KINDS = ("llama", "internlm2")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def make_processor(config: LlavaConfig, tokenizer: Tokenizer, images_from: Path) -> Processor:
    """The Processor of a configuration, a tokenizer and the folder that says how pictures are normalised.

    It goes through a folder of our own layout, so that a model put together here and the same model saved and opened
    again cannot differ. Raises CheckpointError when there is no preprocessor_config.json.
    """
    from llava.prompt.processor import Processor

    picture = picture_settings(images_from)
    if picture is None:
        raise CheckpointError(
            f"{images_from}: no preprocessor_config.json; copy it from the vision tower's page (mean, std, size)"
        )
    with tempfile.TemporaryDirectory(prefix="llava-processor-") as name:
        folder = Path(name)
        tokenizer.save(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(picture), "utf-8")
        (folder / "config.json").write_text(json.dumps(config.to_dict()), "utf-8")
        return Processor.load(folder)


def picture_settings(folder: Path) -> dict[str, Any] | None:
    """How a folder normalises pictures: preprocessor_config.json, or the part of processor_config.json that newer
    transformers write. None when it has neither."""
    for file, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / file
        if not path.is_file():
            continue
        try:
            data = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path}: not JSON ({error}); restore it from the model's page") from error
        data = data if part is None else data.get(part)
        if isinstance(data, dict):
            return data
    return None


def open_tokenizer(folder: Path, *, original_kind: str | None = None) -> Tokenizer:
    """The tokenizer of a folder; with `original_kind` (a language model's type) as the original LLaVA opened it.

    The original reads tokenizer.model of a Llama even where a tokenizer.json lies beside it; a Mistral gets the fast
    class of transformers 4, which gives the ids of the `legacy` dialect whatever its flag says.
    """
    with naming_errors(folder):
        return _open_tokenizer(folder, original_kind)


@contextmanager
def naming_errors(folder: Path) -> Iterator[None]:
    """Turn what sentencepiece and tokenizers raise for damaged files into a CheckpointError that names the folder."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: its tokenizer does not open ({reason}); download it again") from error


def _open_tokenizer(folder: Path, original_kind: str | None) -> Tokenizer:
    from llava.prompt.tokenizer import load_tokenizer

    slow = original_kind in SLOW_KINDS and (folder / "tokenizer.model").is_file()
    as_legacy = original_kind is not None and original_kind not in SLOW_KINDS
    if (folder / "tokenizer.json").is_file() and not slow:
        return load_tokenizer(folder)
    with tempfile.TemporaryDirectory(prefix="llava-tokenizer-") as name:
        copy = Path(name)
        if not (folder / "tokenizer.model").is_file():
            _save_as_fast(folder, copy)
            return load_tokenizer(copy)
        for file in TOKENIZER_FILES:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, copy / file)
        if as_legacy:
            path = copy / "tokenizer_config.json"
            settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            path.write_text(json.dumps({**settings, "legacy": True}), "utf-8")
        return load_tokenizer(copy)


def _save_as_fast(folder: Path, copy: Path) -> None:
    """tokenizer.json from vocab.json and merges.txt, for folders that hold only those (older Qwen2)."""
    if not (folder / "vocab.json").is_file():
        raise CheckpointError(
            f"{folder}: no tokenizer; looked for tokenizer.json, tokenizer.model, vocab.json with merges.txt"
        )
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).save_pretrained(str(copy))


def choose_template(tokenizer: Tokenizer, data: Mapping[str, Any], named: str | None) -> tuple[str, str]:
    """The chat template of a checkpoint whose config.json names none, and what decided it.

    data: config.json. The special tokens of a chat format are the evidence: a tokenizer that has them was trained
    with them. The original picked by substrings of the folder's name.
    """
    from llava.prompt.templates import get_template

    if named is not None:
        return get_template(named).name, "asked for"
    block = data.get("llava")
    if isinstance(block, Mapping) and "template" in block:
        return get_template(str(block["template"])).name, "config.json: llava block"
    text = data.get("text_config") if isinstance(data.get("text_config"), Mapping) else data
    kind = str((text or {}).get("model_type", ""))
    if kind.endswith("mpt"):
        return "mpt", f"config.json: model_type {kind!r}"
    if kind.endswith(("mistral", "mixtral")):
        return "mistral_instruct", f"config.json: model_type {kind!r}"
    if kind.endswith("internlm2"):
        return "internlm2_chat", f"config.json: model_type {kind!r}"
    for token, template in (
        ("<|eot_id|>", "llama_3"),
        ("<|endoftext|>", "qwen_1_5"),
        ("<start_of_turn>", "gemma"),
    ):
        has = tokenizer.has_token(token)
        if template == "qwen_1_5":
            has = has and tokenizer.has_token("<|im_start|>")
        if has:
            return template, f"the tokenizer has {token}"
    if tokenizer.has_token("<|user|>") and tokenizer.has_token("<|end|>"):
        return "phi3_chat", "the tokenizer has <|user|> and <|end|>"
    if tokenizer.has_token("<|im_start|>"):
        return "chatml_direct", "the tokenizer has <|im_start|>"
    if "mm_projector_type" not in data and tokenizer.has_token("[PAD]") and "mm_vision_tower" in data:
        return "llava_v0", "config.json: no mm_projector_type, and the tokenizer has [PAD], as only v0 added it"
    if data.get("model_type") == "llava" and "text_config" in data:
        return "llava_hf", "config.json: model_type 'llava' with a text_config"
    return "vicuna_v1", "nothing in config.json or tokenizer says otherwise"
