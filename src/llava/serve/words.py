"""One answer's tokens to what the protocol shows of them: text without the space around it, and log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from llava.inference.detokenize import StreamDetokenizer
from llava.inference.sampling import TokenLogprobs
from llava.inference.service import TokenEvent

_REPLACEMENT = "\ufffd"
_CONTEXT = 6
# JSON has no infinity; OpenAI's own number for what has no probability.
_NO_LOGPROB = -9999.0


@dataclass(frozen=True)
class ShownToken:
    """A token as text; `utf8` is None for one that is only a part of a character."""

    text: str
    utf8: bytes | None
    logprob: float


@dataclass(frozen=True)
class ShownLogprobs:
    """A token of an answer and the likeliest ones in its place."""

    token: ShownToken
    top: tuple[ShownToken, ...]


@dataclass(frozen=True)
class Piece:
    """What is new in the answer `index`; falsy when nothing is."""

    index: int
    text: str
    logprobs: tuple[ShownLogprobs, ...] = ()
    finish_reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.logprobs or self.finish_reason)


class Words:
    """Follows one answer. The pieces' texts joined are the answer without the space around it."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop_strings: Sequence[str],
        stop_token_ids: Collection[int],
        *,
        index: int,
    ) -> None:
        self._decode = decode
        self._detokenizer = StreamDetokenizer(decode, stop_strings)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._index = index
        self._ids: list[int] = []
        self._begun = False
        self._space = ""
        # Log-probabilities wait for their text: (characters before the token, entry).
        self._waiting: list[tuple[int, ShownLogprobs]] = []
        self._chars = 0

    def take(self, event: TokenEvent) -> Piece:
        """The piece after more tokens; with finish_reason "stop" when a stop string ended the answer."""
        text = ""
        for i, token_id in enumerate(event.token_ids):
            text += self._detokenizer.push(token_id)
            if event.logprobs and token_id not in self._stop_token_ids:
                entry = self._show(event.logprobs[i])
                self._waiting.append((self._chars, entry))
                self._chars += len(entry.token.text)
            self._ids.append(token_id)
            if self._detokenizer.stopped:
                return self._piece(text, "stop")
        return self._piece(text, None)

    def end(self, finish_reason: str) -> Piece:
        """The last piece, with the text that was held back."""
        text = self._detokenizer.finish()
        return self._piece(text, "stop" if self._detokenizer.stopped else finish_reason)

    def _piece(self, text: str, finish_reason: str | None) -> Piece:
        text = self._space + text
        if not self._begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        self._begun = self._begun or bool(shown)
        logprobs: tuple[ShownLogprobs, ...] = ()
        if finish_reason is not None and self._detokenizer.stopped:
            end = len(self._detokenizer.text)
            logprobs = tuple(entry for start, entry in self._waiting if start < end)
        elif shown or finish_reason is not None:
            logprobs = tuple(entry for _, entry in self._waiting)
        if logprobs or finish_reason is not None:
            self._waiting.clear()
        return Piece(self._index, shown, logprobs, finish_reason)

    def _show(self, logprobs: TokenLogprobs) -> ShownLogprobs:
        return ShownLogprobs(
            self._as_text(logprobs.token_id, logprobs.logprob),
            tuple(self._as_text(token_id, value) for token_id, value in logprobs.top),
        )

    def _as_text(self, token_id: int, logprob: float) -> ShownToken:
        """A token behind those before it: decoders drop a blank at the beginning of a text."""
        before = self._ids[-_CONTEXT:]
        known, whole = self._decode(before), self._decode([*before, token_id])
        text = whole[len(known) :] if whole.startswith(known) else self._decode([token_id])
        part = _REPLACEMENT in text
        return ShownToken(text, None if part else text.encode(), max(logprob, _NO_LOGPROB))
