"""A tokenizer as llama.cpp holds it: `llama` (pieces with scores) or `gpt2` (byte-level merges).

llama.cpp's `llama` joins the two neighbours whose joint piece has the highest score. A sentencepiece BPE brings its
scores; a BPE file with byte fallback is the same thing with the rank of the merge for a score. It puts a blank before
the text after every special token, which is the original's (legacy) dialect; a tokenizer without that gets a note.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.prompt.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BLANK = "▁"
# llama.cpp has its own code for each pre-tokenizer; these are the patterns of the families written here.
PRE_TOKENIZERS = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+"
    "|\\s+(?!\\S)|\\s+": "qwen2",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+": "llama-bpe",
}


@dataclass(frozen=True)
class Vocabulary:
    """Pieces by id, one for each row of the embedding, and how text is cut.

    model: "llama" or "gpt2"; pre: name of the pre-tokenizer; merges: for gpt2. named: ids of bos, eos, unk, pad.
    """

    model: str
    pre: str
    pieces: list[str]
    scores: list[float]
    types: list[int]
    named: Mapping[str, int]
    add_bos: bool
    merges: list[str] = field(default_factory=list)
    add_blank: bool = True
    notes: tuple[str, ...] = ()

    def keys(self) -> dict[str, Any]:
        """The GGUF keys; lists are arrays."""
        out: dict[str, Any] = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.pieces,
            "tokenizer.ggml.token_type": self.types,
            "tokenizer.ggml.add_bos_token": self.add_bos,
            "tokenizer.ggml.add_eos_token": False,
        }
        if self.model == "llama":
            out["tokenizer.ggml.scores"] = self.scores
            out["tokenizer.ggml.add_space_prefix"] = self.add_blank
        else:
            out["tokenizer.ggml.merges"] = self.merges
        return {**out, **{f"tokenizer.ggml.{name}_token_id": value for name, value in self.named.items()}}


def make_vocabulary(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer for an embedding of `rows` rows; rows without a piece are filled with unused ones.

    Raises CheckpointError for a kind of tokenizer that llama.cpp does not have.
    """
    with tempfile.TemporaryDirectory(prefix="llava-vocabulary-") as name:
        folder = Path(name)
        tokenizer.save(folder)
        if (folder / "tokenizer.model").is_file():  # a tokenizer.json beside it is a copy for other engines
            made = _from_sentencepiece(folder / "tokenizer.model", tokenizer, rows)
        else:
            spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
            made = _from_spec(spec, tokenizer, rows)
    return made


def _from_sentencepiece(path: Path, tokenizer: Tokenizer, rows: int) -> Vocabulary:
    import sentencepiece

    data = path.read_bytes()
    if _model_type(data) != "bpe":
        raise CheckpointError(
            f"{path.name}: not a BPE but a {_model_type(data)} model; llama.cpp would cut it otherwise"
        )
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    table = _Table(rows)
    for i in range(model.vocab_size()):
        kind = NORMAL
        if model.is_unknown(i):
            kind = UNKNOWN
        elif model.is_control(i):
            kind = CONTROL
        elif model.is_byte(i):
            kind = BYTE
        elif model.is_unused(i):
            kind = UNUSED
        table.put(i, model.id_to_piece(i), kind, model.get_score(i))
    table.put_added(tokenizer)
    notes: tuple[str, ...] = ()
    if not getattr(tokenizer, "legacy", True):
        notes = (
            "llama.cpp puts a blank after special tokens inside a prompt; this tokenizer (legacy: false) does not",
        )
    return table.finished("llama", "default", tokenizer, notes=notes)


def _model_type(data: bytes) -> str:
    """unigram, bpe, word or char, from the serialized model: ModelProto.trainer_spec (2) . model_type (3)."""
    names = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
    kind = 1
    for number, value in _fields(data):
        if number == 2 and isinstance(value, bytes):
            kind = next((int(v) for n, v in _fields(value) if n == 3 and isinstance(v, int)), kind)
    return names.get(kind, "unknown")


def _fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """The fields of one protobuf message, nested ones as bytes."""
    out: list[tuple[int, int | bytes]] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            out.append((tag >> 3, varint()))
            continue
        size = {1: 8, 5: 4}.get(tag & 7) or varint()
        out.append((tag >> 3, data[at : at + size]))
        at += size
    return out


