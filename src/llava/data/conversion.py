"""From any data set to any format: `convert(source, target)`.

    convert(Path("mix.json"), Path("mix.jsonl"), to="openai")
    convert(Path("scienceqa/"), Path("llava_train.json"), to="llava", source="scienceqa",
            options={"split": "train", "prompt": "QCM-LEA"})

Records are read one by one, parsed by the same parsers as in training, and written by `record_writing`; a record that
does not parse, or that the target cannot hold, stops the conversion with its place, and nothing is left behind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.data.pictures import PictureFolder, is_web_address
from llava.data.record_files import JsonWriter, ParquetWriter, ShardWriter, Writer
from llava.data.record_writing import CONVERSATION_KEYS, RECORD_WRITERS, Item, picture_kind
from llava.data.records import PARSERS, ConversationFile
from llava.data.source_readers import SOURCE_READERS, detect_reader, packed_files, read_source
from llava.data.sources import FORMATS, read_conversations
from llava.errors import DataError, ImageError, UsageError, name_nearest
from llava.prompt.conversation import Conversation, Image, ImageSource, Message, Part

#: What can be written.
TARGETS = (*RECORD_WRITERS, "parquet", "webdataset")


@dataclass(frozen=True)
class Converted:
    """What a conversion did; skipped: why each record that was left out was (only when that was asked for)."""

    records: int
    pictures_extracted: int
    skipped: tuple[str, ...] = ()


def convert(
    source: Path,
    target: Path,
    *,
    to: str = "llava",
    read_as: str = "auto",
    images: Path | None = None,
    extract: Path | None = None,
    prefix: str = "",
    options: Mapping[str, str] | None = None,
    force: bool = False,
    skip_bad: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Converted:
    """Read `source` as one format and write `target` as another.

    read_as: one of FORMATS or SOURCE_READERS, or "auto". images: the folder that picture paths begin in, for targets
    that hold the pictures themselves. extract: a folder for pictures that lie in the source's records; without it they
    become data: URLs. prefix: put before every picture path. options: of the source's reader ("split=train").
    skip_bad: leave out records that do not parse or that the target cannot hold, and say so in the result.
    Raises DataError naming the record, UsageError for what does not go together.
    """
    if to not in TARGETS:
        raise UsageError(f"--to {to}: {name_nearest(to, TARGETS)}")
    skipped: list[str] = []
    items = read_items(source, read_as=read_as, options=options, skipped=skipped if skip_bad else None)
    root = images if images is not None else (source if source.is_dir() else source.parent)
    extractor = None if extract is None else Extractor(extract)
    written = 0
    with _open_writer(target, to, PictureFolder(root), force=force) as writer:
        for item in items:
            item = item if not prefix else _with_prefix(item, prefix)
            try:
                writer.write(item if extractor is None else extractor(item))
            except (DataError, ImageError) as error:
                if not skip_bad:
                    raise
                skipped.append(str(error))
                continue
            written += 1
            if progress is not None:
                progress(written)
        if not written:
            raise DataError(f"{source}: no records in it")
    return Converted(written, 0 if extractor is None else extractor.written, tuple(skipped))


def read_items(
    source: Path,
    *,
    read_as: str = "auto",
    options: Mapping[str, str] | None = None,
    skipped: list[str] | None = None,
) -> Iterator[Item]:
    """The conversations of a source, each with the names that its record gives its pictures.

    skipped: takes the errors of records that do not parse; without it the first one is raised.
    """
    if read_as == "auto":
        read_as = detect_reader(source) or "auto"
    if read_as in SOURCE_READERS:
        return _parse_all("llava", ((o, r, {}) for o, r in read_source(read_as, source, options or {})), skipped)
    if read_as not in FORMATS:
        raise UsageError(f"--from {read_as}: {name_nearest(read_as, [*FORMATS, *SOURCE_READERS])}")
    if options:
        raise UsageError(f"{', '.join(options)}: only the readers {', '.join(SOURCE_READERS)} take options")
    packed = packed_files(source) if source.is_dir() else None
    file = read_conversations(packed or source, format=read_as)
    return _parse_all(read_as if read_as in PARSERS else "auto", _records(file, skipped), skipped)


_Found = tuple[str, Any, Mapping[str, bytes]]


def _records(file: ConversationFile, skipped: list[str] | None) -> Iterator[_Found]:
    for index in range(len(file)):
        try:
            record, embedded = file.load(index)
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        yield file.origin(index), record, embedded


def _parse_all(parser: str, found: Iterable[_Found], skipped: list[str] | None) -> Iterator[Item]:
    for origin, record, embedded in found:
        try:
            item = _parse(parser, record, embedded, origin)
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        yield item


def _parse(parser: str, record: Any, embedded: Mapping[str, bytes], origin: str) -> Item:
    names: dict[Path, str] = {}

    def resolve(name: str) -> ImageSource:
        if name in embedded:
            return embedded[name]
        # A number instead of the path, since Path would change the spelling ("a//b", "https://c").
        path = Path(str(len(names)))
        names[path] = name
        return path

    conversation = PARSERS[parser](record, resolve_image=resolve, origin=origin)
    extras = {key: value for key, value in record.items() if key not in CONVERSATION_KEYS}
    return Item(conversation, names, record.get("id"), extras)


def _open_writer(target: Path, to: str, pictures: PictureFolder, *, force: bool) -> Writer:
    if to in RECORD_WRITERS:
        if target.suffix.lower() not in (".json", ".jsonl", ".ndjson"):
            raise UsageError(f"{target}: name a .json or .jsonl file to write {to} records to")
        return JsonWriter(target, to_record=RECORD_WRITERS[to], force=force)

    def read_picture(item: Item, image: Image) -> bytes:
        return picture_bytes(item, image, pictures)

    writer = ParquetWriter if to == "parquet" else ShardWriter
    return writer(target, read_picture=read_picture, force=force)


def picture_bytes(item: Item, image: Image, pictures: PictureFolder) -> bytes:
    """The file of a picture as it is, undecoded; paths stay inside the picture folder."""
    if isinstance(image.source, bytes):
        return image.source
    name = item.name(image)
    if is_web_address(name):
        raise DataError(f"{item.origin}: picture {name!r} is a web address; download it first")
    path = pictures.open(name, item.origin)
    assert isinstance(path, Path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{item.origin}: picture {path}: {(error.strerror or 'cannot be read').lower()}") from error


class Extractor:
    """Writes pictures that lie in records to files, each once, named by a digest of its bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.written = 0
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, item: Item) -> Item:
        names = dict(item.names)
        messages = []
        for message in item.conversation.messages:
            parts: list[Part] = []
            for part in message.parts:
                if isinstance(part, Image) and isinstance(part.source, bytes):
                    path = Path(str(len(names)))
                    names[path] = self._save(part.source, item)
                    part = Image(path)
                parts.append(part)
            messages.append(Message(message.role, tuple(parts), supervised=message.supervised))
        return Item(Conversation(tuple(messages), item.origin), names, item.id, item.extras)

    def _save(self, data: bytes, item: Item) -> str:
        kind = picture_kind(data)
        if kind == "octet-stream":
            raise DataError(f"{item.origin}: a picture is no JPEG, PNG, WebP, GIF or BMP; see `llava data check`")
        name = f"{hashlib.sha256(data).hexdigest()[:24]}.{'jpg' if kind == 'jpeg' else kind}"
        path = self._folder / name
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_bytes(data)
            partial.replace(path)
            self.written += 1
        return name


def _with_prefix(item: Item, prefix: str) -> Item:
    names = {path: name if is_web_address(name) else prefix + name for path, name in item.names.items()}
    return Item(item.conversation, names, item.id, item.extras)
