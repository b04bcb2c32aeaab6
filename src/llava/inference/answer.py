"""Text in, text out: one conversation through processor, engine and detokenizer.

assistant = Assistant(loaded.model, loaded.processor)
stream = assistant.stream(conversation, SamplingParams(max_new_tokens=64))
for piece in stream: print(piece, end="")
stream.answer()                                     # the whole of it, with token ids and how it ended
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llava.inference.detokenize import StreamDetokenizer
from llava.inference.engine import Engine
from llava.inference.requests import FinishReason, Generation
from llava.inference.sampling import SamplingParams

if TYPE_CHECKING:
    from llava.model.llava import Llava
    from llava.prompt.conversation import Conversation
    from llava.prompt.processor import Processor


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    text: without special tokens, stop strings and surrounding space. prompt_token_ids: as the model saw them, one
    placeholder for each feature row of a picture. token_ids: with the stop token, if one ended the answer. seconds:
    from the encoded prompt to the last token.
    """

    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seconds: float


class AnswerStream:
    """An answer under way; iterate for its text, piece by piece. Work is done while iterating."""

    def __init__(self, generation: Generation, detokenizer: StreamDetokenizer) -> None:
        self._generation = generation
        self._detokenizer = detokenizer
        self._started = time.perf_counter()
        self._seconds = 0.0
        self._stopped_by_text = False

    def __iter__(self) -> Iterator[str]:
        for token_id in self._generation:
            piece = self._detokenizer.push(token_id)
            if piece:
                yield piece
            if self._detokenizer.stopped:
                self._stopped_by_text = True
                self._generation.cancel()
                break
        rest = self._detokenizer.finish()
        if rest:
            yield rest
        self._seconds = time.perf_counter() - self._started

    def cancel(self) -> None:
        """End the answer where it is; what was said so far stays."""
        self._generation.cancel()

    def answer(self) -> Answer:
        """The finished answer; call it after iterating to the end."""
        generation = self._generation
        reason: FinishReason = "stop" if self._stopped_by_text else generation.completion().finish_reason
        return Answer(
            text=self._detokenizer.text.strip(),
            prompt_token_ids=tuple(generation.request.encoded.input_ids.tolist()),
            token_ids=tuple(generation.token_ids),
            finish_reason=reason,
            seconds=self._seconds,
        )


class Assistant:
    """A model that answers conversations."""

    def __init__(self, model: Llava, processor: Processor, *, engine: Engine | None = None) -> None:
        self.processor = processor
        self.engine = engine or Engine(model)

    def stream(
        self, conversation: Conversation, params: SamplingParams | None = None, *, stop_strings: Sequence[str] = ()
    ) -> AnswerStream:
        """Begin to answer a conversation that ends with a user's turn.

        The template's stop tokens and stop strings are added to those given. Raises PromptError, ImageError or
        ContextLengthError before any work when the conversation cannot be answered.
        """
        processor = self.processor
        encoded = processor.encode(conversation, open_turn=True)
        params = params or SamplingParams()
        stops = dict.fromkeys((*params.stop_token_ids, *processor.stop_token_ids))
        generation = self.engine.submit(encoded, replace(params, stop_token_ids=tuple(stops)))
        return AnswerStream(generation, StreamDetokenizer(processor.decode, (*stop_strings, *processor.stop_strings)))

    def answer(
        self, conversation: Conversation, params: SamplingParams | None = None, *, stop_strings: Sequence[str] = ()
    ) -> Answer:
        """Answer a conversation; arguments and errors as in `stream`."""
        stream = self.stream(conversation, params, stop_strings=stop_strings)
        for _ in stream:
            pass
        return stream.answer()
