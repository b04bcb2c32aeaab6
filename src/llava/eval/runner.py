"""Questions of a benchmark, asked of a model here: those on one picture as one tree, the longest first.

The engine reads a picture once for all questions about it, so a benchmark with many questions a picture costs little
more than one with one. What is asked, how answers are chosen and how long they may be are the task's own settings.

    answerer = LocalModel(llava.load(path))
    rows = ask_all(answerer, questions, decoding, log)          # in the questions' order

A model behind an address is in endpoint.py. Not covered: several devices by one process; each takes a `Shard`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llava.errors import DataError, LlavaError, UsageError
from llava.eval.answers import AnswerLog
from llava.eval.task import AnswerRow, Question

if TYPE_CHECKING:
    from llava.inference.requests import Request
    from llava.inference.sampling import SamplingParams
    from llava.inference.talk import Model
    from llava.prompt.processor import Encoded, PreparedImage

OnAnswer = Callable[[Question, str, LlavaError | None], None]

# What a task's `decoding` may hold besides the names of SamplingParams. do_sample is said by the temperature.
BEAM_SETTINGS = ("num_beams", "length_penalty")
_PROMPTS_AT_ONCE = 8


class Answerer(Protocol):
    """Something that answers questions."""

    model_id: str

    def describe(self) -> dict[str, Any]:
        """What the report says of it: model, weights, versions, device."""

    def answer(self, questions: Sequence[Question], decoding: Mapping[str, Any], on_answer: OnAnswer) -> None:
        """Answer all, in any order; on_answer hears of each once, with the error where there is no answer."""


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, from 0. Questions on one picture are in one part."""

    number: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "2/4", the third of four. Raises UsageError."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or int(found[1]) >= int(found[2]):
            raise UsageError(f"--shard {text}: write K/N with K from 0 to N - 1, 0/4 for the first of four")
        return cls(int(found[1]), int(found[2]))

    @property
    def file_name(self) -> str:
        return "answers.jsonl" if self.count == 1 else f"answers-of-{self.count}_{self.number}.jsonl"

    def of(self, questions: Sequence[Question]) -> list[Question]:
        """This part's questions, in their order."""
        place = {images: number for number, images in enumerate(dict.fromkeys(q.images for q in questions))}
        return [question for question in questions if place[question.images] % self.count == self.number]


def ask_all(
    answerer: Answerer,
    questions: Sequence[Question],
    decoding: Mapping[str, Any],
    log: AnswerLog,
    *,
    on_answer: Callable[[Question, LlavaError | None], None] = lambda question, error: None,
    skip_errors: bool = False,
) -> list[AnswerRow]:
    """Answer what the log does not hold yet; returns all its answers in the questions' order.

    skip_errors: a question that cannot be answered is left out, with its error in the file, instead of ending the run.
    Raises DataError for a picture that is not there, before any work.
    """
    check_pictures(questions)

    def heard(question: Question, text: str, error: LlavaError | None) -> None:
        if error is not None and not skip_errors:
            raise type(error)(f"question {question.id}: {error}") from error
        log.write(question, text, error=None if error is None else str(error))
        on_answer(question, error)

    done = log.done
    left = [question for question in questions if question.id not in done]
    if left:
        answerer.answer(left, decoding, heard)
    return log.finish()


def check_pictures(questions: Sequence[Question]) -> None:
    """Raise DataError, with how many and the first, when pictures are not there."""
    pictures = dict.fromkeys(picture for question in questions for picture in question.images)
    missing = [picture for picture in pictures if not picture.is_file()]
    if missing:
        raise DataError(
            f"{missing[0]}: no such picture ({len(missing)} of {len(pictures)} are missing); "
            "put the benchmark's pictures there"
        )


def longest_first(questions: Sequence[Question]) -> list[list[Question]]:
    """Questions by picture, groups and questions in order of falling length, so that no long one is left to the end."""
    groups: dict[tuple[Path, ...], list[Question]] = {}
    for question in questions:
        groups.setdefault(question.images, []).append(question)
    for group in groups.values():
        group.sort(key=_length, reverse=True)
    return sorted(groups.values(), key=lambda group: _length(group[0]), reverse=True)


def _length(question: Question) -> tuple[int, int]:
    return question.max_new_tokens, len(question.prompt)


