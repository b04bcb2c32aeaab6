"""Look at every record and every picture of a data set before hours are spent on it.

    report = check_conversations(ConversationSet([read_conversations("mix.json")]), processor=processor)
    report.log.write_json(Path("check.json"), report.summary())

All of it is read: each record parsed, each picture decoded once, and with a processor each conversation tokenised as a
run would do it. Conversations go through in the loader's groups (those on one picture together), so what prefix
sharing saves is counted with the trees that a run would grow, not estimated. Nothing stops at the first problem. Memory
is some 200 bytes a record and picture; neither texts nor pixels are kept.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llava.data.check_figures import CheckLimits as CheckLimits
from llava.data.check_figures import Report as Report
from llava.data.check_figures import Sharing as Sharing
from llava.data.check_findings import Finding, kind_of
from llava.data.encoding import truncate
from llava.data.packing import grow_trees
from llava.data.sources import ConversationSet
from llava.errors import ContextLengthError, ImageError, LlavaError, PromptError
from llava.prompt.conversation import IMAGE_MARK, Conversation, Image
from llava.prompt.images import ImageLimits, decode_image, read_size
from llava.prompt.processor import Encoded, PreparedImage, Processor
from llava.prompt.tiling import Size

_AT_ONCE = 256
_TINY_SIDE = 10


def check_conversations(
    conversations: ConversationSet,
    *,
    processor: Processor | None = None,
    limits: CheckLimits | None = None,
    decode: bool = True,
    workers: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read every record, open every picture once, and (with a processor) count tokens.

    decode=False reads the pictures' headers only: several times faster, but a truncated file is not seen. `progress`
    is called with (conversations done, of how many).
    """
    report = Report.empty(conversations, limits or CheckLimits(), counted=processor is not None)
    with ThreadPoolExecutor(workers, thread_name_prefix="llava-check") as pool:
        checker = _Checker(report, processor, decode=decode, pool=pool)
        groups = conversations.group_by_picture(limit=report.limits.conversations_per_group)
        done = 0
        for some in _in_chunks(groups):
            checker.check(some)
            done += sum(map(len, some))
            if progress is not None:
                progress(done, report.records)
    checker.finish()
    return report


def look_at(image: Image, *, decode: bool = True) -> Size:
    """(height, width) of a picture that opens. Raises ImageError for one that does not, or that is hostile."""
    source = image.source
    if isinstance(source, Path):
        try:
            mode = source.stat().st_mode
        except (OSError, ValueError):
            raise ImageError(f"{source}: no such file; fix the path, or give another --images folder") from None
        if not stat.S_ISREG(mode):  # a pipe would be waited for without end
            raise ImageError(f"{source}: not a regular file; only files are opened")
    if not decode:
        return read_size(source, ImageLimits())
    picture = decode_image(source, ImageLimits())
    return picture.height, picture.width


