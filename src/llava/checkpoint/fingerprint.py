"""Whose weights are these: a fingerprint of a model's tensors, the same in every layout and number of files.

It covers each tensor's common name, its shape and some fifty of its values, evenly spaced, as float32. Any training
moves nearly every value, so another model, another stage or another rounding has another fingerprint; it is read in a
second at any size, where a digest of every byte of a 7B model takes most of a minute. Not covered: somebody who
changes a few values on purpose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import prod
from pathlib import Path

from llava.checkpoint.weights import Source

SAMPLED = 51
# The file name of sources that no file holds: what a new model starts from.
NEW = Path("new")


def fingerprint(tensors: Mapping[str, Source]) -> str:
    """`sha256:` and 64 digits, of tensors by their common names; those drawn for a new model do not count."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        source = tensors[name]
        if source.file == NEW:
            continue
        step = max(1, prod(source.shape) // SAMPLED)
        values = source.read().reshape(-1)[::step] if source.peek is None else source.peek(step)
        digest.update(f"{name}{list(source.shape)}".encode())
        digest.update(values.float().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def file_digest(path: Path) -> str:
    """`sha256:` and 64 digits, of every byte of a file."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
