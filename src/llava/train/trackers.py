"""Trackers by name: TensorBoard, Weights & Biases, trackio. `metrics.jsonl` is written whatever is chosen here.

    run: {track: [tensorboard, wandb]}

Each is imported when a recipe names it, and gets the numbers of metrics.jsonl, one set a logged step, and the sample
answers as text. A resumed run goes on in the same place: TensorBoard drops what was logged behind the checkpoint;
Weights & Biases and trackio find the run by an id that is kept in the run's folder (`trackers.json`). Weights & Biases
works without a network when WANDB_MODE=offline is set. Not covered: their own media, sweeps and artefacts.
"""

from __future__ import annotations

import importlib
import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any, Protocol

from llava.errors import MissingExtraError
from llava.train.journal import write_durably
from llava.train.loop import StepRecord
from llava.train.metrics import describe_step
from llava.train.progress import RunInfo, Sample, Watcher

_log = logging.getLogger(__name__)

PROJECT = "llava"
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Protocol):
    """Takes a run's numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step."""

    def tell(self, step: int, name: str, text: str) -> None:
        """A text of a step."""

    def close(self) -> None:
        """Nothing more comes."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise MissingExtraError for a tracker whose package is not installed: now, not after the model is loaded."""
    import sys

    for name in names:
        package = _PACKAGES[name]
        if package not in sys.modules and util.find_spec(package) is None:
            raise MissingExtraError(f"run.track: {name}", "track")


class TrackerWatcher(Watcher):
    """Hands what happens in a run to trackers. config: the resolved recipe, as plain values."""

    def __init__(self, names: Sequence[str], *, config: Mapping[str, Any], every: int = 1) -> None:
        require_trackers(names)
        self._names = list(names)
        self._config = config
        self._every = every
        self._info: RunInfo | None = None
        self._trackers: list[Tracker] = []
        self._warned = False

    def started(self, info: RunInfo) -> None:
        self._info = info
        self._trackers = [TRACKERS[name](info, self._config) for name in self._names]

    def stepped(self, record: StepRecord) -> None:
        assert self._info is not None
        if record.step % self._every and record.step != self._info.total_steps:
            return
        line = describe_step(record, self._info.meter)
        values = {key: float(value) for key, value in line.items() if key != "step" and value is not None}
        self._each(lambda tracker: tracker.log(record.step, values))

    def sampled(self, sample: Sample) -> None:
        name = f"{sample.image.name}: {sample.question}"
        self._each(lambda tracker: tracker.tell(sample.step, name, sample.answer))

    def ended(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._trackers = []

    def _each(self, act: Callable[[Tracker], None]) -> None:
        """A disk that a tracker cannot write to must not end the run."""
        for tracker in self._trackers:
            try:
                act(tracker)
            except OSError as error:
                if not self._warned:
                    _log.warning("%s: %s; the run goes on without its numbers", type(tracker).__name__, error)
                self._warned = True


class TensorBoard:
    """Event files in the run's folder, under `tensorboard/`: `tensorboard --logdir RUN`."""

    def __init__(self, info: RunInfo, config: Mapping[str, Any]) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        resumed = {"purge_step": info.first_step + 1} if info.first_step else {}
        self._writer = writer(log_dir=str(info.out_dir / "tensorboard"), **resumed)
        if not info.first_step:
            self._writer.add_text("recipe", "    " + json.dumps(config, indent=1).replace("\n", "\n    "), 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"train/{key}", value, step)

    def tell(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases in the project `llava` (WANDB_PROJECT names another)."""

    def __init__(self, info: RunInfo, config: Mapping[str, Any]) -> None:
        import os

        self._run = importlib.import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=info.out_dir.name,
            dir=str(info.out_dir),
            config=dict(config),
            id=run_id(info),
            resume="allow",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"train/{key}": value for key, value in values.items()}, step=step)

    def tell(self, step: int, name: str, text: str) -> None:
        self._run.log({f"samples/{name}": text}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio in the project `llava`: `trackio show`."""

    def __init__(self, info: RunInfo, config: Mapping[str, Any]) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        name = f"{info.out_dir.name}-{run_id(info)[:6]}"
        self._trackio.init(project=PROJECT, name=name, config=dict(config), resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log({f"train/{key}": value for key, value in values.items()}, step=step)

    def tell(self, step: int, name: str, text: str) -> None:
        self._trackio.log({f"samples/{name}": text}, step=step)

    def close(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, Callable[[RunInfo, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def run_id(info: RunInfo) -> str:
    """The id under which trackers know this run: new for a new run, the same when one goes on."""
    path: Path = info.out_dir / "trackers.json"
    if info.first_step and path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    made = uuid.uuid4().hex[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps({"id": made}) + "\n")
    return made