class _Checker:
    """Goes through groups of conversations and fills a Report."""

    def __init__(self, report: Report, processor: Processor | None, *, decode: bool, pool: ThreadPoolExecutor) -> None:
        self.report = report
        self.processor = processor
        self.pool = pool
        self._decode = decode
        self._numbers: dict[int, int] = {}  # a picture's digest to its number
        self._broken: dict[int, tuple[str, str]] = {}  # a picture's number to (kind, message)
        self._digests = np.zeros(report.records, dtype=np.uint64)
        self._pictures_alone = self._pictures_shared = self._tokens_alone = self._tokens_shared = 0

    def check(self, groups: Sequence[tuple[int, ...]]) -> None:
        read = {number: found for group in groups for number in group if (found := self._read(number)) is not None}
        keys = {number: [_picture_key(image) for image in found.images] for number, found in read.items()}
        self._look({number: list(zip(keys[number], found.images, strict=True)) for number, found in read.items()})
        whole: list[list[tuple[int, Conversation]]] = []
        for group in groups:
            sound = [(number, read[number]) for number in group if number in read]
            for number, found in sound:
                self._count(number, found, keys[number])
            sound = [(number, found) for number, found in sound if not self.report.bad[number]]
            if sound:
                whole.append(sound)
        if self.processor is None:
            for sound in whole:
                alone = [len(found.images) for _, found in sound]
                self._pictures_alone += sum(alone)
                self._pictures_shared += max(alone)
            return
        for sound, (encoded, costs) in zip(whole, self.pool.map(self._measure, whole), strict=True):
            self._take(sound, encoded)
            self._tokens_alone += costs.tokens_alone or 0
            self._tokens_shared += costs.tokens_shared or 0
            self._pictures_alone += costs.pictures_alone
            self._pictures_shared += costs.pictures_shared

    def finish(self) -> None:
        counted = self.processor is not None
        self.report.sharing = Sharing(
            self._pictures_alone,
            self._pictures_shared,
            self._tokens_alone if counted else None,
            self._tokens_shared if counted else None,
        )
        for first, again in _repeated(self._digests):
            self._tell("duplicate", again, f"the same as {self.report.origin(first)}")

    def _tell(self, kind: str, record: int, message: str, *, picture: str | None = None) -> None:
        origin = self.report.origin(record)
        finding = Finding(kind, record, origin, message.removeprefix(f"{origin}: "), picture)
        if finding.severity == "error":
            self.report.bad[record] = True
        self.report.log.add(finding)

    def _read(self, number: int) -> Conversation | None:
        try:
            return self.report.conversations[number]
        except LlavaError as error:
            self._tell(kind_of(str(error)), number, str(error))
            return None

    def _look(self, mentioned: dict[int, list[tuple[int, Image]]]) -> None:
        """Open the pictures that were not seen before, side by side."""
        report = self.report
        fresh: dict[int, tuple[int, Image]] = {}
        for number, images in mentioned.items():
            for key, image in images:
                if key not in self._numbers:
                    fresh.setdefault(key, (number, image))
        for (key, (record, image)), found in zip(
            fresh.items(), self.pool.map(self._open, [image for _, image in fresh.values()]), strict=True
        ):
            number = self._numbers[key] = len(report.heights)
            size, problem = found
            report.heights.append(size[0])
            report.widths.append(size[1])
            report.first_records.append(record)
            if problem is not None:
                self._broken[number] = (kind_of(problem, otherwise="unreadable picture"), problem)
            elif min(size) < _TINY_SIDE:
                self._tell("tiny picture", record, f"{size[1]} x {size[0]} pixels", picture=_name(image))

    def _open(self, image: Image) -> tuple[Size, str | None]:
        try:
            return look_at(image, decode=self._decode), None
        except LlavaError as error:
            return (0, 0), str(error)

    def _count(self, number: int, found: Conversation, keys: Sequence[int]) -> None:
        report = self.report
        report.turns[number] = len(found.messages)
        report.pictures[number] = len(found.images)
        report.roles.update(message.role for message in found.messages)
        answers = [message for message in found.messages if message.role == "assistant"]
        report.answer_chars[number] = sum(len(message.text) for message in answers)
        self._digests[number] = _conversation_key(found, keys)
        for key, image in dict(zip(keys, found.images, strict=True)).items():
            broken = self._broken.get(self._numbers[key])
            if broken is not None:
                self._tell(broken[0], number, broken[1], picture=_name(image))
        for kind, message in lint(found):
            self._tell(kind, number, message)

    def _measure(self, sound: Sequence[tuple[int, Conversation]]) -> tuple[list[Encoded | LlavaError], Sharing]:
        """Encode the conversations of a group, and grow the trees that a run would make of them."""
        assert self.processor is not None
        limits = self.report.limits
        encoded: list[Encoded | LlavaError] = []
        kept: list[Encoded] = []
        for _, found in sound:
            images = self._prepared(found)
            try:
                whole = self.processor.encode(found, images=images)
                encoded.append(whole)
                if whole.num_answer_tokens and len(whole.input_ids) <= limits.max_tokens:
                    kept.append(whole)
                elif whole.num_answer_tokens and limits.too_long == "truncate":
                    kept.append(truncate(found, images, self.processor, max_tokens=limits.max_tokens, whole=whole))
            except ContextLengthError:
                continue  # a cut that leaves no answer: left out
            except LlavaError as error:
                encoded.append(error)
        if not kept:
            return encoded, Sharing(0, 0, 0, 0)
        trees = grow_trees(kept, image_token_id=self.processor.image_token_id, max_tokens=limits.row_tokens)
        return encoded, Sharing(
            pictures_alone=sum(len(one.image_sizes) for one in kept),
            pictures_shared=sum(len(tree.image_sizes) for tree in trees),
            tokens_alone=sum(len(one.input_ids) for one in kept),
            tokens_shared=sum(tree.num_tokens for tree in trees),
        )

    def _prepared(self, found: Conversation) -> list[PreparedImage]:
        """A conversation's pictures by their sizes alone: tokens are counted, no pixel is needed."""
        nothing = np.zeros((0, 3, 0, 0), dtype=np.float32)
        report = self.report
        numbers = [self._numbers[_picture_key(image)] for image in found.images]
        return [PreparedImage(nothing, (report.heights[place], report.widths[place])) for place in numbers]

    def _take(self, sound: Sequence[tuple[int, Conversation]], encoded: Sequence[Encoded | LlavaError]) -> None:
        report, limits = self.report, self.report.limits
        for (number, _), one in zip(sound, encoded, strict=True):
            if isinstance(one, LlavaError):
                kind = "does not fit the template" if isinstance(one, PromptError) else "malformed record"
                self._tell(kind, number, str(one))
                continue
            length = len(one.input_ids)
            report.tokens[number] = length
            report.answer_tokens[number] = one.num_answer_tokens
            if not one.num_answer_tokens:
                self._tell("nothing to learn", number, f"{length} tokens, none of them supervised")
            elif length > limits.max_tokens:
                pictures = sum(one.tokens_per_image)
                kind = {"error": "too long", "drop": "left out", "truncate": "cut"}[limits.too_long]
                spent = f" ({pictures} of them pictures)" if pictures else ""
                self._tell(kind, number, f"{length} tokens{spent}, over {limits.max_tokens}")


