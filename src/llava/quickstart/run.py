"""The quickstart: draw, align, instruct, measure, report; each phase is finished once and never again.

    OUT/data/          pictures and conversations, an ordinary LLaVA data set
    OUT/align/         stage 1's run folder (recipe quickstart-align)
    OUT/model/         stage 2's run folder (recipe quickstart-instruct): the model that `llava chat` opens
    OUT/report.html    what was learnt, beside controls; OUT/report.json the same figures
    OUT/progress.json  which phases are done, with their seconds

The two stages run through `llava.train.run.run_recipe`, exactly as `llava train` runs them. An interrupted run goes on
where it stopped: finished phases are kept, a half-done stage resumes from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import UsageError
from llava.quickstart.report import ReportContents, report_as_json, write_page

if TYPE_CHECKING:
    from llava.quickstart.bases import Bases
    from llava.train.progress import Watcher

MODEL_FOLDER = "model"


@dataclass(frozen=True)
class QuickstartSettings:
    """What a quickstart does. Two runs with equal settings on one kind of machine give equal numbers.

    stage overrides are `section.key=value` strings on top of the shipped recipes (tests use them to shrink the run).
    """

    seed: int = 0
    num_scenes: int = 10_000
    held_out_scenes: int = 200
    align_overrides: tuple[str, ...] = ()
    instruct_overrides: tuple[str, ...] = ()

    def fingerprint(self, bases: Bases) -> str:
        """Short hash of all that decides the numbers, to tell whether a folder holds the same run."""
        decides = {**asdict(self), "bases": bases.facts["recipe_hash"]}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class QuickstartResult:
    """Where things are, and the accuracy by kind as in report.json."""

    model: Path
    report: Path
    figures: dict[str, object]


class Audience:
    """Who watches a quickstart: this one sees nothing; the command line shows lines and bars."""

    def say(self, line: str) -> None:
        """A phase begins, or was done before."""

    def bar(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar: the context gives a function that is told how many of `total` are done."""
        return nullcontext(lambda done: None)

    def watcher(self, label: str) -> Watcher | None:
        """Who watches a training stage."""
        return None


def run_quickstart(out: Path, settings: QuickstartSettings, *, audience: Audience | None = None) -> QuickstartResult:
    """Run what is not done yet of the quickstart in `out`.

    Raises UsageError when `out` holds a quickstart with other settings or something else.
    """
    from llava.quickstart.bases import shipped_bases

    watching = audience or Audience()
    bases = shipped_bases()
    progress = _Progress.open(out, settings.fingerprint(bases))
    data, align, model = out / "data", out / "align", out / MODEL_FOLDER

    with progress.phase("draw", watching, f"{settings.num_scenes:,} scenes with questions and answers") as todo:
        if todo:
            _draw(data, settings, watching)
    with progress.phase("align", watching, "stage 1, the projector learns from captions") as todo:
        if todo:
            _train_stage(
                "quickstart-align", [*_align_overrides(data, bases, settings), f"run.out={_quoted(align)}"], watching
            )
    with progress.phase("instruct", watching, "stage 2, projector and language model learn to answer") as todo:
        if todo:
            overrides = [*_instruct_overrides(data, align, settings), f"run.out={_quoted(model)}"]
            _train_stage("quickstart-instruct", overrides, watching)
    with progress.phase("measure", watching, f"questions about {settings.held_out_scenes} held-out pictures") as todo:
        if todo:
            _measure_and_report(out, bases, settings, progress, watching)
    return QuickstartResult(model, out / "report.html", json.loads((out / "report.json").read_text(encoding="utf-8")))


def _align_overrides(data: Path, bases: Bases, settings: QuickstartSettings) -> list[str]:
    return [
        f"model.language_model={_quoted(bases.language_model)}",
        f"model.vision_tower={_quoted(bases.vision_tower)}",
        f"model.vision_feature_layer={bases.facts['vision_feature_layer']}",
        f"data.files=[{_quoted(data / 'captions.json')}]",
        f"data.images={_quoted(data / 'images')}",
        f"run.seed={settings.seed}",
        *settings.align_overrides,
    ]


def _instruct_overrides(data: Path, align: Path, settings: QuickstartSettings) -> list[str]:
    return [
        f"model.path={_quoted(align)}",
        f"data.files=[{_quoted(data / 'conversations.json')}]",
        f"data.images={_quoted(data / 'images')}",
        f"run.seed={settings.seed}",
        *settings.instruct_overrides,
    ]


def _quoted(path: Path) -> str:
    """A path as YAML that stays a string, whatever characters it holds."""
    return json.dumps(str(path))


