"""`tokenizer.json` files, run by the `tokenizers` library."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from llava.prompt.tokenizer_base import RunKind, Tokenizer, described, write_json

# Marks that chat templates are made of; some files forget to call them special.
_CHAT_MARK = re.compile(r"<\|.*\|>|<(start|end)_of_turn>|</?s>|<image>|<im_(start|end|patch)>")


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
        # The library numbers added tokens itself when the file leaves gaps, so ask it.
        contents = [entry["content"] for entry in self._spec.get("added_tokens", [])]
        self.added_tokens = {token: i for token in contents if (i := self._lookup(token)) is not None}
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
            added.append({"id": following + offset, **described(token, special=True)})
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

    def save(self, folder: Path | str, *, portable: bool = True) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "tokenizer.json", self._spec, indent=None)
        self._write_config(folder, tokenizer_class=self.config.get("tokenizer_class", "PreTrainedTokenizerFast"))


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
