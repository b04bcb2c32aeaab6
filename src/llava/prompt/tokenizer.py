"""Text to token ids, so that no words of a user can ever become a special token.

Template text is split at special tokens by `split_markup`; everything else goes through `encode_plain`, which never
parses them. What a piece becomes depends on what stands before it, so each is encoded as one of three kinds of run:

  first   the beginning of a prompt (and, in the original's dialect, the text after a picture)
  after   text that follows a special token
  bare    text cut out of the middle of a run; no prefix of any kind

Two families: `sentencepiece` models in the two dialects of transformers 4's Llama tokenizer (its `legacy` flag; the
class of transformers 5 matches neither), and `tokenizers` files. Not covered: tokenizers defined by remote code.
"""

from __future__ import annotations

import copy
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import sentencepiece
import tokenizers

from llava.errors import CheckpointError, PromptError

RunKind: TypeAlias = Literal["first", "after", "bare"]

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
# Runs up to this many characters are remembered, this many of them (a few MB).
_REMEMBERED_LENGTH = 400
_REMEMBERED_RUNS = 16384
_META = "▁"
# Appended to a serialized sentencepiece model: normalizer_spec.add_dummy_prefix = false (protobuf merges repeats).
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# Marks that chat templates are made of; some files forget to call them special.
_CHAT_MARK = re.compile(r"<\|.*\|>|<(start|end)_of_turn>|</?s>|<image>|<im_(start|end|patch)>")


