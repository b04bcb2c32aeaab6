"""Tokens as text that people can read: which words, special tokens and pictures a model sees, and which it learns.

A token may hold a part of a character (byte tokens), so tokens are joined until their text is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from llava.prompt.processor import IGNORE_LABEL, Encoded, Processor

# A UTF-8 character has at most 4 bytes; so many tokens whose text is not whole are not going to be one.
_MAX_JOINED = 8
_CONTEXT = 6


@dataclass(frozen=True)
class Piece:
    """A run of `num_tokens` tokens of one kind. A picture's text is empty: its tokens stand for patches."""

    text: str
    kind: Literal["read", "learnt", "picture"]
    num_tokens: int


def token_pieces(encoded: Encoded, processor: Processor) -> Iterator[Piece]:
    """Each token with its text (several where one alone is no whole character); each picture as one piece."""
    ids = [int(token) for token in encoded.input_ids]
    learnt = [int(label) != IGNORE_LABEL for label in encoded.labels]
    sizes = iter(encoded.tokens_per_image)
    start = 0
    whole: list[int] = []  # where pieces began since the last picture: text cut anywhere else may be no text
    while start < len(ids):
        if ids[start] == processor.image_token_id:
            count = next(sizes, 1)
            yield Piece("", "picture", count)
            start += count
            whole.clear()
            continue
        end = start + 1
        begin = whole[-_CONTEXT:][0] if whole else start
        whole.append(start)
        text = _text(processor, ids, begin, start, end)
        while "\ufffd" in text and end < min(len(ids), start + _MAX_JOINED) and learnt[end] == learnt[start]:
            if ids[end] == processor.image_token_id:
                break
            end += 1
            text = _text(processor, ids, begin, start, end)
        yield Piece(text, "learnt" if learnt[start] else "read", end - start)
        start = end


def join_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with neighbours of one kind joined; each picture stays a piece."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and last.kind == piece.kind != "picture":
            joined[-1] = Piece(last.text + piece.text, piece.kind, last.num_tokens + piece.num_tokens)
        else:
            joined.append(piece)
    return joined


def _text(processor: Processor, ids: list[int], begin: int, start: int, end: int) -> str:
    """The text of ids[start:end] behind that of ids[begin:start]: decoders drop a blank at the beginning."""
    decode = processor.tokenizer.decode
    before = decode(ids[begin:start], skip_special=False)
    both = decode(ids[begin:end], skip_special=False)
    return both[len(before) :] if both.startswith(before) else decode(ids[start:end], skip_special=False)
