"""File patterns: `shards/{000..127}.tar`, `{train,extra}/*.tar`; braces as shells and webdataset read them."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from llava.errors import DataError

_BRACES = re.compile(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_FILES = 1_000_000


def is_pattern(text: str) -> bool:
    """Whether a path has braces or wildcards in it."""
    return bool(_BRACES.search(text)) or glob.has_magic(text)


def expand_pattern(text: str) -> list[Path]:
    """The files that a path or pattern means, those of a wildcard in order of name.

    A file of exactly this name wins. Raises DataError when a wildcard finds nothing, or a file is named twice.

    >>> [str(path) for path in expand_pattern("{a,b}-{08..10}.tar")][:4]
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar']
    """
    if not is_pattern(text) or Path(text).exists():
        return [Path(text)]
    found: list[Path] = []
    for name in expand_braces(text):
        if not glob.has_magic(name):
            found.append(Path(name))
            continue
        matches = sorted(glob.glob(name))  # noqa: PTH207 - absolute patterns too
        if not matches:
            raise DataError(f"{text}: no file matches {name}")
        found += map(Path, matches)
    if len(set(found)) != len(found):
        twice = next(path for path in found if found.count(path) > 1)
        raise DataError(f"{text}: names {twice} twice; to read it twice set the source's weight to 2")
    return found


def expand_braces(text: str) -> list[str]:
    """Every text that a pattern's braces mean, in order, the last brace counting fastest."""
    texts = [text]
    while _BRACES.search(texts[0]):
        texts = [one for many in texts for one in _expand_first(many)]
        if len(texts) > _MOST_FILES:
            raise DataError(f"{text}: means more than {_MOST_FILES} files")
    return texts


def _expand_first(text: str) -> Iterator[str]:
    match = _BRACES.search(text)
    assert match is not None
    before, inner, after = text[: match.start()], match[1], text[match.end() :]
    numbers = _RANGE.fullmatch(inner)
    if numbers is None:
        yield from (before + choice + after for choice in inner.split(","))
        return
    first, last = int(numbers[1]), int(numbers[2])
    if abs(last - first) >= _MOST_FILES:
        raise DataError(f"{text}: means more than {_MOST_FILES} files")
    # As in bash, a leading zero on either side pads all.
    padded = any(len(number) > 1 and number.startswith("0") for number in numbers.groups())
    width = max(map(len, numbers.groups())) if padded else 0
    step = 1 if last >= first else -1
    for number in range(first, last + step, step):
        yield f"{before}{number:0{width}d}{after}"
