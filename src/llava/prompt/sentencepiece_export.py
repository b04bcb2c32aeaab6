"""A `tokenizer.json` beside a `tokenizer.model`, so that engines without sentencepiece open what is saved here.

It gives the ids of the same dialect: legacy text gets its blank in every run, non-legacy text in the first only. Known
gap: non-legacy text that begins with a typed blank loses one there. Here the `tokenizer.model` is read all the same.
Only BPE models are written (Llama's, Vicuna's, Mistral's); a unigram model is left to its own file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_BLANK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def build_tokenizer_json(
    pieces: Sequence[str],
    scores: Sequence[float],
    *,
    plain: Sequence[bool],
    unknown: str,
    legacy: bool,
    adds_prefix: bool,
    added: Sequence[Mapping[str, Any]],
    bos: tuple[str, int] | None,
) -> dict[str, Any] | None:
    """The file's contents, None when the scores are not those of a BPE model.

    plain: whether each piece is text (not control, unknown or a byte). added: entries of `added_tokens`, ids included.
    bos: the token and id that every prompt begins with.
    """
    merges = _merges(pieces, scores, plain)
    if merges is None:
        return None
    prepend: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "▁"}] if adds_prefix else []
    first_only = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_prefix or not legacy else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [dict(entry) for entry in added],
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, _BLANK]} if legacy else None,
        "pre_tokenizer": None if legacy else first_only,
        "post_processor": None if bos is None else _begin_with(*bos),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


def _merges(pieces: Sequence[str], scores: Sequence[float], plain: Sequence[bool]) -> list[list[str]] | None:
    """Every way to put a piece together from two others, best score first, as sentencepiece would merge them."""
    ids = {piece: index for index, piece in enumerate(pieces) if plain[index]}
    if any(scores[index] != int(scores[index]) for index in ids.values()):
        return None  # log probabilities: a unigram model
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, index in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[index], ids[left], ids[right], left, right))
    return [[left, right] for *_, left, right in sorted(ranked)]


def _begin_with(token: str, token_id: int) -> dict[str, Any]:
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
