"""From token ids as they come to text that may be shown: whole characters only, cut at stop strings.

A token may hold a part of a character (byte tokens) and a stop string may be spread over several tokens, so text is
held back while it could still change. The text that was given out is never taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"

# A UTF-8 character has at most 4 bytes; bytes still undecodable after this many tokens are not going to be one.
_MAX_HELD_TOKENS = 8


class StreamDetokenizer:
    """Turns one answer's tokens into text, piece by piece.

    decode: ids -> text, without special tokens; it may drop a leading space of the first token, as sentencepiece does.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop_strings: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop_strings = tuple(stop for stop in stop_strings if stop)
        self._ids: list[int] = []
        # Text up to _done is decoded; _context before it keeps the decoder's spacing right for what follows.
        self._context = 0
        self._done = 0
        self._text = ""
        self._shown = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text given out so far."""
        return self._text[: self._shown]

    def push(self, token_id: int) -> str:
        """The text that may be shown after this token; often empty. Once `stopped` is True, always empty."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        self._text += self._new_text(final=False)
        return self._show(final=False)

    def finish(self) -> str:
        """The text that was held back, when no more tokens come."""
        if self.stopped:
            return ""
        self._text += self._new_text(final=True)
        return self._show(final=True)

    def _new_text(self, *, final: bool) -> str:
        known = self._decode(self._ids[self._context : self._done])
        whole = self._decode(self._ids[self._context :])
        held = len(self._ids) - self._done
        if whole.endswith(_REPLACEMENT) and not final and held < _MAX_HELD_TOKENS:
            return ""
        self._context = self._done
        self._done = len(self._ids)
        return whole[len(known) :]

    def _show(self, *, final: bool) -> str:
        stop = self._find_stop()
        if stop is not None:
            self.stopped = True
            end = stop
        elif final:
            end = len(self._text)
        else:
            end = len(self._text) - self._possible_stop_length()
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        if self.stopped:
            self._text = self._text[: self._shown]
        return piece

    def _find_stop(self) -> int | None:
        """Where the first stop string begins in the text not yet given out."""
        found = [at for at in (self._text.find(stop, self._shown) for stop in self._stop_strings) if at >= 0]
        return min(found, default=None)

    def _possible_stop_length(self) -> int:
        """How many characters at the text's end could be the start of a stop string."""
        unseen = len(self._text) - self._shown
        return max(
            (
                length
                for stop in self._stop_strings
                for length in range(1, min(len(stop) - 1, unseen) + 1)
                if self._text.endswith(stop[:length])
            ),
            default=0,
        )
