"""Which quickstart model `llava chat` opens when it is told none: the one here, else the last one made anywhere."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_OUT = Path("llava-quickstart")


def remember(model: Path) -> None:
    """Note a quickstart's model in the user's cache, so that `llava chat` finds it from any folder.

    A cache that cannot be written is no reason to fail: the model is then found from its own folder only.
    """
    marker = _marker()
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(str(model.resolve()) + "\n", encoding="utf-8")
    except OSError:
        return


def find_latest() -> Path | None:
    """The model folder of the quickstart in the current folder, else of the newest one, else None."""
    here = DEFAULT_OUT / "model"
    if (here / "config.json").is_file():
        return here
    try:
        noted = Path(_marker().read_text(encoding="utf-8").strip())
    except OSError:
        return None
    return noted if (noted / "config.json").is_file() else None


def _marker() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "llava" / "latest-quickstart"
