"""`tokenizer.model` files, in the two dialects of transformers 4's slow Llama tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.prompt.sentencepiece_export import build_tokenizer_json
from llava.prompt.tokenizer_base import RunKind, Tokenizer, described, write_json

if TYPE_CHECKING:
    import sentencepiece

_META = "▁"
# In tokenizer_config.json: a tokenizer.json lies beside it for others, tokenizer.model is what is meant.
SENTENCEPIECE_MARK = "llava_reads_tokenizer_model"
# Appended to a serialized sentencepiece model: normalizer_spec.add_dummy_prefix = false (protobuf merges repeats).
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


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
        if config.get(SENTENCEPIECE_MARK):
            config = {**config, "tokenizer_class": "LlamaTokenizer"}
            del config[SENTENCEPIECE_MARK]
        super().__init__(config, special_tokens_map)
        self._model = model
        import sentencepiece  # here: only those who open such a model need the package

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
        self._adds_prefix = self._with_prefix.encode("a", out_type=str)[0].startswith(_META)
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
        prefixed = self._adds_prefix if self.legacy else kind == "first"
        position = -1 if kind != "bare" and prefixed else 0
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
        if position == len(text):
            return starts
        # The model rewrites characters (NFKC, say), so its pieces do not add up to the text: count by prefixes.
        return self._starts_by_prefixes(text, ids, kind)

    def _starts_by_prefixes(self, text: str, ids: Sequence[int], kind: RunKind) -> list[int]:
        """Slow and sure: token k begins behind the longest prefix of the text that takes no more than k tokens."""
        counts = [len(self._encode_run(text[:end], kind)) for end in range(len(text))]
        return [max(end for end, count in enumerate(counts) if count <= index) for index in range(len(ids))]

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

    def save(self, folder: Path | str, *, portable: bool = True) -> None:
        """Write tokenizer.model with its companions; portable: and a tokenizer.json, where one can say the same."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self._model)
        if self.added_tokens:
            write_json(folder / "added_tokens.json", self.added_tokens)
        control = {self._pieces[i]: i for i in self._control_ids()}
        entries = [
            {"id": i, **described(token, special=i in self.special_ids or token == self._unknown)}
            for token, i in sorted({**control, **self.added_tokens}.items(), key=lambda entry: entry[1])
        ]
        config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", **self.config, "legacy": self.legacy}
        fast = self._as_fast(entries) if portable else None
        (folder / "tokenizer.json").unlink(missing_ok=True)
        if fast is not None:
            write_json(folder / "tokenizer.json", fast, indent=None)
            # The generic class runs the file as it is; transformers 5's Llama class would rebuild it its own way.
            config |= {"tokenizer_class": "PreTrainedTokenizerFast", SENTENCEPIECE_MARK: True}
        config["added_tokens_decoder"] = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in entries
        }
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", self._special_tokens_map)

    def _as_fast(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        size = len(self._pieces)
        control = self._control_ids()
        bos = (self._named("bos_token") or "", self.prefix_ids[0]) if self.prefix_ids else None
        if sorted(self.added_tokens.values()) != list(range(size, size + len(self.added_tokens))):
            return None  # the tokenizers library numbers added tokens without gaps
        return build_tokenizer_json(
            self._pieces,
            [self._with_prefix.get_score(i) for i in range(size)],
            plain=[i not in control and self._bytes[i] is None for i in range(size)],
            unknown=self._unknown,
            legacy=self.legacy,
            adds_prefix=self._adds_prefix,
            added=entries,
            bos=bos,
        )

    def _control_ids(self) -> set[int]:
        unknown = self._with_prefix.unk_id()
        return {i for i in range(len(self._pieces)) if self._with_prefix.is_control(i) or i == unknown}


def _flags(config: dict[str, Any]) -> dict[str, bool]:
    entries = config.get("added_tokens_decoder", {}).values()
    return {entry["content"]: bool(entry.get("special", True)) for entry in entries}
