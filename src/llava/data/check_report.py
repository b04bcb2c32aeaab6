"""The page of a check: one HTML file that opens offline, with pictures inlined and nothing that runs.

Records and paths come from strangers, so every text is escaped, and the page forbids scripts and requests itself.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from llava.data.check_charts import histogram, two_bars
from llava.data.check_figures import Report
from llava.data.check_findings import KINDS
from llava.data.token_text import Piece, token_pieces
from llava.errors import LlavaError
from llava.prompt.conversation import Conversation, Image
from llava.prompt.images import ImageLimits, decode_image
from llava.prompt.processor import Processor

_THUMBNAIL = 320
_PICTURES_A_CARD = 4
_PIECES_A_CARD = 1500


@dataclass(frozen=True)
class Example:
    """A record to show, and why this one."""

    record: int
    because: str


def choose_examples(report: Report, *, ordinary: int = 6) -> list[Example]:
    """Ordinary records spread over the data, then odd ones: longest, shortest, least learnt from, most pictures ..."""
    good = np.flatnonzero((report.tokens > 0) | (~report.bad & (report.turns > 0)))
    if not len(good):
        return []
    places = np.unique(np.linspace(0, len(good) - 1, ordinary).astype(int))
    odd: list[tuple[str, int]] = []
    if report.counted:
        counted = good[report.tokens[good] > 0]
        if len(counted):
            share = report.answer_tokens[counted] / report.tokens[counted]
            odd += [
                ("most tokens", int(counted[report.tokens[counted].argmax()])),
                ("fewest tokens", int(counted[report.tokens[counted].argmin()])),
                ("smallest share supervised", int(counted[share.argmin()])),
                ("largest share supervised", int(counted[share.argmax()])),
            ]
    else:
        odd.append(("longest answers", int(good[report.answer_chars[good].argmax()])))
        odd.append(("shortest answers", int(good[report.answer_chars[good].argmin()])))
    if report.turns[good].max() > report.turns[good].min():
        odd.append(("most turns", int(good[report.turns[good].argmax()])))
    if report.pictures[good].max() > 1:
        odd.append(("most pictures", int(good[report.pictures[good].argmax()])))
    if (report.pictures[good] == 0).any() and (report.pictures[good] > 0).any():
        odd.append(("no picture", int(good[(report.pictures[good] == 0).argmax()])))
    odd += _odd_pictures(report)
    examples = {record: because for because, record in reversed(odd)}
    chosen = [Example(int(good[place]), "") for place in places if int(good[place]) not in examples]
    return chosen + [Example(record, because) for because, record in odd if examples[record] == because]


def _odd_pictures(report: Report) -> Iterator[tuple[str, int]]:
    heights, widths = (np.frombuffer(side, dtype=np.int32).astype(np.int64) for side in (report.heights, report.widths))
    opened = np.flatnonzero(heights > 0)
    if len(opened) < 2 or (heights[opened] * widths[opened]).min() == (heights[opened] * widths[opened]).max():
        return
    pixels = heights[opened] * widths[opened]
    ratio = np.maximum(heights[opened], widths[opened]) / np.minimum(heights[opened], widths[opened])
    for because, place in (
        ("largest picture", pixels.argmax()),
        ("smallest picture", pixels.argmin()),
        ("longest sides' ratio", ratio.argmax()),
    ):
        record = report.first_records[int(opened[place])]
        if not report.bad[record]:
            yield because, record


def write_page(path: Path, report: Report, *, processor: Processor | None, facts: Mapping[str, str]) -> None:
    """Write the page; examples are read again and tokenised as a run would."""
    summary = report.summary()
    frame = resources.files("llava").joinpath("data", "check_page.html").read_text(encoding="utf-8")
    names = ", ".join(Path(name).name for name in summary["files"])
    page = frame.replace("{{title}}", f"Data check: {html.escape(names)}")
    body = "\n".join(_body(report, summary, processor, names, facts))
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page.replace("{{body}}", body), encoding="utf-8", errors="replace")
    partial.replace(path)


def _body(
    report: Report, summary: Mapping[str, Any], processor: Processor | None, names: str, facts: Mapping[str, str]
) -> Iterator[str]:
    yield f"<h1>Data check <span class=soft>{html.escape(names)}</span></h1>"
    yield f'<p class="verdict{"" if report.ok else " bad"}">{html.escape(facts["verdict"])}</p>'
    yield _headline(summary)
    if len(summary["by_file"]) > 1:
        yield "<h2>Sources</h2>"
        yield _sources(summary["by_file"])
    if report.log.counts:
        yield "<h2>Findings</h2>"
        yield _findings(report)
    yield "<h2>Sizes</h2>"
    yield f"<div class=plots>{''.join(_plots(report))}</div>"
    yield "<h2>What prefix sharing saves <span class=soft>an epoch</span></h2>"
    yield _sharing(report)
    yield '<h2>Examples</h2><p class="soft key">'
    if processor is not None:
        yield "As the model reads them: <i>learnt</i> tokens, <u>pictures</u>, and the rest, which is only read. "
    yield "Some spread over the data, then odd ones.</p>"
    cards = "".join(_card(report, example, processor) for example in choose_examples(report))
    yield f"<div class=cards>{cards}</div>"
    told = " &middot; ".join(f"{html.escape(k)}: {html.escape(v)}" for k, v in facts.items() if k != "verdict")
    yield f"<footer class=soft>{told}</footer>"


def _headline(summary: Mapping[str, Any]) -> str:
    cells = [
        ("records", f"{summary['records']:,}"),
        ("turns", f"{summary['turns']['all']:,}"),
        ("pictures", f"{summary['pictures']['distinct']:,}"),
        ("mentions of them", f"{summary['pictures']['mentions']:,}"),
        ("without a picture", f"{summary['text_only']:,}"),
    ]
    if summary["tokens"]:
        cells.append(("tokens", f"{summary['tokens'].get('all', 0):,}"))
        cells.append(("supervised", f"{summary['tokens']['supervised_share']:.1%}"))
    cells += [("errors", f"{summary['errors']:,}"), ("warnings", f"{summary['warnings']:,}")]
    return (
        "<div class=facts>" + "".join(f"<div><b>{v}</b><span class=soft>{k}</span></div>" for k, v in cells) + "</div>"
    )


def _sources(rows: Sequence[Mapping[str, Any]]) -> str:
    titles = ("records", "bad", "turns", "pictures", "tokens", "supervised")
    head = "<th>source</th>" + "".join(f"<th class=num>{title}</th>" for title in titles)
    lines = []
    for row in rows:
        counts = (row["records"], row["bad_records"], row["turns"], row["picture_mentions"], row["tokens"])
        share = "" if not row["tokens"] else f"{row['supervised'] / row['tokens']:.1%}"
        cells = [*("" if count is None else f"{count:,}" for count in counts), share]
        lines.append(
            f"<tr><td>{html.escape(row['file'])}</td>"
            + "".join(f"<td class=num>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    return f"<table class=found><thead><tr class=soft>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _findings(report: Report) -> str:
    rows = []
    for kind, count in report.log.by_kind():
        first = report.log.first[kind]
        listed = "".join(
            f"<li><code>{html.escape(finding.origin)}</code> {html.escape(finding.message)}</li>" for finding in first
        )
        more = f"<li>... and {count - len(first):,} more in check.json</li>" if count > len(first) else ""
        rows.append(
            f'<tr class="{KINDS[kind].severity}"><td class=kind>{html.escape(kind)}</td><td class=num>{count:,}</td>'
            f"<td class=num>{count / max(report.records, 1):.2%}</td>"
            f"<td><details><summary>{html.escape(KINDS[kind].advice)}</summary><ul>{listed}{more}</ul></details></td></tr>"
        )
    return f"<table class=found><tbody>{''.join(rows)}</tbody></table>"


def _plots(report: Report) -> Iterator[str]:
    turns = report.turns[report.turns > 0]
    if report.counted:
        counted = report.tokens > 0
        yield histogram(
            report.tokens[counted], title="Tokens a conversation", unit="tokens", limit=report.limits.max_tokens
        )
        yield histogram(report.answer_tokens[counted], title="Learnt tokens a conversation", unit="tokens")
    else:
        yield histogram(report.answer_chars[report.turns > 0], title="Answers of a conversation", unit="characters")
    yield histogram(turns, title="Turns a conversation", unit="turns")
    if report.pictures.any():
        yield histogram(report.pictures[report.turns > 0], title="Pictures a conversation", unit="pictures")
    heights, widths = (np.frombuffer(side, dtype=np.int32) for side in (report.heights, report.widths))
    opened = heights > 0
    if opened.any():
        yield histogram(widths[opened], title="Picture widths", unit="pixels")
        yield histogram(heights[opened], title="Picture heights", unit="pixels")


def _sharing(report: Report) -> str:
    sharing, limits = report.sharing, report.limits
    rows = []
    if sharing.tokens_alone is not None and sharing.tokens_shared is not None:
        rows.append(("tokens", sharing.tokens_alone, sharing.tokens_shared))
    rows.append(("pictures encoded", sharing.pictures_alone, sharing.pictures_shared))
    how = (
        f"Up to {limits.conversations_per_group} conversations on one picture share its tokens, in trees of at most "
        f"{limits.row_tokens:,} tokens (data.conversations_per_tree, data.row_tokens); counted on the trees themselves."
    )
    if sharing.tokens_alone is None:
        how += " Give --model to count tokens."
    return f"{two_bars(rows)}<p class=soft>{how}</p>"


def _card(report: Report, example: Example, processor: Processor | None) -> str:
    origin = report.origin(example.record)
    try:
        conversation = report.conversations[example.record]
        encoded = None if processor is None else processor.encode(conversation)
        pictures = "".join(thumbnail_as_html(image) for image in conversation.images[:_PICTURES_A_CARD])
    except LlavaError as error:  # the file may have changed since it was checked
        return f"<div class=card><header><span>{html.escape(str(error))}</span></header></div>"
    more = len(conversation.images) - _PICTURES_A_CARD
    thumbs = pictures + (f"<span class=soft>and {more} more pictures</span>" if more > 0 else "")
    size = f"{len(conversation.messages)} turns"
    if encoded is not None:
        size = f"{len(encoded.input_ids):,} tokens, {encoded.num_answer_tokens:,} learnt"
    because = f"<b>{html.escape(example.because)}</b> " if example.because else ""
    words = words_as_html(conversation)
    if encoded is not None and processor is not None:
        words = prompt_as_html(token_pieces(encoded, processor), at_most=_PIECES_A_CARD)
    return (
        f"<div class=card><header><span>{because}<span class=soft>{html.escape(_short(origin))}</span></span>"
        f"<span class=soft>{size}</span></header><div class=thumbs>{thumbs}</div><div class=prompt>{words}</div></div>"
    )


def prompt_as_html(pieces: Iterable[Piece], *, at_most: int | None = None) -> str:
    """A rendered prompt, token by token: what is learnt in <i>, pictures in <u>."""
    parts: list[str] = []
    for number, piece in enumerate(pieces):
        if number == at_most:
            parts.append(" <span class=soft>... and so on</span>")
            break
        if piece.kind == "picture":
            parts.append(f"<u>picture, {piece.num_tokens:,} tokens</u>")
        elif piece.kind == "learnt":
            parts.append(f"<i>{html.escape(piece.text)}</i>")
        else:
            parts.append(html.escape(piece.text))
    return "".join(parts)


def words_as_html(conversation: Conversation) -> str:
    """The turns without a model: answers marked as learnt."""
    parts = []
    for message in conversation.messages:
        shown = "".join(
            "<u>picture</u> " if isinstance(part, Image) else html.escape(part.text) for part in message.parts
        )
        learnt = message.role == "assistant" and message.supervised
        parts.append(f"{message.role}: " + (f"<i>{shown}</i>" if learnt else shown))
    return "\n".join(parts)


def thumbnail_as_html(image: Image) -> str:
    """A picture, made small and inlined, with its name and size. Raises ImageError."""
    picture = decode_image(image.source, ImageLimits(), background=(255, 255, 255))
    name = Path(image.source).name if isinstance(image.source, Path) else "in the record"
    shown = f"{picture.width} x {picture.height}"
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=82)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<figure><img alt="" src="{url}"><figcaption>{html.escape(name)}, {shown}</figcaption></figure>'


def _short(origin: str) -> str:
    """An origin without its folders."""
    return origin.rsplit("/", 1)[-1]