class LocalModel:
    """A model opened here. A question's meta may hold "system", which replaces the template's system text, and
    "picture_last", which puts its pictures behind the words where the template leaves them.
    """

    def __init__(self, model: Model, *, name: str = "") -> None:
        self.model = model
        self.model_id = name or "model"

    def describe(self) -> dict[str, Any]:
        """Name, template, how pictures are cut, weights' fingerprint, device and number type."""
        import torch
        import transformers

        from llava.checkpoint.fingerprint import fingerprint

        weight = next(self.model.model.parameters())
        processor, opened = self.model.processor, self.model.opened
        return {
            "model": self.model_id,
            "weights": None if opened is None else fingerprint(opened.tensors),
            "template": processor.template.name,
            "image_mode": processor.image_settings.mode,
            "device": str(weight.device),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def answer(self, questions: Sequence[Question], decoding: Mapping[str, Any], on_answer: OnAnswer) -> None:
        """Answer all, greedily unless `decoding` says otherwise."""
        prompts = self._encode(questions, on_answer)
        if int(decoding.get("num_beams", 1)) > 1:
            self._search(prompts, decoding, on_answer)
            return
        from llava.inference.requests import Request

        asked: list[Question] = []

        def requests() -> Iterator[Request]:
            for question, encoded in prompts:
                asked.append(question)
                yield Request(encoded, self._params(question, decoding))

        self.model.assistant.engine.generate(
            requests(),
            on_completion=lambda number, done: on_answer(asked[number], self._text(done.token_ids), None),
        )

    def _encode(self, questions: Sequence[Question], on_answer: OnAnswer) -> Iterator[tuple[Question, Encoded]]:
        """Prompts, made as they are asked for; a picture is opened once for all questions about it."""
        from llava.prompt.conversation import Image

        for group in longest_first(questions):
            images = [Image(path) for path in group[0].images]
            try:
                prepared = [self.model.processor.prepare_image(image) for image in images]
            except LlavaError as error:
                for question in group:
                    on_answer(question, "", error)
                continue
            for question in group:
                try:
                    encoded = self._encode_one(question, images, prepared)
                    self.model.assistant.engine.room_after(encoded)
                except LlavaError as error:
                    on_answer(question, "", error)
                    continue
                yield question, encoded

    def _encode_one(self, question: Question, images: Sequence[Any], prepared: Sequence[PreparedImage]) -> Encoded:
        from llava.prompt.conversation import Conversation, Message, Text

        text = Text(question.prompt)
        parts = (text, *images) if question.meta.get("picture_last") else (*images, text)
        said = question.meta.get("system")
        system = () if said is None else (Message("system", (Text(said),)),)
        conversation = Conversation((*system, Message("user", parts)), origin=f"question {question.id}")
        return self.model.processor.encode(conversation, open_turn=True, images=prepared)

    def _params(self, question: Question, decoding: Mapping[str, Any]) -> SamplingParams:
        return read_decoding(
            decoding, max_new_tokens=question.max_new_tokens, stop_token_ids=self.model.processor.stop_token_ids
        )

    def _search(
        self, prompts: Iterator[tuple[Question, Encoded]], decoding: Mapping[str, Any], on_answer: OnAnswer
    ) -> None:
        waiting: list[tuple[Question, Encoded]] = []
        for prompt in prompts:
            waiting.append(prompt)
            if len(waiting) == _PROMPTS_AT_ONCE:
                self._search_some(waiting, decoding, on_answer)
                waiting = []
        if waiting:
            self._search_some(waiting, decoding, on_answer)

    def _search_some(
        self, prompts: Sequence[tuple[Question, Encoded]], decoding: Mapping[str, Any], on_answer: OnAnswer
    ) -> None:
        from llava.inference.beams import search_beams

        found = search_beams(
            self.model.assistant.engine,
            [encoded for _, encoded in prompts],
            beams=int(decoding["num_beams"]),
            params=self._params(prompts[0][0], decoding),
            length_penalty=float(decoding.get("length_penalty", 1.0)),
        )
        for (question, _), completion in zip(prompts, found, strict=True):
            on_answer(question, self._text(completion.token_ids), None)

    def _text(self, token_ids: Sequence[int]) -> str:
        from llava.inference.detokenize import StreamDetokenizer

        processor = self.model.processor
        detokenizer = StreamDetokenizer(processor.decode, processor.stop_strings)
        for token_id in token_ids:
            detokenizer.push(token_id)
        detokenizer.finish()
        return detokenizer.text.strip()


def read_decoding(decoding: Mapping[str, Any], **more: Any) -> SamplingParams:
    """A task's decoding as the engine takes it; greedy where it says nothing. Raises UsageError for an unknown name."""
    from llava.inference.sampling import SamplingParams

    known = {field.name for field in fields(SamplingParams)}
    unknown = sorted(set(decoding) - known - set(BEAM_SETTINGS))
    if unknown:
        raise UsageError(f"decoding {unknown[0]!r}: no such setting; a task's decoding has the names of SamplingParams")
    return SamplingParams(**{name: value for name, value in decoding.items() if name in known} | more)
