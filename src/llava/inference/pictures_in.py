"""Whatever somebody hands over as pictures, as a list of pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from llava.errors import UsageError
from llava.prompt.conversation import Image

Picture: TypeAlias = str | Path | bytes | PIL.Image.Image | NDArray[np.generic] | Image
Pictures: TypeAlias = Picture | Iterable["Pictures"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def gather_pictures(given: Pictures, *, allow_urls: bool = False) -> list[Image]:
    """Pictures from paths, folders (their picture files by name), web addresses, bytes, arrays, PIL pictures, lists.

    An array of shape (N, H, W, C) is N pictures. Files are not opened here. Raises UsageError for what is no picture,
    a folder without any, and a web address unless allow_urls; DataError for an address that cannot be fetched.
    """
    if isinstance(given, Image):
        return [given]
    if isinstance(given, str) and given.lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise UsageError(f"{given}: a web address; allow it with allow_urls=True, or download it and give its path")
        from llava.prompt.fetch import Fetcher

        return [Image(Fetcher().fetch(given))]
    if isinstance(given, (str, Path)):
        path = Path(given).expanduser()
        return [Image(file) for file in list_pictures(path)] if path.is_dir() else [Image(path)]
    if isinstance(given, np.ndarray):
        if given.ndim == 4:
            return [Image(picture) for picture in given]
        return [Image(given)]
    if isinstance(given, (bytes, PIL.Image.Image)):
        return [Image(given)]
    if isinstance(given, Iterable):
        return [image for one in given for image in gather_pictures(one, allow_urls=allow_urls)]
    raise UsageError(f"{type(given).__name__}: no picture; give a path, folder, bytes, array, PIL picture or a list")


def list_pictures(folder: Path) -> list[Path]:
    """The picture files of a folder, by name. Raises UsageError when there is none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise UsageError(f"{folder}: no pictures in it; looked for {', '.join(SUFFIXES)}")
    return found
