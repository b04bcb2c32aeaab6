"""Which pictures a record names, and where they are: under the source's image folder, in the record, or on the web.

A data set from somewhere else must not read files of this machine: absolute paths, `..`, links that lead out of the
image folder, and what is no regular file (a pipe would block for ever) are refused. Web addresses are refused unless a
Fetcher is given. Not covered: files that somebody exchanges between the check and the read.
"""

from __future__ import annotations

import hashlib
import os
import stat
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from llava.errors import DataError
from llava.prompt.conversation import ImageSource, read_data_url
from llava.prompt.fetch import Fetcher

_KEY_BYTES = 16
_BACKSLASH = "\\"
_REMEMBERED_FOLDERS = 1 << 16


class PictureFolder:
    """The pictures of one source: `root` is what its paths begin in, `fetcher` gets web addresses (None: refused)."""

    def __init__(self, root: Path, *, fetcher: Fetcher | None = None) -> None:
        self.root = root
        self._fetcher = fetcher
        self._real_root = os.path.realpath(root)
        self._real_folders: dict[str, str] = {}

    def open(self, name: str, origin: str) -> ImageSource:
        """The path of a picture, or the bytes of a web address. Raises DataError when it may not be read."""
        if is_web_address(name):
            if self._fetcher is None:
                raise DataError(
                    f"{origin}: picture {name!r} is a web address; download it and give its path, "
                    "or set data.allow_urls to true"
                )
            return self._fetcher.fetch(name, origin=origin)
        return resolve_image(name, self.root, origin=origin)

    def identify(self, name: str) -> tuple[bytes, bool]:
        """(what tells the picture from others, whether it is there as far as a look at the disk can say).

        Two names of one real file are the same picture, and so are equal bytes that are written into records.
        """
        if is_data_url(name):
            try:
                return key_of_bytes(read_data_url(name)), True
            except ValueError:
                return _key("broken", name), False
        if is_web_address(name):
            return _key("url", name), self._fetcher is not None
        found = self._find(name)
        return (_key("missing", f"{self._real_root}/{name}"), False) if found is None else (_key("file", found), True)

    def _find(self, name: str) -> str | None:
        """The real path of a regular file in the folder; None when there is none, or it lies outside."""
        if _leaves(name):
            return None
        folder, leaf = os.path.split(f"{self._real_root}/{PurePosixPath(name.replace(_BACKSLASH, '/'))}")
        try:
            real_folder = self._real_folders.get(folder)
            if real_folder is None:
                # Most data sets have few folders with many pictures: one lookup a folder, one lstat a picture.
                if len(self._real_folders) >= _REMEMBERED_FOLDERS:
                    self._real_folders.clear()
                real_folder = self._real_folders[folder] = os.path.realpath(folder)
            path = f"{real_folder}/{leaf}"
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                path = os.path.realpath(path)
                mode = Path(path).stat().st_mode
        except (OSError, ValueError):
            return None
        return path if stat.S_ISREG(mode) and _is_inside(path, self._real_root) else None


def resolve_image(name: str, image_root: Path, *, origin: str) -> Path:
    """The file that a record's picture path means.

    Raises DataError when it leaves `image_root` (by its words or by a link), or is there but is no regular file.
    A file that is not there passes: reading it says so.
    """
    if _leaves(name):
        raise DataError(
            f"{origin}: picture {name!r} leaves the image folder {image_root}; write it relative to that folder"
        )
    path = image_root / PurePosixPath(name.replace("\\", "/"))
    try:
        real = os.path.realpath(path)
        if not _is_inside(real, os.path.realpath(image_root)):
            raise DataError(
                f"{origin}: picture {name!r} is a link that leaves the image folder {image_root}; "
                "give its source the folder that holds it (data.sources: images), or copy it"
            )
        if not stat.S_ISREG(Path(real).stat().st_mode):
            raise DataError(f"{origin}: picture {name!r} in {image_root} is not a regular file; name a picture")
    except OSError:
        pass  # not there, or not to be looked at: the decoder names the reason when it reads
    except ValueError as error:
        raise DataError(f"{origin}: picture {name!r} is no path ({error})") from error
    return path


