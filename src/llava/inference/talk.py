"""A model that one can talk to from Python: what `llava.load` gives.

    m = llava.load("llava-hf/llava-1.5-7b-hf")
    m.chat("cat.jpg", "What is the cat doing?")                    # one answer
    for piece in m.stream("cat.jpg", "Tell a story."): print(piece, end="")
    talk = m.start_chat(); talk.ask("Who is this?", "me.png"); talk.ask("And what colour is the coat?")
    m.caption("holiday/")                                          # a folder, a list, a single picture: one text each
    m.vqa("cat.jpg", ["How many cats?", "Which colour?"])          # the picture is read once

Pictures are paths, folders, web addresses (with allow_urls=True), bytes, arrays, PIL pictures, or lists of these. How
words are chosen is said by keyword, as in SamplingParams: temperature=0.7, max_new_tokens=64, seed=1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from llava.checkpoint import load as checkpoints
from llava.checkpoint.load import Loaded
from llava.errors import LlavaError, UsageError, name_nearest
from llava.inference.answer import AnswerStream, Assistant
from llava.inference.beams import search_beams
from llava.inference.detokenize import StreamDetokenizer
from llava.inference.pictures_in import Pictures, gather_pictures
from llava.inference.requests import Completion, Request
from llava.inference.sampling import SamplingParams
from llava.prompt.conversation import Conversation, Image, Message, Text
from llava.prompt.processor import Encoded

DESCRIBE = "Describe the picture."
# Prompts whose beams are searched together: enough to fill a processor, few enough for their keys and values.
_PROMPTS_AT_ONCE = 8

OnError = Literal["raise", "skip"]


class Model(Loaded):
    """A model with its processor and an engine. Safe to use from several threads."""

    @cached_property
    def assistant(self) -> Assistant:
        """Processor and engine. The engine copies weights of small models: made at first use, after loading."""
        self.model.eval()
        return Assistant(self.model, self.processor)

    def chat(
        self,
        pictures: Pictures | None,
        question: str,
        *,
        system: str | None = None,
        allow_urls: bool = False,
        **sampling: Any,
    ) -> str:
        """The answer to one question about one or several pictures, or about none.

        Raises ImageError, ContextLengthError or EngineError before any work where the question cannot be answered.
        """
        return self.start_chat(system=system, allow_urls=allow_urls, **sampling).ask(question, pictures)

    def stream(
        self,
        pictures: Pictures | None,
        question: str,
        *,
        system: str | None = None,
        allow_urls: bool = False,
        **sampling: Any,
    ) -> Iterator[str]:
        """As `chat`, piece by piece; breaking off the loop ends the answer."""
        return self.start_chat(system=system, allow_urls=allow_urls, **sampling).stream(question, pictures)

    def start_chat(self, *, system: str | None = None, allow_urls: bool = False, **sampling: Any) -> Chat:
        """A conversation of several turns. system: replaces the template's system text."""
        return Chat(self.assistant, read_sampling(sampling), system=system, allow_urls=allow_urls)

    def caption(
        self,
        pictures: Pictures,
        *,
        prompt: str = DESCRIBE,
        beams: int = 1,
        length_penalty: float = 1.0,
        on_error: OnError = "raise",
        progress: bool = False,
        allow_urls: bool = False,
        **sampling: Any,
    ) -> list[str]:
        """One text a picture, in order. beams: above 1 searches for the likeliest whole text.

        on_error: "skip" leaves an empty text for a picture that cannot be read instead of raising ImageError.
        """
        found = gather_pictures(pictures, allow_urls=allow_urls)
        return self.answer_all(
            [(image, prompt) for image in found],
            beams=beams,
            length_penalty=length_penalty,
            on_error=on_error,
            progress=progress,
            **sampling,
        )

    def vqa(
        self,
        pictures: Pictures,
        questions: str | Sequence[str],
        *,
        on_error: OnError = "raise",
        progress: bool = False,
        allow_urls: bool = False,
        **sampling: Any,
    ) -> list[str]:
        """Answers to questions about pictures, in order: pairs, one question about all, or all about one picture.

        Questions on one picture are read together. on_error: as in `caption`.
        """
        found = gather_pictures(pictures, allow_urls=allow_urls)
        asked = [questions] if isinstance(questions, str) else list(questions)
        if len(found) != len(asked) and 1 not in (len(found), len(asked)):
            raise UsageError(
                f"{len(found)} pictures and {len(asked)} questions; give as many of both, or one of either"
            )
        count = max(len(found), len(asked)) if found and asked else 0
        pairs = [(found[i % len(found)], asked[i % len(asked)]) for i in range(count)]
        return self.answer_all(pairs, on_error=on_error, progress=progress, **sampling)

    def answer_all(
        self,
        pairs: Sequence[tuple[Image, str]],
        *,
        beams: int = 1,
        length_penalty: float = 1.0,
        on_error: OnError = "raise",
        progress: bool = False,
        on_answer: Callable[[int, str | None, LlavaError | None], None] | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Answers to (picture, question) pairs, in order.

        pairs may be made as they are asked for: what reading one raises counts as its failure. on_answer: hears of each
        as soon as it is there: its number, the text (None where it failed) and the error.
        """
        if on_error not in ("raise", "skip"):
            raise UsageError(f"on_error = {on_error!r}: it is 'raise' or 'skip'")
        if not 1 <= beams <= 64:
            raise UsageError(f"beams = {beams!r}: a whole number from 1 to 64")
        params = self._with_stops(read_sampling(sampling))
        answers = [""] * len(pairs)
        with _progress(len(pairs), progress) as advance:

            def done(number: int, text: str | None, error: LlavaError | None = None) -> None:
                answers[number] = text or ""
                advance()
                if on_answer is not None:
                    on_answer(number, text, error)

            def encode(numbers: Iterator[int]) -> Iterator[tuple[int, Encoded]]:
                for number in numbers:
                    try:
                        yield number, self._encode(*pairs[number])
                    except LlavaError as error:
                        if on_error == "raise":
                            raise type(error)(f"picture {number + 1} of {len(pairs)}: {error}") from error
                        done(number, None, error)

            encoded = encode(iter(range(len(pairs))))
            if beams > 1:
                self._search(encoded, params, beams=beams, length_penalty=length_penalty, done=done)
            else:
                self._generate(encoded, params, done)
        return answers

    def _generate(
        self, encoded: Iterator[tuple[int, Encoded]], params: SamplingParams, done: Callable[[int, str], None]
    ) -> None:
        numbers: list[int] = []

        def requests() -> Iterator[Request]:
            for number, prompt in encoded:
                numbers.append(number)
                yield Request(prompt, params)

        self.assistant.engine.generate(
            requests(), on_completion=lambda place, completion: done(numbers[place], self._text(completion))
        )

    def _search(
        self,
        encoded: Iterator[tuple[int, Encoded]],
        params: SamplingParams,
        *,
        beams: int,
        length_penalty: float,
        done: Callable[[int, str], None],
    ) -> None:
        waiting: list[tuple[int, Encoded]] = []
        for item in encoded:
            waiting.append(item)
            if len(waiting) == _PROMPTS_AT_ONCE:
                self._search_some(waiting, params, beams, length_penalty, done)
                waiting = []
        self._search_some(waiting, params, beams, length_penalty, done)

    def _search_some(
        self,
        waiting: Sequence[tuple[int, Encoded]],
        params: SamplingParams,
        beams: int,
        length_penalty: float,
        done: Callable[[int, str], None],
    ) -> None:
        prompts = [prompt for _, prompt in waiting]
        found = search_beams(self.assistant.engine, prompts, beams=beams, params=params, length_penalty=length_penalty)
        for (number, _), completion in zip(waiting, found, strict=True):
            done(number, self._text(completion))

    def _encode(self, image: Image, question: str) -> Encoded:
        conversation = Conversation((Message("user", (image, Text(question))),))
        encoded = self.processor.encode(conversation, open_turn=True)
        self.assistant.engine.room_after(encoded)
        return encoded

    def _with_stops(self, params: SamplingParams) -> SamplingParams:
        stops = dict.fromkeys((*params.stop_token_ids, *self.processor.stop_token_ids))
        return replace(params, stop_token_ids=tuple(stops))

    def _text(self, completion: Completion) -> str:
        detokenizer = StreamDetokenizer(self.processor.decode, self.processor.stop_strings)
        for token_id in completion.token_ids:
            detokenizer.push(token_id)
        detokenizer.finish()
        return detokenizer.text.strip()


class Chat:
    """A conversation under way. What was said is in `messages`; earlier turns are not read again.

    Everything in it may be changed between two questions, the assistant too: another model then goes on.
    """

    def __init__(
        self, assistant: Assistant, params: SamplingParams, *, system: str | None = None, allow_urls: bool = False
    ) -> None:
        self.assistant = assistant
        self.params = params
        self.system = system
        self.allow_urls = allow_urls
        self.messages: list[Message] = []
        self._under_way: AnswerStream | None = None

    def ask(self, question: str, pictures: Pictures | None = None) -> str:
        """Ask and get the whole answer. An error leaves the conversation as it was."""
        return "".join(self.stream(question, pictures)).strip()

    def stream(self, question: str, pictures: Pictures | None = None) -> Iterator[str]:
        """Ask and get the answer piece by piece. Breaking off ends the answer; what was said of it stays."""
        shown = [] if pictures is None else gather_pictures(pictures, allow_urls=self.allow_urls)
        return self.respond(Message("user", (*shown, Text(question))))

    def respond(self, asked: Message) -> Iterator[str]:
        """As `stream`, for a user's message that is there already."""
        system = () if self.system is None else (Message("system", (Text(self.system),)),)
        stream = self.assistant.stream(Conversation((*system, *self.messages, asked)), self.params)
        return self._read(asked, stream)

    def stop(self) -> None:
        """End the answer under way, from a signal handler or another thread; what was said of it stays."""
        if self._under_way is not None:
            self._under_way.cancel()

    def _read(self, asked: Message, stream: AnswerStream) -> Iterator[str]:
        said: list[str] = []
        self._under_way = stream
        try:
            for piece in stream:
                piece = piece if said else piece.lstrip()
                if piece:
                    said.append(piece)
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            stream.cancel()
            self.messages += [asked, Message("assistant", (Text("".join(said).strip()),))]
            raise
        finally:
            self._under_way = None
        self.messages += [asked, Message("assistant", (Text("".join(said).strip()),))]


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    load_in: Literal["4bit", "8bit"] | None = None,
    vision_tower: str | Path | None = None,
    merge_lora: bool = True,
    template: str | None = None,
) -> Model:
    """Open a model from a folder or hub id, to talk to, to train or to look at: `m = llava.load(path)`.

    base: the language model (or whole LLaVA) that a projector, LoRA or delta folder stands on. device, dtype: names
    ("cuda:0", "bfloat16"); chosen for this machine when None; "spread" or "cuda:0,cuda:1" shares the language model's
    blocks between devices. load_in: quantise the language model's linear layers
    (needs `llava[quant]`). vision_tower: the tower's folder, where the one that config.json names is elsewhere.
    merge_lora: False leaves a LoRA beside the weights. template: the chat template, where config.json names none.
    Raises UnknownFormatError when no layout fits, CheckpointError when tensors are missing, unexpected or of a wrong
    shape.
    """
    loaded = checkpoints.load(
        path,
        base=base,
        device=device,
        dtype=dtype,
        load_in=load_in,
        vision_tower=vision_tower,
        merge_lora=merge_lora,
        template=template,
    )
    return Model(loaded.model, loaded.processor, loaded.report, loaded.opened)


def read_sampling(values: dict[str, Any]) -> SamplingParams:
    """SamplingParams from keywords. Raises UsageError for an unknown name, EngineError for a value out of range."""
    known = [field.name for field in fields(SamplingParams)]
    for name in values:
        if name not in known:
            raise UsageError(f"{name}: no such setting; {name_nearest(name, known)}")
    return SamplingParams(**values)


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, or nothing; gives what moves it on by one."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
