"""Look at every record and every picture of a data set before hours are spent on it.

Problems come with file, line, value and the way out; nothing stops at the first. With a processor the tokens are
counted too: a histogram, the longest conversation, and answers that teach nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from llava.data.sources import ConversationFile
from llava.errors import LlavaError
from llava.prompt.conversation import Conversation, Image
from llava.prompt.images import decode_image
from llava.prompt.processor import Processor

_AT_ONCE = 256


@dataclass
class Report:
    """What was found. problems: (kind, message); tokens: one count a conversation, empty without a processor."""

    records: int = 0
    turns: int = 0
    text_only: int = 0
    pictures: int = 0
    picture_mentions: int = 0
    answer_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def lines(self, *, shown: int = 20) -> Iterator[str]:
        """The report as text: the first `shown` problems, the counts, the histogram."""
        for kind, message in self.problems[:shown]:
            yield f"{kind}: {message}"
        if len(self.problems) > shown:
            yield f"... and {len(self.problems) - shown} more problems"
        per_picture = f", {self.picture_mentions / self.pictures:.1f} conversations each" if self.pictures else ""
        yield (
            f"{self.records:,} records, {self.turns:,} turns, {self.text_only:,} without a picture; "
            f"{self.pictures:,} pictures{per_picture}"
        )
        if self.tokens:
            longest, mean = max(self.tokens), sum(self.tokens) / len(self.tokens)
            yield (
                f"tokens: {sum(self.tokens):,} in all, {mean:.0f} on average, longest {longest:,}; "
                f"{self.answer_tokens / max(sum(self.tokens), 1):.0%} of them answers"
            )
            yield from histogram(self.tokens)
        counts = Counter(kind for kind, _ in self.problems)
        yield ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "no problems"


def check_conversations(
    file: ConversationFile,
    *,
    processor: Processor | None = None,
    max_tokens: int | None = None,
    workers: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read every record, decode every picture once, and (with a processor) count tokens."""
    report = Report()
    seen: dict[Image, str | None] = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="llava-check") as pool:
        for start in range(0, len(file), _AT_ONCE):
            stop = min(start + _AT_ONCE, len(file))
            read = [(index, _read(file, index, report)) for index in range(start, stop)]
            found = [(index, conversation) for index, conversation in read if conversation is not None]
            fresh = {image: index for index, c in reversed(found) for image in c.images if image not in seen}
            for image, problem in zip(fresh, pool.map(_look, fresh), strict=True):
                seen[image] = problem
                report.pictures += 1
                if problem is not None:
                    report.problems.append(("picture", f"{file.origin(fresh[image])}: {problem}"))
            for _, conversation in found:
                _count(conversation, report)
                if processor is not None and all(seen[image] is None for image in conversation.images):
                    _encode(conversation, processor, report, max_tokens=max_tokens)
            if progress is not None:
                progress(stop, len(file))
    return report


def histogram(values: list[int], *, bins: int = 8, width: int = 40) -> Iterator[str]:
    """Text bars of how many values lie in each of `bins` equal ranges."""
    low, high = min(values), max(values)
    size = max(1, -(-(high + 1 - low) // bins))
    counts = Counter((value - low) // size for value in values)
    most = max(counts.values())
    for number in range(max(counts) + 1):
        begin = low + number * size
        bar = "#" * round(width * counts[number] / most)
        yield f"  {begin:>6,} to {begin + size - 1:>6,}  {counts[number]:>9,}  {bar}".rstrip()


def _read(file: ConversationFile, index: int, report: Report) -> Conversation | None:
    report.records += 1
    try:
        return file[index]
    except LlavaError as error:
        report.problems.append(("record", str(error)))
        return None


def _look(image: Image) -> str | None:
    """What is wrong with a picture, None when it opens."""
    if isinstance(image.source, Path) and not image.source.exists():
        return f"picture {image.source} does not exist; fix the path, or give another --images folder"
    try:
        decode_image(image.source)
    except LlavaError as error:
        return str(error)
    return None


def _count(conversation: Conversation, report: Report) -> None:
    report.turns += len(conversation.messages)
    report.picture_mentions += len(conversation.images)
    report.text_only += not conversation.images
    answers = [message for message in conversation.messages if message.role == "assistant"]
    if not answers:
        report.problems.append(
            ("nothing to learn", f"{conversation.origin}: no answer in it; add one or drop the record")
        )
    elif any(not message.text.strip() for message in answers):
        report.problems.append(
            ("empty answer", f"{conversation.origin}: an answer is empty; fill it or drop the record")
        )


def _encode(conversation: Conversation, processor: Processor, report: Report, *, max_tokens: int | None) -> None:
    try:
        encoded = processor.encode(conversation, pixels=False)
    except LlavaError as error:
        report.problems.append(("record", str(error)))
        return
    length = len(encoded.input_ids)
    report.tokens.append(length)
    report.answer_tokens += encoded.num_answer_tokens
    if max_tokens is not None and length > max_tokens:
        report.problems.append(
            (
                "too long",
                f"{conversation.origin}: {length} tokens, over {max_tokens}; shorten it or set data.too_long=drop",
            )
        )
