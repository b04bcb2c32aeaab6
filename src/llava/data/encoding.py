"""From conversation numbers to encoded conversations: what the loader's workers do for each group."""

from __future__ import annotations

from collections.abc import Sequence

from llava.data.sources import ConversationSet
from llava.errors import ContextLengthError, DataError, ImageError
from llava.prompt.conversation import Conversation
from llava.prompt.processor import Encoded, PreparedImage, Processor


class GroupEncoder:
    """Encodes the conversations of a group; a picture that several of them show is decoded once.

    Raises DataError naming the record for a malformed one, an unreadable picture, or (unless `drop_too_long`) a
    conversation longer than `max_tokens`. A dropped conversation is left out of the result; the loader counts it.
    """

    def __init__(
        self, conversations: ConversationSet, processor: Processor, *, max_tokens: int, drop_too_long: bool = False
    ) -> None:
        self._conversations = conversations
        self._processor = processor
        self._max_tokens = max_tokens
        self._drop_too_long = drop_too_long

    def __call__(self, group: Sequence[int]) -> list[Encoded]:
        prepared: dict[object, PreparedImage] = {}
        encoded: list[Encoded] = []
        for number in group:
            conversation = self._conversations[number]
            images = [self._prepare(prepared, conversation, place) for place in range(len(conversation.images))]
            try:
                encoded.append(self._processor.encode(conversation, images=images, max_length=self._max_tokens))
            except ContextLengthError as error:
                if not self._drop_too_long:
                    raise DataError(f"{error}; or raise data.max_tokens, or set data.too_long to drop") from error
        return encoded

    def _prepare(self, prepared: dict[object, PreparedImage], conversation: Conversation, place: int) -> PreparedImage:
        image = conversation.images[place]
        if image not in prepared:
            try:
                prepared[image] = self._processor.prepare_image(image)
            except ImageError as error:
                raise DataError(f"{conversation.origin}: {error}") from error
        return prepared[image]
