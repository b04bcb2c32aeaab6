"""What a run leaves to look at while it runs: the picture of its curves, the page of its sample answers, trackers."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.train.loop import StepRecord
from llava.train.metrics import describe_step, read_metrics
from llava.train.plot import draw_run
from llava.train.progress import RunInfo, Watcher, WatcherGroup
from llava.train.sections import Recipe
from llava.train.trackers import TrackerWatcher

_log = logging.getLogger(__name__)

_REDRAW_SECONDS = 30.0
_REDRAW_SHARE = 0.01  # of the time goes to drawing, at most


def observe(recipe: Recipe, watcher: Watcher) -> Watcher:
    """The caller's watcher, and with it those that write into the run's folder."""
    watchers = [watcher, PlotWatcher(title=recipe.description)]
    if recipe.run.track:
        config = recipe.model_dump(mode="json")
        watchers.append(TrackerWatcher(recipe.run.track, config=config, every=recipe.run.log_every))
    return WatcherGroup(*watchers)


class PlotWatcher(Watcher):
    """Draws `loss.svg` and `loss.png` now and then, and at the end."""

    def __init__(self, *, title: str = "") -> None:
        self._title = title
        self._lines: list[Mapping[str, Any]] = []
        self._folder: Path | None = None
        self._drawn = 0
        self._next = 0.0

    def started(self, info: RunInfo) -> None:
        self._folder = info.out_dir
        self._title = self._title or info.out_dir.name
        self._lines = [line for line in read_metrics(info.out_dir / "metrics.jsonl") if line["step"] <= info.first_step]
        self._next = time.monotonic() + _REDRAW_SECONDS

    def stepped(self, record: StepRecord) -> None:
        self._lines.append(describe_step(record))
        if time.monotonic() >= self._next:
            self.draw()

    def ended(self) -> None:
        self.draw()

    def draw(self) -> None:
        """Draw what there is. A disk that cannot be written to is a warning: the numbers are in metrics.jsonl."""
        if self._folder is None or len(self._lines) == self._drawn:
            return
        started = time.monotonic()
        figure = draw_run(self._lines, title=self._title)
        try:
            for name, data in (("loss.svg", figure.svg().encode()), ("loss.png", figure.png())):
                # Replaced whole, so that a browser never reads half of it; not flushed: it can be drawn again.
                partial = self._folder / f".{name}.partial"
                partial.write_bytes(data)
                partial.replace(self._folder / name)
        except OSError as error:
            _log.warning("%s: the curves could not be drawn: %s", self._folder, error.strerror)
        self._drawn = len(self._lines)
        now = time.monotonic()
        self._next = now + max(_REDRAW_SECONDS, (now - started) / _REDRAW_SHARE)