def lint(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """(kind, message) of what is wrong or odd in a conversation that parses."""
    messages = [message for message in conversation.messages if message.role != "system"]
    answers = [message for message in messages if message.role == "assistant"]
    if not any(message.supervised for message in answers):
        yield "nothing to learn", "no answer in it"
    silent = [place for place, m in enumerate(messages, start=1) if not m.images and not m.text.strip()]
    empty = [place for place in silent if messages[place - 1].role == "assistant"]
    if empty:
        yield "empty answer", f"turn {_listed(empty)}: an answer is empty"
    blank = [place for place in silent if messages[place - 1].role == "user"]
    if blank:
        yield "empty question", f"turn {_listed(blank)}: neither words nor a picture"
    if messages and messages[0].role == "assistant":
        yield "opens with an answer", "the first turn is an answer; most templates leave it out"
    if answers and messages[-1].role == "user":
        yield "ends with a question", "the last turn has no answer"
    if any(IMAGE_MARK in message.text for message in messages):
        yield "mark in words", f"{IMAGE_MARK} in a text is read as words"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")


def _in_chunks(groups: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Groups of some `_AT_ONCE` conversations together: enough to keep every thread busy, few enough to hold."""
    chunk: list[tuple[int, ...]] = []
    held = 0
    for group in groups:
        chunk.append(group)
        held += len(group)
        if held >= _AT_ONCE:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _digest(*parts: bytes) -> int:
    """8 bytes: at a million entries two differ with the same digest once in forty million sets."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little")


def _picture_key(image: Image) -> int:
    source = image.source
    if isinstance(source, bytes):
        return _digest(b"bytes", source)
    return _digest(b"path", str(source).encode(errors="surrogatepass"))


def _conversation_key(conversation: Conversation, pictures: Sequence[int]) -> int:
    words = [f"{message.role}\0{message.text}".encode() for message in conversation.messages]
    return _digest(*words, np.array(pictures, dtype=np.uint64).tobytes())


def _repeated(digests: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """(first, later) of records with equal digests; 0 stands for a record that was not read."""
    order = np.argsort(digests, kind="stable")
    first = -1
    for before, here in pairwise(order):
        if digests[here] == 0 or digests[before] != digests[here]:
            first = -1
            continue
        first = int(before) if first < 0 else first
        yield first, int(here)


def _name(image: Image) -> str:
    return str(image.source) if isinstance(image.source, Path) else "(in the record)"