def _from_spec(spec: Mapping[str, Any], tokenizer: Tokenizer, rows: int) -> Vocabulary:
    model = spec["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(f"tokenizer.json: model {model.get('type')!r}; llama.cpp takes BPE here")
    steps = [*_steps(spec.get("normalizer"), "normalizers"), *_steps(spec.get("pre_tokenizer"), "pretokenizers")]
    kinds = {step["type"] for step in steps}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if "ByteLevel" in kinds:
        return _byte_level(model, merges, steps, tokenizer, rows)
    if not model.get("byte_fallback") or not kinds & {"Prepend", "Replace", "Metaspace"}:
        raise CheckpointError("tokenizer.json: neither a Llama-style BPE with byte fallback nor a byte-level one")
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    table = _Table(rows)
    for piece, i in model["vocab"].items():
        kind = UNKNOWN if piece == model.get("unk_token") else NORMAL
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            kind = BYTE
        # a piece that no merge makes cannot arise from text; llama.cpp would join any neighbours into it
        lost = kind == NORMAL and len(piece) > 1 and piece not in ranks
        table.put(i, piece, kind, float(-len(merges) - 1 if lost else -ranks.get(piece, 0)))
    table.put_added(tokenizer)
    schemes = {str(step.get("prepend_scheme", "always")) for step in steps if step["type"] == "Metaspace"}
    add_blank = "Prepend" in kinds or bool(schemes & {"always", "first"})
    notes: tuple[str, ...] = ()
    if schemes == {"first"} or (add_blank and not schemes and "Prepend" not in kinds):
        notes = ("llama.cpp puts a blank after special tokens inside a prompt; this tokenizer does not",)
    return table.finished("llama", "default", tokenizer, add_blank=add_blank, notes=notes)


def _byte_level(
    model: Mapping[str, Any],
    merges: list[tuple[str, ...]],
    steps: list[Mapping[str, Any]],
    tokenizer: Tokenizer,
    rows: int,
) -> Vocabulary:
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    if not patterns:
        pre = "gpt-2"
    elif len(patterns) == 1 and patterns[0] in PRE_TOKENIZERS:
        pre = PRE_TOKENIZERS[patterns[0]]
    else:
        raise CheckpointError(
            f"tokenizer.json: pre-tokenizer {patterns[0]!r} is none of those written here (gpt-2, "
            f"{', '.join(PRE_TOKENIZERS.values())}); use llama.cpp's convert_hf_to_gguf.py for the language model"
        )
    table = _Table(rows)
    for piece, i in model["vocab"].items():
        table.put(i, piece, NORMAL, 0.0)
    table.put_added(tokenizer)
    return table.finished("gpt2", pre, tokenizer, merges=[" ".join(merge) for merge in merges])


def _steps(step: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for child in step[children] for inner in _steps(child, children)]
    return [step]


class _Table:
    """Pieces collected by id; what lies beyond the embedding's rows is left out."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.entries: dict[int, tuple[str, int, float]] = {}

    def put(self, i: int, piece: str, kind: int, score: float) -> None:
        if i < self.rows:
            self.entries[i] = (piece, kind, score)

    def put_added(self, tokenizer: Tokenizer) -> None:
        """Added tokens, and special ids that the model itself calls ordinary."""
        for piece, i in tokenizer.added_tokens.items():
            kind = self.entries.get(i, ("", NORMAL, 0.0))[1]
            if kind not in (UNKNOWN, BYTE):
                self.put(i, piece, CONTROL if i in tokenizer.special_ids else USER_DEFINED, 0.0)
        for i in tokenizer.special_ids:
            if i in self.entries and self.entries[i][1] in (NORMAL, USER_DEFINED):
                self.entries[i] = (self.entries[i][0], CONTROL, 0.0)

    def finished(
        self,
        model: str,
        pre: str,
        tokenizer: Tokenizer,
        *,
        merges: list[str] | None = None,
        add_blank: bool = True,
        notes: tuple[str, ...] = (),
    ) -> Vocabulary:
        taken = {piece for piece, _, _ in self.entries.values()}
        entries = []
        for i in range(self.rows):
            piece, kind, score = self.entries.get(i, (f"[PAD{i}]", UNUSED, 0.0))
            if i not in self.entries and piece in taken:
                piece = f"[UNUSED{i}]"
            entries.append((piece, kind, score))
        ids = {
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "unknown": tokenizer.unk_token_id,
            "padding": tokenizer.pad_token_id,
        }
        bos = tokenizer.bos_token_id
        return Vocabulary(
            model=model,
            pre=pre,
            pieces=[piece for piece, _, _ in entries],
            scores=[score for _, _, score in entries],
            types=[kind for _, kind, _ in entries],
            named={name: i for name, i in ids.items() if i is not None and i < self.rows},
            add_bos=bos is not None and tokenizer.prefix_ids == (bos,),
            merges=merges or [],
            add_blank=add_blank,
            notes=notes,
        )
