"""Opening the tokenizer of a model folder. What a tokenizer promises is in `tokenizer_base`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.prompt.tokenizer_base import RunKind as RunKind
from llava.prompt.tokenizer_base import Tokenizer as Tokenizer
from llava.prompt.tokenizer_fast import FastTokenizer
from llava.prompt.tokenizer_sentencepiece import SENTENCEPIECE_MARK, SentencePieceTokenizer


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Open the tokenizer of a model folder: `tokenizer.json` where there is one, else `tokenizer.model`.

    A folder saved here from a `tokenizer.model` has both and says in tokenizer_config.json that the latter is meant.
    """
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    special = _read_json(folder / "special_tokens_map.json")
    sentencepiece_first = bool(config.get(SENTENCEPIECE_MARK)) and (folder / "tokenizer.model").is_file()
    if (folder / "tokenizer.json").is_file() and not sentencepiece_first:
        return FastTokenizer(_read_json(folder / "tokenizer.json"), config, special)
    if (folder / "tokenizer.model").is_file():
        added = {**_decoder_tokens(config), **_read_json(folder / "added_tokens.json")}
        return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes(), config, special, added)
    raise CheckpointError(f"{folder}: no tokenizer; looked for tokenizer.json and tokenizer.model")


def _decoder_tokens(config: dict[str, Any]) -> dict[str, int]:
    return {entry["content"]: int(i) for i, entry in config.get("added_tokens_decoder", {}).items()}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as problem:
        raise CheckpointError(f"{path}: not JSON ({problem})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold an object, not {type(value).__name__}")
    return value
