"""Segments to token ids, once, with labels from the spans of the answers.

Words are joined into the longest possible runs between special tokens and pictures and each run is tokenized as a
whole, because a tokenizer's pieces depend on their neighbours. A token is supervised when it begins inside a
supervised segment. Nothing is counted twice, so nothing can mismatch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from llava.errors import PromptError
from llava.prompt.chat_template import Segment
from llava.prompt.tokenizer import RunKind, Tokenizer

#: Stands for a picture in `Tokens.ids`, as in the original; no vocabulary has it.
IMAGE_SLOT = -200


@dataclass
class Tokens:
    """ids with one IMAGE_SLOT a picture, and whether each is supervised; equal lengths."""

    ids: list[int] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)


def tokenize(
    segments: Iterable[Segment],
    tokenizer: Tokenizer,
    *,
    restart_after_image: bool | None = None,
    forbidden: frozenset[int] | None = None,
    parse_specials_in_text: bool = False,
) -> Tokens:
    """Tokenize rendered segments, BOS first where the tokenizer has it.

    restart_after_image: the text behind a picture begins like a prompt (None: as the tokenizer's family does).
    forbidden: ids that words may never give (None: all special ids). parse_specials_in_text repeats the original's
    behaviour, where somebody who writes `</s>` ends the turn: for comparisons only.
    """
    restart = tokenizer.restarts_after_image if restart_after_image is None else restart_after_image
    builder = _Builder(tokenizer, forbidden)
    for segment in segments:
        if segment.kind == "image":
            builder.special(IMAGE_SLOT, False)
            builder.kind = "first" if restart else "after"
            continue
        if segment.kind in ("bos", "eos"):
            token = tokenizer.bos_token_id if segment.kind == "bos" else tokenizer.eos_token_id
            if token is None:
                raise PromptError(f"the template needs a {segment.kind} token, which the tokenizer does not name")
            builder.special(token, segment.supervised)
            continue
        if segment.fresh:
            builder.flush()
            builder.kind = "first"
        if segment.kind == "text" and not parse_specials_in_text:
            builder.words(segment.text, segment.supervised)
            continue
        for piece in tokenizer.split_markup(segment.text):
            if isinstance(piece, int):
                builder.special(piece, segment.supervised)
            else:
                builder.words(piece, segment.supervised)
    builder.flush()
    return builder.tokens


class _Builder:
    def __init__(self, tokenizer: Tokenizer, forbidden: frozenset[int] | None) -> None:
        self.tokenizer = tokenizer
        self.forbidden = forbidden
        self.kind: RunKind = "first"
        prefix = tokenizer.prefix_ids
        self.tokens = Tokens(list(prefix), [False] * len(prefix))
        self._texts: list[str] = []
        self._flags: list[bool] = []

    def words(self, text: str, supervised: bool) -> None:
        if text:
            self._texts.append(text)
            self._flags.append(supervised)

    def special(self, token: int, supervised: bool) -> None:
        if self._texts:
            self.flush()
        self.tokens.ids.append(token)
        self.tokens.supervised.append(supervised)
        self.kind = "after"

    def flush(self) -> None:
        """Tokenize the words collected so far as one run."""
        if not self._texts:
            return
        texts, flags, self._texts, self._flags = self._texts, self._flags, [], []
        kind, self.kind = self.kind, "after"
        text = "".join(texts)
        mixed = True in flags and False in flags
        ids, starts = self.tokenizer.encode_with_starts(text, kind=kind, forbidden=self.forbidden, want_starts=mixed)
        self.tokens.ids += ids
        if not mixed:
            self.tokens.supervised += [flags[0]] * len(ids)
            return
        # Tokens that begin inside a segment are that segment's; starts never decrease.
        end = done = 0
        for piece, flag in zip(texts, flags, strict=True):
            end += len(piece)
            upto = bisect_left(starts, end, done)
            self.tokens.supervised += [flag] * (upto - done)
            done = upto