def _draw(data: Path, settings: QuickstartSettings, audience: Audience) -> None:
    """Write the data set beside its place and move it there whole."""
    from llava.data.scene_files import write_scenes

    half_done = data.with_name(data.name + ".partial")
    shutil.rmtree(half_done, ignore_errors=True)
    with audience.bar("scenes", settings.num_scenes) as show:
        write_scenes(half_done, settings.num_scenes, settings.seed, progress=lambda done, total: show(done))
    half_done.replace(data)


def _train_stage(recipe: str, overrides: list[str], audience: Audience) -> None:
    from llava.train.recipe import load_recipe
    from llava.train.run import run_recipe

    run_recipe(load_recipe(recipe, overrides), watcher=audience.watcher(recipe))


def _measure_and_report(
    out: Path, bases: Bases, settings: QuickstartSettings, progress: _Progress, audience: Audience
) -> None:
    import platform

    import torch

    from llava import __version__
    from llava.data.scene_turns import KINDS
    from llava.quickstart.answering import open_answerer
    from llava.quickstart.measure import measure

    start = time.perf_counter()
    model = out / MODEL_FOLDER
    with audience.bar("questions", 2 * len(KINDS) * settings.held_out_scenes) as show:
        answered = 0

        def count(more: int) -> None:
            nonlocal answered
            answered += more
            show(answered)

        answer = open_answerer(model, on_done=count)
        measurement = measure(answer, seed=settings.seed, num_scenes=settings.held_out_scenes)
    contents = ReportContents(
        accuracy=measurement.accuracy(),
        measurement=measurement,
        loss_plots=[
            ("Stage 1: the projector learns to show the picture to the language model", _plot(out / "align")),
            ("Stage 2: projector and language model learn to answer", _plot(model)),
        ],
        seconds={**progress.seconds, "measure": time.perf_counter() - start},
        facts={
            "seed": str(settings.seed),
            "scenes": f"{settings.num_scenes:,} drawn for training, {settings.held_out_scenes} held out",
            "bases": f"recipe {bases.facts['recipe_hash'][:12]}, "
            + ", ".join(f"{part} {count:,} parameters" for part, count in bases.facts["parameters"].items()),
            "machine": f"{platform.machine()}, {os.cpu_count()} processors, torch {torch.__version__}, "
            f"llava {__version__}",
        },
        next_commands=next_commands(model),
    )
    write_page(out / "report.html", contents)
    _write_json(out / "report.json", report_as_json(contents))


def next_commands(model: Path) -> list[tuple[str, str]]:
    """What a newcomer does after the quickstart: (what, command)."""
    return [
        ("Talk with it about a picture", "llava chat"),
        ("Ask once", 'llava chat -p "What is in the picture?" --image picture.png'),
        ("Check your own pictures and conversations", "llava data check mine.json --images pictures/"),
        (
            "Tune it on them",
            f"llava train quickstart-instruct model.path={model} data.files=[mine.json] data.images=pictures "
            "run.out=runs/mine",
        ),
    ]


def _plot(run: Path) -> str:
    svg = (run / "loss.svg").read_text(encoding="utf-8")
    return svg[svg.index("<svg") :]


def _write_json(path: Path, values: object) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


class _Progress:
    """Which phases are done, kept in progress.json."""

    def __init__(self, path: Path, fingerprint: str, seconds: dict[str, float], spent: dict[str, float]) -> None:
        self.path, self.fingerprint, self.seconds, self.spent = path, fingerprint, seconds, spent

    @classmethod
    def open(cls, out: Path, fingerprint: str) -> _Progress:
        path = out / "progress.json"
        if not path.exists():
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise UsageError(f"{out}: holds something that is not a quickstart; choose another folder with --out")
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"{out}: cannot be made ({error.strerror}); choose another folder with --out"
                ) from None
            fresh = cls(path, fingerprint, {}, {})
            fresh._write()  # before any work: a run killed in its first phase is recognised and goes on
            return fresh
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["settings"] != fingerprint:
                raise UsageError(
                    f"{out}: holds a quickstart with another seed, other settings or other bases; "
                    "choose another folder with --out, or delete it"
                )
            return cls(path, fingerprint, dict(kept["seconds"]), dict(kept["spent"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: is damaged ({error}); delete {out} and start again") from error

    @contextmanager
    def phase(self, name: str, audience: Audience, what: str) -> Iterator[bool]:
        """Yields whether the phase is still to do; notes its time when it ends, whole or interrupted."""
        if name in self.seconds:
            audience.say(f"{name}: done before ({self.seconds[name]:.0f} s)")
            yield False
            return
        audience.say(f"{name}: {what}")
        start = time.perf_counter()
        finished = False
        try:
            yield True
            finished = True
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start
            if finished:
                self.seconds[name] = self.spent[name]
            self._write()

    def _write(self) -> None:
        _write_json(self.path, {"settings": self.fingerprint, "seconds": self.seconds, "spent": self.spent})
