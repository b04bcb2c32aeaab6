"""What a benchmark is to the rest of the room: questions read from its own files, answers scored by its own rule.

A task is one file of 60 to 150 lines. Those that ship are rows of `llava.eval.tasks.TASKS`; one from outside is
given as "package.module:NAME" wherever a name is. NAME is an object with the methods of `Task`, or a class made
without arguments. Neither tasks nor scorers import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    id: unlike every other of its task (where the benchmark's own are not, the task makes them so). prompt: the exact
    text of the user's turn, without the mark of the picture. images: the pictures in order, before the text. meta: what
    the scorer needs (reference answers, category, split). max_new_tokens: the published setting.
    """

    id: str
    prompt: str
    images: tuple[Path, ...]
    meta: Mapping[str, Any]
    max_new_tokens: int


@dataclass(frozen=True)
class AnswerRow:
    """One answer. meta: the other columns of its line (`prompt`, `answer_id`, `model_id`, `metadata`)."""

    question_id: str
    text: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What a scorer found.

    headline: figure by name, in the official unit, unrounded where the official tool rounds only to print. tables:
    rows by table's name (per category and the like). notes: sentences for the reader, among them how many answers an
    official bug touched. printed: what the official tool prints. correct: 0 to 1 by question id where the rule judges
    answers one by one; the report shows those below 1 as wrong and draws its confidence intervals from them.
    """

    headline: Mapping[str, float]
    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    notes: Sequence[str]
    printed: str
    correct: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskFile:
    """A file or folder that a task reads. path: within the task's root; rows, sha256: None where not known."""

    path: str
    what: str
    source: str
    rows: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class TaskFacts:
    """What `llava eval --describe` says.

    prompt: the text that is asked, with {question} and the like where a row's words go. decoding: the published
    settings, in the names of SamplingParams. published: model -> figure, for the figure of `Score.headline` that
    `published_metric` names. traps: what a reasonable reimplementation gets wrong, a sentence each.
    """

    title: str
    files: Sequence[TaskFile]
    prompt: str
    decoding: Mapping[str, Any]
    published_metric: str
    published: Mapping[str, float]
    splits: Sequence[str] = ()
    needs: Sequence[str] = ()
    """What scoring needs besides the files: "judge", "java", an extra."""
    traps: Sequence[str] = ()


@runtime_checkable
class Task(Protocol):
    """A benchmark."""

    @property
    def name(self) -> str:
        """What it is called in --tasks and as a folder."""

    def describe(self) -> TaskFacts:
        """Its files, prompt, decoding and published figures."""

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        """Its questions, in the files' order; split: None for the usual one.

        root: the folder that holds `describe().files`. Raises DataError, naming the file and the way out, for a
        missing, truncated or wrong one.
        """

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        """The official rule, bugs and all; with `strict` the repaired one.

        Raises DataError for missing, duplicate or unknown answers where the official rule would go wrong in silence.
        """

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        """Write the file that the benchmark's server takes; returns where it is, None when there is no server.

        path: where; it ends in .json, for which a task whose server takes another format puts its own suffix.
        """
