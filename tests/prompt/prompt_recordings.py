"""Reads the recordings of the original LLaVA in tests/golden/prompt and opens the tokenizers they were made with."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from llava.prompt.conversation import Conversation, from_llava
from llava.prompt.tokenizer import Tokenizer, load_tokenizer
from llava.prompt.tokenizer_base import described
from llava.prompt.tokenizer_fast import FastTokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "prompt"

FOLDERS = {
    "llama_legacy": "vicuna-tiny-v1.3",
    "llama_nonlegacy": "vicuna-tiny-v1.5",
    "llama_raw": "llama-tiny",
    "mpt": "mpt-tiny-chat",
    "llama_chatml_legacy": "vicuna-tiny-v1.3",
    "llama_chatml_nonlegacy": "vicuna-tiny-v1.5",
}
# The original's --version to the template that it really used (facts: "v0" trains vicuna_v1, "llava_v0" its own code).
TEMPLATE_OF_VERSION = {
    "v0": "vicuna_v1",
    "v0.5": "vicuna_v1",
    "llava_v0": "llava_v0_training",
    "v0_mmtag": "v0_mmtag_training",
}


def read(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def open_tokenizer(name: str, *, added: tuple[str, ...] = ()) -> Tokenizer:
    """A fresh tokenizer as the recordings name it: `_nobos` adds no BOS, `chatml` knows the ChatML marks."""
    folder = GOLDEN / "tokenizers" / FOLDERS[name.removesuffix("_nobos")]
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(shutil.copytree(folder, Path(temporary) / "copy"))
        if name.endswith("_nobos"):
            config = json.loads((copy / "tokenizer_config.json").read_text())
            (copy / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
        tokenizer = load_tokenizer(copy)
    marks = ("<|im_start|>", "<|im_end|>") if "chatml" in name else ()
    tokenizer.add_special_tokens([*marks, *added])
    return tokenizer


@cache
def tokenizer_of(name: str, version: str, start_end: bool) -> Tokenizer:
    """The tokenizer of a recorded training run, with the tokens that the original's version adds."""
    pad = ("[PAD]",) if version == "v0" else ()
    return open_tokenizer(name, added=(*pad, *(("<im_start>", "<im_end>") if start_end else ())))


def training_files() -> list[str]:
    return sorted(path.name for path in (GOLDEN / "h_text").glob("*__*.json"))


@cache
def training_file(name: str) -> Any:
    return read(f"h_text/{name}")


def conversation_of(case: dict[str, Any], *, one_image: bool = False) -> Conversation:
    """A recorded case as a Conversation. one_image: collapse the marks of a message to one, as the original does."""
    turns = case["conversations"]
    if one_image:
        turns = [{**turn, "value": _collapsed(turn["value"])} for turn in turns]
    marks = sum(turn["value"].count("<image>") for turn in turns) if case["has_image"] else 0
    return from_llava({"conversations": turns, "image": ["picture.png"] * marks})


def _collapsed(value: str) -> str:
    return "<image>\n" + value.replace("<image>", "").strip() if value.count("<image>") > 1 else value


@cache
def llama_like(*, prefix: str) -> FastTokenizer:
    """A small byte-fallback tokenizer.json: `prefix` "prepend" (legacy), "first" or "always" (Metaspace)."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    specials = ["<unk>", "<s>", "</s>"]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=specials + bytes_, show_progress=False)
    trained.train_from_iterator(["USER: what is in the image? ASSISTANT: a red bowl </s> <s> [INST] x"] * 3, trainer)
    spec = json.loads(trained.to_str())
    spec["added_tokens"] = [{"id": i, **described(token, special=True)} for i, token in enumerate(specials)]
    size = len(spec["model"]["vocab"])
    spec["added_tokens"].append({"id": size, **described("<|end|>", special=False)})
    spec["added_tokens"].append({"id": size + 1, **described("<image>", special=True)})
    if prefix == "prepend":
        spec["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }
        spec["pre_tokenizer"] = None
    else:
        spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prefix, "split": False}
    decoders: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    spec["decoder"] = {"type": "Sequence", "decoders": decoders}
    return FastTokenizer(spec, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, {})
