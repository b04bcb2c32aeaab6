"""Many pictures answered into a file: what `llava caption` and `llava vqa` share."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from llava.cli.opening import Opening
from llava.errors import LlavaError, UsageError

if TYPE_CHECKING:
    from llava.inference.answers_file import AnswersFile
    from llava.inference.questions import Question
    from llava.inference.talk import Model

OutOption = Annotated[
    Path | None, typer.Option("--out", help="The JSONL file to write or to go on with; printed without it.")
]
ShowOption = Annotated[
    Path | None, typer.Option("--show-dir", help="Also write each picture with its answer and boxes drawn.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Start the file anew.")]
BeamsOption = Annotated[int, typer.Option("--beams", help="Above 1: search for the likeliest whole answer.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest word every time.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Repeat random answers.")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")]

# How often progress is said where stderr is a file.
_SAY_EVERY_SECONDS = 15.0


@dataclass(frozen=True)
class Wording:
    """How answers are made; part of what every line of the file says."""

    beams: int
    temperature: float
    seed: int | None
    max_new_tokens: int

    def settings(self) -> dict[str, Any]:
        return {
            "beams": self.beams,
            "temperature": self.temperature,
            "seed": self.seed,
            "max_new_tokens": self.max_new_tokens,
        }


def answer_questions(
    questions: Sequence[Question],
    opening: Opening,
    wording: Wording,
    *,
    command: str,
    out: Path | None,
    show_dir: Path | None,
    force: bool,
) -> None:
    """Answer all, into `out` (or onto stdout), and say at the end how many there are and how many failed."""
    from llava.inference.questions import Pairs
    from llava.inference.sampling import SamplingParams

    if out is not None and out.is_dir():
        raise UsageError(f"{out}: a folder; --out names the file to write")
    opening = opening.found()
    params = wording.settings()
    beams = params.pop("beams")
    SamplingParams(**params)  # a wrong value is said before the model is opened
    model = opening.open()
    with _sink(questions, model, opening, wording, out, force) as sink:
        first = sink.done
        if first:
            print(f"{command}: {first} of {len(questions)} are in {out} already; going on", file=sys.stderr)
        try:
            with _progress(len(questions), sink) as said:
                model.answer_all(
                    Pairs(questions)[first:],
                    beams=beams,
                    on_error="skip",
                    on_answer=lambda number, text, error: said(first + number, text, error),
                    **params,
                )
        except KeyboardInterrupt:
            if out is not None:
                print(f"{sink.done} of {len(questions)} are in {out}; the same command goes on", file=sys.stderr)
            raise
        if show_dir is not None:
            _show_all(sink.read(), questions, model, show_dir)
        where = "" if out is None else f" in {out}"
        failed = f', {sink.failed} failed (its "error" says why)' * bool(sink.failed)
        print(f"{command}: {sink.done - sink.failed} of {len(questions)} answered{where}{failed}", file=sys.stderr)


class _Sink(Protocol):
    @property
    def done(self) -> int: ...
    @property
    def failed(self) -> int: ...
    def write(self, number: int, text: str | None, error: Exception | None = None) -> None: ...
    def read(self) -> Iterator[dict[str, Any]]: ...


class _Printed:
    """Answers onto stdout in the questions' order; those that failed onto stderr."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = questions
        self._waiting: dict[int, dict[str, Any]] = {}
        self._records: list[dict[str, Any]] = []
        self.failed = 0

    @property
    def done(self) -> int:
        return len(self._records)

    def write(self, number: int, text: str | None, error: Exception | None = None) -> None:
        self._waiting[number] = {"text": text or ""} if error is None else {"text": "", "error": str(error)}
        while self.done in self._waiting:
            question, record = self._questions[self.done], self._waiting.pop(self.done)
            self._records.append(record)
            if "error" in record:
                self.failed += 1
                print(" ".join(record["error"].split()), file=sys.stderr)
            else:
                print(f"{question.image}: {record['text']}", flush=True)

    def read(self) -> Iterator[dict[str, Any]]:
        yield from self._records


@contextmanager
def _sink(
    questions: Sequence[Question], model: Model, opening: Opening, wording: Wording, out: Path | None, force: bool
) -> Iterator[_Sink]:
    if out is None:
        yield _Printed(questions)
        return
    from llava.inference.answers_file import AnswersFile

    file: AnswersFile
    with AnswersFile(out, questions, run=_describe_run(model, opening, wording), force=force) as file:
        yield file


def _describe_run(model: Model, opening: Opening, wording: Wording) -> dict[str, Any]:
    """What a file of answers says of the run in each line; another one does not go on with the file."""
    from llava.checkpoint.fingerprint import fingerprint

    metadata: dict[str, Any] = {"template": model.processor.template.name, **wording.settings()}
    if opening.load_in is not None:
        metadata["load_in"] = opening.load_in
    if model.opened is not None:
        metadata["weights"] = fingerprint(model.opened.tensors)[:23]
    return {"model_id": Path(str(opening.path)).name, "metadata": metadata}


def _show_all(records: Iterator[dict[str, Any]], questions: Sequence[Question], model: Model, folder: Path) -> None:
    from llava.inference.questions import open_picture
    from llava.inference.showing import show
    from llava.prompt.boxes import BoxFormat
    from llava.prompt.fetch import Fetcher
    from llava.prompt.images import decode_image

    folder.mkdir(parents=True, exist_ok=True)
    settings = model.processor.image_settings
    form = BoxFormat.of(model.model.config.extra)
    digits = len(str(len(questions)))
    fetcher = Fetcher()
    for number, (record, question) in enumerate(zip(records, questions, strict=True), start=1):
        try:
            source = open_picture(question.path, fetcher).source
            picture = decode_image(source, settings.limits, background=settings.background)
        except LlavaError:
            picture = None  # the record's error says so
        drawn = show(
            picture,
            question=question.text,
            answer=record["text"],
            error=record.get("error"),
            settings=settings,
            form=form,
        )
        stem = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in Path(question.image).stem)
        drawn.save(folder / f"{number:0{digits}d}-{stem[:60]}.png")


class _Said(Protocol):
    def __call__(self, number: int, text: str | None, error: Exception | None) -> None: ...


@contextmanager
def _progress(total: int, sink: _Sink) -> Iterator[_Said]:
    """Hands answers to the sink and says how far it is: a bar in a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        yield _Lines(total, sink)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("answering", total=total, completed=sink.done)

        def write(number: int, text: str | None, error: Exception | None) -> None:
            sink.write(number, text, error)
            bar.advance(task)
            if sink.failed:
                bar.update(task, description=f"answering, {sink.failed} failed")

        yield write


class _Lines:
    """Progress where nobody watches a bar."""

    def __init__(self, total: int, sink: _Sink) -> None:
        self._total, self._sink = total, sink
        self._left = total - sink.done
        self._heard = 0
        self._first = self._said = time.monotonic()

    def __call__(self, number: int, text: str | None, error: Exception | None) -> None:
        self._sink.write(number, text, error)
        self._heard += 1
        self._left -= 1
        now = time.monotonic()
        if self._heard == 1:
            self._first = now  # the first has waited for everything to get going
        elif now - self._said >= _SAY_EVERY_SECONDS:
            self._said = now
            left = _lasting((now - self._first) / (self._heard - 1) * self._left)
            answered = self._total - self._left
            print(f"{answered} of {self._total} answered, {self._sink.failed} failed, {left} left", file=sys.stderr)


def _lasting(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
