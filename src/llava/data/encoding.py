"""From conversation numbers to encoded conversations: what the loader's workers do for each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from llava.data.bad_samples import BadSample
from llava.data.sources import ConversationSet
from llava.errors import ContextLengthError, DataError, ImageError, PromptError
from llava.prompt.conversation import Conversation
from llava.prompt.processor import Encoded, PreparedImage, Processor

if TYPE_CHECKING:
    from llava.data.token_cache import TokenCache

#: What to do with a conversation that is longer than the limit.
TooLong = Literal["error", "drop", "truncate"]


class GroupEncoder:
    """Encodes the conversations of a group; a picture that several of them show is decoded once.

    A conversation that cannot be used (a malformed record, an unreadable picture, an empty turn, nothing to learn)
    gives a BadSample in its place. One longer than `max_tokens` is a DataError, or left out of the result (the loader
    counts it), or cut to its first whole turns; when not even the first question and answer fit, it is left out too.
    """

    def __init__(
        self,
        conversations: ConversationSet,
        processor: Processor,
        *,
        max_tokens: int,
        too_long: TooLong = "error",
        cache: TokenCache | None = None,
    ) -> None:
        self._conversations = conversations
        self._processor = processor
        self._max_tokens = max_tokens
        self._too_long: TooLong = too_long
        self._cache = cache

    def __call__(self, group: Sequence[int]) -> list[Encoded | BadSample]:
        pictures = _Pictures(self._processor)
        results: list[Encoded | BadSample] = []
        for number in group:
            try:
                encoded = self._encode(number, pictures)
            except ContextLengthError as error:
                raise DataError(
                    f"{error}; or raise data.max_tokens, or set data.too_long to drop or truncate"
                ) from error
            except (DataError, ImageError, PromptError) as error:
                results.append(BadSample.of(number, self._conversations.origin(number), error))
                continue
            if encoded is not None:
                results.append(encoded)
        return results

    def _encode(self, number: int, pictures: _Pictures) -> Encoded | None:
        """One conversation; None when it is left out as too long."""
        conversation = self._conversations[number]
        _check_turns(conversation)
        images = [pictures.prepare(conversation, place) for place in range(len(conversation.images))]
        if self._cache is not None and (known := self._cache.get(number, images)) is not None:
            return known.encoded
        try:
            encoded: Encoded | None = self._limited(conversation, images)
        except ContextLengthError:
            if self._too_long == "error":
                raise
            encoded = None
        if encoded is not None and not encoded.num_answer_tokens:
            raise DataError("no token of it is supervised; give it an answer")
        if self._cache is not None:
            self._cache.put(number, images, encoded)
        return encoded

    def _limited(self, conversation: Conversation, images: Sequence[PreparedImage]) -> Encoded:
        limit = self._max_tokens if self._too_long != "truncate" else None
        whole = self._processor.encode(conversation, images=images, max_length=limit)
        if len(whole.input_ids) <= self._max_tokens:
            return whole
        return truncate(conversation, images, self._processor, max_tokens=self._max_tokens, whole=whole)


def truncate(
    conversation: Conversation,
    images: Sequence[PreparedImage],
    processor: Processor,
    *,
    max_tokens: int,
    whole: Encoded,
) -> Encoded:
    """The most first turns of a conversation, ending with an answer, that `max_tokens` hold and that teach something.

    Turns stay whole, and so do pictures. whole: the conversation without a limit. Raises ContextLengthError when not
    even the first answer fits, or none of those that fit is supervised.
    """
    ends = [place for place, message in enumerate(conversation.messages, start=1) if message.role == "assistant"]
    best: Encoded | None = None
    low, high = 0, len(ends)
    while low < high:  # lengths grow with the turns, so halving finds the last that fits
        middle = (low + high) // 2
        shorter = replace(conversation, messages=conversation.messages[: ends[middle]])
        encoded = processor.encode(shorter, images=images[: len(shorter.images)])
        if len(encoded.input_ids) <= max_tokens:
            best, low = encoded, middle + 1
        else:
            high = middle
    if best is None or not best.num_answer_tokens:
        raise ContextLengthError(
            f"{conversation.origin}: {len(whole.input_ids)} tokens; no answer of it fits in {max_tokens}"
        )
    return replace(best, num_truncated=len(whole.input_ids) - len(best.input_ids))


class _Pictures:
    """The pictures of a group, each decoded once, whether it can be read or not."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._prepared: dict[object, PreparedImage | ImageError] = {}

    def prepare(self, conversation: Conversation, place: int) -> PreparedImage:
        image = conversation.images[place]
        if image not in self._prepared:
            try:
                self._prepared[image] = self._processor.prepare_image(image)
            except ImageError as error:
                self._prepared[image] = error
        found = self._prepared[image]
        if isinstance(found, ImageError):
            raise found
        return found


def _check_turns(conversation: Conversation) -> None:
    """Refuse what can teach nothing, or teaches to say nothing."""
    messages = conversation.messages
    for number, message in enumerate(messages, start=1):
        if message.role != "system" and not message.images and not message.text.strip():
            raise DataError(f"turn {number} (of the {message.role}) is empty; fill it or drop the record")
    if not any(message.role == "assistant" and message.supervised for message in messages):
        raise DataError("no answer to learn in it; add one or drop the record")