def is_web_address(name: str) -> bool:
    return name[:8].lower().startswith(("http://", "https://"))


def is_data_url(name: str) -> bool:
    return name[:5].lower() == "data:"


def named_pictures(record: object) -> list[str]:
    """The picture names of a record of any format, in order; what has the wrong shape is left for the parser to refuse.

    `image` or `images`: a string, a list of strings, or of {path} or {url}; else the image parts of `messages`.
    """
    if not isinstance(record, Mapping):
        return []
    value = record.get("image") or record.get("images")
    if value:
        entries = [value] if isinstance(value, (str, Mapping)) else value
        return [name for name in map(_name_of, entries) if name] if isinstance(entries, Sequence) else []
    return list(_part_pictures(record.get("messages")))


@dataclass(frozen=True)
class PictureIndex:
    """Which records show the same pictures, known without reading them. About 4 bytes a record and 20 a picture.

    sets: one entry a record, the number of its set of pictures, 0 for none; keys: 16 bytes a set from number 1 on;
    first: the first record of each set, from number 1 on; missing: one byte a set from number 1 on, 1 when a picture of
    it is not there.
    """

    sets: array[int]
    keys: bytes
    first: array[int]
    missing: bytes

    def is_missing(self, number: int) -> bool:
        """Whether a picture of a set is known not to be there."""
        return number > 0 and self.missing[number - 1] == 1

    def key(self, number: int) -> bytes:
        return self.keys[(number - 1) * _KEY_BYTES : number * _KEY_BYTES]


@dataclass
class PictureIndexBuilder:
    """Collects the PictureIndex of a file, record by record."""

    folder: PictureFolder
    _sets: array[int] = field(default_factory=lambda: array("I"))
    _first: array[int] = field(default_factory=lambda: array("I"))
    _numbers: dict[bytes, int] = field(default_factory=dict)
    _missing: bytearray = field(default_factory=bytearray)

    def add(self, names: Sequence[str], embedded: Mapping[str, bytes] | None = None) -> None:
        """The next record's pictures; `embedded` holds the keys of those whose bytes lie in the file itself."""
        if not names:
            self._sets.append(0)
            return
        keys, usable = [], True
        for name in names:
            if embedded is not None and name in embedded:
                keys.append(embedded[name])
                continue
            key, there = self.folder.identify(name)
            keys.append(key)
            usable = usable and there
        joined = keys[0] if len(keys) == 1 else hashlib.blake2b(b"".join(keys), digest_size=_KEY_BYTES).digest()
        number = self._numbers.setdefault(joined, len(self._numbers) + 1)
        if number > len(self._first):
            self._first.append(len(self._sets))
            self._missing.append(not usable)
        self._sets.append(number)

    def done(self) -> PictureIndex:
        return PictureIndex(self._sets, b"".join(self._numbers), self._first, bytes(self._missing))


def key_of_bytes(data: bytes) -> bytes:
    """What tells a picture that is written into a file from others: a digest of its bytes."""
    return hashlib.blake2b(data, digest_size=_KEY_BYTES).digest()


def _key(kind: str, text: str) -> bytes:
    return hashlib.blake2b(f"{kind}\0{text}".encode(errors="surrogatepass"), digest_size=_KEY_BYTES).digest()


def _leaves(name: str) -> bool:
    pure = PurePosixPath(name.replace("\\", "/"))
    return (
        pure.is_absolute() or ".." in pure.parts or (bool(pure.parts) and pure.parts[0].endswith(":")) or "\0" in name
    )


def _is_inside(real: str, real_root: str) -> bool:
    return real == real_root or real.startswith(real_root.rstrip(os.sep) + os.sep)


def _name_of(entry: object) -> str | None:
    if isinstance(entry, Mapping):
        entry = entry.get("path") or entry.get("url")
    return entry if isinstance(entry, str) else None


def _part_pictures(messages: object) -> Iterator[str]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, Sequence) or isinstance(content, str):
            continue
        for part in content:
            if isinstance(part, Mapping) and part.get("type") in ("image_url", "image"):
                value = part.get("image_url") if part["type"] == "image_url" else part.get("image", part.get("url"))
                name = value.get("url") if isinstance(value, Mapping) else value
                if isinstance(name, str):
                    yield name