class Tokenizer(ABC):
    """Text to ids and back. Ids of special tokens come from `token_id` and `split_markup` only."""

    #: Text after a picture begins like a prompt (the original tokenizes each chunk between pictures on its own).
    restarts_after_image: bool

    def __init__(self, config: dict[str, Any], special_tokens_map: dict[str, Any]) -> None:
        self.config = config
        self._special_tokens_map = special_tokens_map
        self.added_tokens: dict[str, int] = {}
        self.special_ids: frozenset[int] = frozenset()
        self.prefix_ids: tuple[int, ...] = ()  # what every prompt begins with: BOS, or nothing
        self._remembered: dict[Any, tuple[list[int], list[int]]] = {}
        self._split_markup: Callable[[str], tuple[str | int, ...]] = lambda text: (text,)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Rows that the embedding needs: the largest id plus one."""

    @abstractmethod
    def _encode_run(self, text: str, kind: RunKind) -> list[int]:
        """Ids of a run of plain text."""

    @abstractmethod
    def _run_starts(self, text: str, ids: Sequence[int], kind: RunKind) -> list[int]:
        """For each id of `_encode_run(text, kind)`, the index of the character where it begins."""

    @abstractmethod
    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids."""

    @abstractmethod
    def save(self, folder: Path | str) -> None:
        """Write the files that `load_tokenizer` (and transformers) reads."""

    @abstractmethod
    def _lookup(self, token: str) -> int | None:
        """The id of a token of the vocabulary or of the added ones."""

    @abstractmethod
    def _add(self, tokens: Sequence[str]) -> None:
        """Append special tokens to the vocabulary."""

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._named_id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._named_id("unk_token")

    def token_id(self, token: str) -> int:
        """The id of one whole token, special or not. Raises PromptError when there is none."""
        found = self._lookup(token)
        if found is None:
            raise PromptError(f"the tokenizer has no token {token!r}; use a template made for this model")
        return found

    def has_token(self, token: str) -> bool:
        return self._lookup(token) is not None

    def encode(self, text: str) -> list[int]:
        """Ids of plain words as at the beginning of a prompt, without BOS. Specials in the text are words too."""
        return self.encode_plain(text)

    def encode_plain(self, text: str, *, kind: RunKind = "first", forbidden: frozenset[int] | None = None) -> list[int]:
        """Ids of a run of words; never one of `forbidden` (all special ids unless given)."""
        return list(self.encode_with_starts(text, kind=kind, forbidden=forbidden, want_starts=False)[0])

    def encode_with_starts(
        self,
        text: str,
        *,
        kind: RunKind = "first",
        forbidden: frozenset[int] | None = None,
        want_starts: bool = True,
    ) -> tuple[list[int], list[int]]:
        """(ids, index of the character where each begins). Without `want_starts` the second list is empty.

        The lists are shared between calls: do not change them. Where an encoding holds a forbidden id, its text is cut
        behind the id's first character and the parts are encoded on their own: the words stay the same, the special
        token cannot arise.
        """
        if not text:
            return [], []
        if len(text) > _REMEMBERED_LENGTH:
            return self._encode_guarded(text, kind, forbidden, want_starts)
        # Data sets repeat themselves: the same question of many pictures costs one look-up.
        key = (text, kind, want_starts, forbidden)
        found = self._remembered.get(key)
        if found is None:
            if len(self._remembered) >= _REMEMBERED_RUNS:
                self._remembered.clear()
            found = self._remembered[key] = self._encode_guarded(text, kind, forbidden, want_starts)
        return found

    def _encode_guarded(
        self, text: str, kind: RunKind, forbidden: frozenset[int] | None, want_starts: bool
    ) -> tuple[list[int], list[int]]:
        ids = self._encode_run(text, kind)
        banned = self.special_ids if forbidden is None else forbidden
        if banned.isdisjoint(ids):
            return ids, self._run_starts(text, ids, kind) if want_starts else []
        starts = self._run_starts(text, ids, kind)
        cuts = sorted({start + 1 for start, token in zip(starts, ids, strict=True) if token in banned} - {len(text)})
        if not cuts:
            raise PromptError(f"the tokenizer has no way to write {text!r} but a special token")
        ids, starts = [], []
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            part_kind: RunKind = "bare" if begin else kind
            part_ids, part_starts = self.encode_with_starts(
                text[begin:end], kind=part_kind, forbidden=banned, want_starts=want_starts
            )
            ids += part_ids
            starts += [begin + start for start in part_starts]
        return ids, starts

    def split_markup(self, text: str) -> tuple[str | int, ...]:
        """Cut template text into plain strings and the ids of the special tokens written in it."""
        return self._split_markup(text)

    def encode_markup(self, text: str) -> list[int]:
        """Ids of trusted text with BOS, special tokens parsed: what the original's tokenizer call returns."""
        ids = list(self.prefix_ids)
        kind: RunKind = "first"
        for piece in self.split_markup(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self.encode_plain(piece, kind=kind)
            kind = "after"
        return ids

    def add_special_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Append tokens that are missing; returns the ids of all of them. Grow the model's embedding accordingly."""
        missing = [token for token in dict.fromkeys(tokens) if not self.has_token(token)]
        if missing:
            listed = list(self._special_tokens_map.get("additional_special_tokens", []))
            self._special_tokens_map["additional_special_tokens"] = listed + missing
            self._add(missing)
        known_as_special = [token for token in tokens if self.token_id(token) in self.special_ids]
        if len(known_as_special) < len(list(tokens)):
            self.special_ids |= {self.token_id(token) for token in tokens}
        return [self.token_id(token) for token in tokens]

    def set_pad_token(self, token: str) -> None:
        """Name the token that pads batches (it must be in the vocabulary)."""
        self.token_id(token)
        self._special_tokens_map["pad_token"] = token
        self.config["pad_token"] = token

    def _named(self, name: str) -> str | None:
        value = self._special_tokens_map.get(name, self.config.get(name))
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def _named_id(self, name: str) -> int | None:
        token = self._named(name)
        return None if token is None else self._lookup(token)

    def _index_specials(self, special: Iterable[str]) -> None:
        """Set `special_ids` and the splitter; call it whenever the added tokens change."""
        named = {token for name in _NAMED if (token := self._named(name)) is not None}
        extra = self._special_tokens_map.get("additional_special_tokens") or self.config.get(
            "additional_special_tokens", []
        )
        listed = {_content(entry) for entry in extra}
        unknown = self._named("unk_token")
        strings = {*special, *named, *listed}
        ids = {self._lookup(token) for token in strings}
        # The unknown token is what an unknown character is: it may arise from text, unless it has another job too.
        jobs = {self._named_id(name) for name in _NAMED if name != "unk_token"}
        if unknown is not None and self._lookup(unknown) not in jobs:
            ids.discard(self._lookup(unknown))
        self.special_ids = frozenset(i for i in ids if i is not None)
        table = {token: self._lookup(token) for token in strings | set(self.added_tokens)}
        known = {token: i for token, i in table.items() if i is not None and token.strip()}
        pattern = re.compile("|".join(re.escape(token) for token in sorted(known, key=len, reverse=True)) or r"(?!)")

        @lru_cache(maxsize=4096)
        def split(text: str) -> tuple[str | int, ...]:
            pieces: list[str | int] = []
            end = 0
            for match in pattern.finditer(text):
                if match.start() > end:
                    pieces.append(text[end : match.start()])
                pieces.append(known[match.group()])
                end = match.end()
            if end < len(text):
                pieces.append(text[end:])
            return tuple(pieces)

        self._split_markup = split
        self._remembered.clear()

    def _write_config(self, folder: Path, **changes: Any) -> None:
        _write_json(folder / "tokenizer_config.json", {**self.config, **changes})
        _write_json(folder / "special_tokens_map.json", self._special_tokens_map)


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model` in one of the two dialects of transformers 4's slow Llama tokenizer.

    legacy (the flag absent or true): text after a special token gets a dummy blank too.
    otherwise: it does not, and leading blanks are kept as they are.
    """

    restarts_after_image = True

    def __init__(
        self,
        model: bytes,
        config: dict[str, Any],
        special_tokens_map: dict[str, Any],
        added_tokens: dict[str, int] | None = None,
    ) -> None:
        super().__init__(config, special_tokens_map)
        self._model = model
        self._with_prefix = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._without_prefix = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        legacy = config.get("legacy")
        self.legacy = True if legacy is None else bool(legacy)
        size = self._with_prefix.vocab_size()
        self._pieces: list[str] = [self._with_prefix.id_to_piece(i) for i in range(size)]
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        # Byte pieces: their value; others: None. A character begins at each byte that does not continue one.
        self._bytes = [int(p[3:5], 16) if self._with_prefix.is_byte(i) else None for i, p in enumerate(self._pieces)]
        self.added_tokens = {token: i for token, i in (added_tokens or {}).items() if i >= size}
        self._special_flags = _flags(config)
        for name, token_id in (("bos_token", self._with_prefix.bos_id()), ("eos_token", self._with_prefix.eos_id())):
            if self._named(name) is None and token_id >= 0:
                self._special_tokens_map[name] = self._pieces[token_id]
        if self._named("unk_token") is None and self._with_prefix.unk_id() >= 0:
            self._special_tokens_map["unk_token"] = self._pieces[self._with_prefix.unk_id()]
        self._unknown = self._named("unk_token") or "<unk>"
        self._unknown_length = len(self._without_prefix.encode(self._unknown, out_type=str))
        self._reindex()

    def _reindex(self) -> None:
        control = [p for i, p in enumerate(self._pieces) if self._with_prefix.is_control(i)]
        added = [token for token in self.added_tokens if self._special_flags.get(token, True)]
        self._index_specials([*control, *added])
        self._by_added_id = {i: token for token, i in self.added_tokens.items()}
        bos = self.bos_token_id
        self.prefix_ids = (bos,) if bos is not None and self.config.get("add_bos_token", True) else ()

    @property
    def vocab_size(self) -> int:
        return max([len(self._pieces) - 1, *self.added_tokens.values()]) + 1

    def _lookup(self, token: str) -> int | None:
        return self.added_tokens.get(token, self._ids.get(token))

    def _add(self, tokens: Sequence[str]) -> None:
        for token in tokens:
            self.added_tokens[token] = self.vocab_size
        self._reindex()

    def _encode_run(self, text: str, kind: RunKind) -> list[int]:
        if kind == "bare":
            return self._without_prefix_encode(text)
        if self.legacy:
            return list(self._with_prefix.encode(text))
        return self._without_prefix_encode(_META + text if kind == "first" else text)

    def _without_prefix_encode(self, text: str) -> list[int]:
        if not text.startswith((_META, " ")):
            return list(self._without_prefix.encode(text))
        # As the non-legacy dialect does: behind another token, leading blanks are not swallowed.
        return list(self._without_prefix.encode(self._unknown + text))[self._unknown_length :]

    def _run_starts(self, text: str, ids: Sequence[int], kind: RunKind) -> list[int]:
        unknown = self._with_prefix.unk_id()
        surfaces = self._surfaces(text, kind) if unknown in ids else None
        starts: list[int] = []
        # The dummy blank stands before the text.
        position = -1 if kind != "bare" and self._prefix_added(text, ids, kind) else 0
        character = position
        for index, token in enumerate(ids):
            value = self._bytes[token]
            if value is not None:
                if value & 0xC0 != 0x80:  # not the continuation of a character
                    character = position
                    position += 1
                starts.append(max(character, 0))
                continue
            starts.append(max(position, 0))
            position += len(self._pieces[token] if surfaces is None else surfaces[index])
        return starts

    def _prefix_added(self, text: str, ids: Sequence[int], kind: RunKind) -> bool:
        if not self.legacy:
            return kind == "first"
        # The model's own flag, read from what it does.
        return len(self._with_prefix.encode(_META)) > len(self._without_prefix.encode(_META)) or bool(
            ids and self._with_prefix.encode("a", out_type=str)[0].startswith(_META)
        )

    def _surfaces(self, text: str, kind: RunKind) -> list[str]:
        if kind != "bare" and self.legacy:
            return list(self._with_prefix.encode(text, out_type=str))
        if kind == "first":
            text = _META + text
        if not text.startswith((_META, " ")):
            return list(self._without_prefix.encode(text, out_type=str))
        return list(self._without_prefix.encode(self._unknown + text, out_type=str))[self._unknown_length :]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """As transformers 4 does it, token by token: the dummy blank at the beginning is dropped."""
        text = ""
        run: list[int] = []
        begun = False
        model = self._with_prefix if self.legacy else self._without_prefix
        for token in self._checked(ids):
            special = token in self.special_ids or token in self._by_added_id or token == self._with_prefix.unk_id()
            if special:
                if skip_special:
                    continue
                text += self._decode_run(run, model, begun)
                run, begun = [], True
                text += self._by_added_id.get(token) or self._pieces[token]
            else:
                run.append(token)
        return text + self._decode_run(run, model, begun)

    def _decode_run(self, run: list[int], model: sentencepiece.SentencePieceProcessor, begun: bool) -> str:
        if not run:
            return ""
        text = str(model.decode(run))
        if not self.legacy and not begun and self._pieces[run[0]].startswith(_META):
            text = text[1:] if text.startswith(" ") else text
        return text

    def _checked(self, ids: Iterable[int]) -> Iterator[int]:
        for token in ids:
            token = int(token)
            if 0 <= token < len(self._pieces) or token in self._by_added_id:
                yield token

    def save(self, folder: Path | str) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self._model)
        if self.added_tokens:
            _write_json(folder / "added_tokens.json", self.added_tokens)
        described = {
            str(i): _described(token, special=i in self.special_ids or token == self._unknown)
            for token, i in sorted(
                {
                    **{t: self._ids[t] for t in self._ids if self._ids[t] in self._control_ids()},
                    **self.added_tokens,
                }.items(),
                key=lambda entry: entry[1],
            )
        }
        config = {"tokenizer_class": "LlamaTokenizer", **self.config, "legacy": self.legacy}
        _write_json(folder / "tokenizer_config.json", {**config, "added_tokens_decoder": described})
        _write_json(folder / "special_tokens_map.json", self._special_tokens_map)

    def _control_ids(self) -> set[int]:
        unknown = self._with_prefix.unk_id()
        return {i for i in range(len(self._pieces)) if self._with_prefix.is_control(i) or i == unknown}


class FastTokenizer(Tokenizer):
    """A `tokenizer.json` run by the `tokenizers` library, special tokens in words left as words."""

    restarts_after_image = False

    def __init__(self, spec: dict[str, Any], config: dict[str, Any], special_tokens_map: dict[str, Any]) -> None:
        super().__init__(config, special_tokens_map)
        self._spec = spec
        self._rebuild()

    def _rebuild(self) -> None:
        self._full = tokenizers.Tokenizer.from_str(json.dumps(self._spec))
        self._full.no_truncation()
        self._full.no_padding()
        self._runs: dict[str, tokenizers.Tokenizer] = {}
        built: dict[str, tokenizers.Tokenizer] = {}
        for kind in ("first", "after", "bare"):
            text = json.dumps(_run_spec(self._spec, kind))
            if text not in built:
                built[text] = tokenizers.Tokenizer.from_str(text)
                built[text].encode_special_tokens = True
            self._runs[kind] = built[text]
        self.added_tokens = {entry["content"]: entry["id"] for entry in self._spec.get("added_tokens", [])}
        flagged = [e["content"] for e in self._spec.get("added_tokens", []) if e.get("special")]
        marks = [token for token in self.added_tokens if _CHAT_MARK.fullmatch(token)]
        self._index_specials([*flagged, *marks])
        self.prefix_ids = self._find_prefix()

    def _find_prefix(self) -> tuple[int, ...]:
        flag = self.config.get("add_bos_token")
        bos = self.bos_token_id
        if isinstance(flag, bool) and bos is not None:
            return (bos,) if flag else ()
        plain = self._full.encode("a", add_special_tokens=False).ids
        dressed = self._full.encode("a", add_special_tokens=True).ids
        for size in range(len(dressed) - len(plain) + 1):
            if dressed[size : size + len(plain)] == plain:
                return tuple(dressed[:size])
        return ()

    @property
    def vocab_size(self) -> int:
        return int(max(self._full.get_vocab(with_added_tokens=True).values())) + 1

    def _lookup(self, token: str) -> int | None:
        found = self._full.token_to_id(token)
        return None if found is None else int(found)

    def _add(self, tokens: Sequence[str]) -> None:
        added = self._spec.setdefault("added_tokens", [])
        following = self.vocab_size
        for offset, token in enumerate(tokens):
            added.append({"id": following + offset, **_described(token, special=True)})
        self._rebuild()

    def _encode_run(self, text: str, kind: RunKind) -> list[int]:
        ids: list[int] = self._runs[kind].encode(text, add_special_tokens=False).ids
        return ids

    def _run_starts(self, text: str, ids: Sequence[int], kind: RunKind) -> list[int]:
        offsets = self._runs[kind].encode(text, add_special_tokens=False).offsets
        return [start for start, _ in offsets]

    def _encode_guarded(
        self, text: str, kind: RunKind, forbidden: frozenset[int] | None, want_starts: bool
    ) -> tuple[list[int], list[int]]:
        # One call for both lists; the general way would encode twice.
        encoding = self._runs[kind].encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if (self.special_ids if forbidden is None else forbidden).isdisjoint(ids):
            return ids, [start for start, _ in encoding.offsets] if want_starts else []
        return super()._encode_guarded(text, kind, forbidden, want_starts)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        known = [token for token in map(int, ids) if token >= 0]
        return str(self._full.decode(known, skip_special_tokens=skip_special))

    def save(self, folder: Path | str) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "tokenizer.json", self._spec, indent=None)
        self._write_config(folder, tokenizer_class=self.config.get("tokenizer_class", "PreTrainedTokenizerFast"))


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Open the tokenizer of a model folder: `tokenizer.json` where there is one, else `tokenizer.model`."""
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    special = _read_json(folder / "special_tokens_map.json")
    if (folder / "tokenizer.json").is_file():
        return FastTokenizer(_read_json(folder / "tokenizer.json"), config, special)
    if (folder / "tokenizer.model").is_file():
        added = {**_decoder_tokens(config), **_read_json(folder / "added_tokens.json")}
        return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes(), config, special, added)
    raise CheckpointError(f"{folder}: no tokenizer; looked for tokenizer.json and tokenizer.model")


def _run_spec(spec: dict[str, Any], kind: str) -> dict[str, Any]:
    """The file's pipeline for one kind of run; offsets are left untrimmed, so that blanks count."""
    spec = copy.deepcopy({**spec, "model": None}) | {"model": spec["model"], "truncation": None, "padding": None}
    for step in _steps(spec.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "ByteLevel":
            step["trim_offsets"] = False
            if kind == "bare":
                step["add_prefix_space"] = False
        if step["type"] == "Metaspace" and (
            kind == "bare" or (kind == "after" and step.get("prepend_scheme") == "first")
        ):
            step["prepend_scheme"] = "never"
            if "add_prefix_space" in step:
                step["add_prefix_space"] = False
    for step in _steps(spec.get("post_processor"), "processors"):
        if "trim_offsets" in step:
            step["trim_offsets"] = False
    if kind == "bare":
        spec["normalizer"] = _without_prepend(spec.get("normalizer"))
    return spec


def _steps(step: dict[str, Any] | None, children: str) -> Iterator[dict[str, Any]]:
    if step is None:
        return
    if step["type"] == "Sequence":
        for child in step[children]:
            yield from _steps(child, children)
    else:
        yield step


def _without_prepend(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        kept = [inner for child in step["normalizers"] if (inner := _without_prepend(child)) is not None]
        return {**step, "normalizers": kept} if kept else None
    return step


def _flags(config: dict[str, Any]) -> dict[str, bool]:
    entries = config.get("added_tokens_decoder", {}).values()
    return {entry["content"]: bool(entry.get("special", True)) for entry in entries}


def _decoder_tokens(config: dict[str, Any]) -> dict[str, int]:
    return {entry["content"]: int(i) for i, entry in config.get("added_tokens_decoder", {}).items()}


def _content(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else str(entry["content"])


def _described(token: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": token, **flags, "special": special}


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


def _write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
