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

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from llava.errors import PromptError

RunKind: TypeAlias = Literal["first", "after", "bare"]

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
# Runs up to this many characters are remembered, this many of them (a few MB).
_REMEMBERED_LENGTH = 400
_REMEMBERED_RUNS = 16384


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
    def save(self, folder: Path | str, *, portable: bool = True) -> None:
        """Write the files that `load_tokenizer` reads; portable: and those that other engines need."""

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
        # The unknown token is what an unknown character is, so it may arise from text; that it pads too (the original
        # names it so) does not matter, but that it ends answers (GPT-NeoX) does.
        jobs = {self._named_id(name) for name in _NAMED if name not in ("unk_token", "pad_token")}
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
        write_json(folder / "tokenizer_config.json", {**self.config, **changes})
        write_json(folder / "special_tokens_map.json", self._special_tokens_map)


def _content(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else str(entry["content"])


def described(token: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": token, **flags, "special": special}


def write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
