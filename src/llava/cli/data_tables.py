"""What `llava data check` and `llava data show` print: findings, figures, what sharing saves, and coloured tokens."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from llava.data.check_figures import Report
    from llava.data.record_view import RecordView
    from llava.data.token_text import Piece
    from llava.prompt.conversation import Message

_LEARNT = "bold green"
_PICTURE = "black on bright_cyan"


def harmless(text: str) -> str:
    """Text of a stranger for a terminal: what would move its cursor, colour it or rename it is shown as \ufffd."""
    return "".join(char if char in "\n\t" or not _is_control(char) else "\ufffd" for char in text)


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Cf") and char not in "\u200c\u200d"  # joiners spell words


def make_console() -> Console:
    """Standard output; as wide as the terminal, or 120 in a pipe, where nobody can make it wider."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def finding_lines(report: Report, shown: int) -> Iterator[str]:
    """The first `shown` findings as "file:line: what", errors first, every kind that occurs among them."""
    kinds = report.log.by_kind()
    share = max(1, shown // max(len(kinds), 1))
    left = shown
    for kind, count in kinds:
        some = report.log.first[kind][: min(share, left)]
        left -= len(some)
        for finding in some:
            yield harmless(f"{finding.origin}: {finding.message}")
        if count > len(some) and some:
            yield f"... and {count - len(some):,} more: {kind}"


def print_report(report: Report, console: Console) -> None:
    """The figures as tables, then what a run would do."""
    from llava.data.check_findings import KINDS

    summary = report.summary()
    if report.log.counts:
        found = Table("found", "records", "share", "first at", "what to do", box=None, pad_edge=False)
        for kind, count in report.log.by_kind():
            style = "red" if KINDS[kind].severity == "error" else "yellow"
            first = report.log.first[kind][0].origin
            share = f"{count / max(report.records, 1):.2%}"
            found.add_row(Text(kind, style), f"{count:,}", share, Text(harmless(first)), KINDS[kind].advice)
        console.print(found)
        console.print()
    console.print(_figures(summary))
    if len(summary["by_file"]) > 1:
        console.print()
        console.print(_by_file(summary["by_file"]))
    for line in closing_lines(report, summary):
        console.print(line, soft_wrap=True, markup=False)


def _figures(summary: dict[str, Any]) -> Table:
    table = Table("", "in all", "least", "median", "mean", "95 %", "most", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, total: int, values: dict[str, Any]) -> None:
        cells = [f"{values[key]:,}" if key in values else "" for key in ("least", "median", "mean", "p95", "most")]
        table.add_row(name, f"{total:,}", *cells)

    pictures = summary["pictures"]
    row("records", summary["records"], {})
    row("turns", summary["turns"]["all"], summary["turns"])
    row("pictures", pictures["distinct"], {})
    row("mentions of them", pictures["mentions"], {})
    row("without a picture", summary["text_only"], {})
    if summary["tokens"]:
        row("tokens", summary["tokens"].get("all", 0), summary["tokens"])
        row("supervised tokens", summary["tokens"]["supervised"], {})
    return table


def _by_file(rows: list[dict[str, Any]]) -> Table:
    table = Table("source", "records", "bad", "turns", "pictures", "tokens", "supervised", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        share = "" if not row["tokens"] else f"{row['supervised'] / row['tokens']:.1%}"
        counts = [row["records"], row["bad_records"], row["turns"], row["picture_mentions"], row["tokens"]]
        table.add_row(Text(harmless(row["file"])), *("" if count is None else f"{count:,}" for count in counts), share)
    return table


def closing_lines(report: Report, summary: dict[str, Any]) -> Iterator[str]:
    """What sharing saves, and what a run would do with what was found."""
    yield ""
    if summary["tokens"]:
        yield f"{summary['tokens']['supervised_share']:.1%} of the tokens are supervised (answers)."
    yield sharing_line(report)
    missing = report.log.counts["missing picture"]
    if missing > 0.5 * int((report.pictures > 0).sum()):
        roots = ", ".join(sorted({str(file.image_root) for file in report.conversations.files}))
        yield harmless(f"Most pictures are missing: do their paths begin in {roots}? --images says where.")
    if report.ok:
        warnings = report.log.num_warnings
        yield "no problems" + (f" ({warnings:,} warnings)" if warnings else "")
    else:
        yield verdict(report)


def sharing_line(report: Report) -> str:
    """What prefix sharing saves on this data, in one sentence."""
    sharing, limits = report.sharing, report.limits
    if sharing.tokens_alone == 0:
        return "Prefix sharing: nothing to count, as no conversation can be used."
    pictures = (
        f"pictures encoded an epoch: {sharing.pictures_alone:,} alone, {sharing.pictures_shared:,} shared "
        f"({sharing.picture_ratio:.2f}x fewer)"
    )
    if sharing.tokens_alone is None or sharing.tokens_shared is None:
        return f"Prefix sharing, {pictures}; give --model to count tokens."
    return (
        f"Prefix sharing (up to {limits.conversations_per_group} conversations on one picture, trees of "
        f"{limits.row_tokens:,} tokens): {sharing.tokens_alone:,} tokens alone, {sharing.tokens_shared:,} shared "
        f"({sharing.ratio:.2f}x fewer); {pictures}."
    )


def verdict(report: Report) -> str:
    """What a run would do with the conversations that have errors."""
    limits, bad, long = report.limits, report.num_left_out, report.log.counts["too long"]
    said = []
    if long:
        said.append(
            f"A run would stop at the first of {long:,} conversations over data.max_tokens={limits.max_tokens}: raise "
            "it, or set data.too_long to drop or truncate."
        )
    if bad:
        share = f"{bad / max(report.records, 1):.2%}"
        also = "It would also" if long else "A run would"
        said.append(
            f"{also} put samples without loss in the place of {bad:,} of {report.records:,} conversations ({share}), "
            "and list them in bad_samples.jsonl; "
            + (
                f"that is more than data.max_bad_share={limits.max_bad_share:g} allows, so it would stop. "
                "Mend or drop them, or raise the share."
                if report.too_many_left_out
                else f"data.max_bad_share={limits.max_bad_share:g} allows that."
            )
        )
    return " ".join(said)


def coloured(pieces: Sequence[Piece]) -> Text:
    """A rendered prompt: what is learnt in green, pictures as a block, the rest plain."""
    text = Text()
    for piece in pieces:
        if piece.kind == "picture":
            text.append(f" picture: {piece.num_tokens:,} tokens ", _PICTURE)
        else:
            text.append(harmless(piece.text), _LEARNT if piece.kind == "learnt" else "dim")
    return text


def print_record(view: RecordView, console: Console) -> None:
    """A record: where it stands, its pictures, its prompt (or its turns, without a model), and what is wrong."""
    console.print(harmless(view.origin), style="bold", markup=False, soft_wrap=True)
    for picture in view.pictures:
        if picture.size is None:
            continue
        height, width = picture.size
        seen = f", {picture.tiles} tiles, {picture.tokens:,} tokens" if picture.tokens else ""
        console.print(
            f"picture {harmless(picture.name)}: {width} x {height} pixels, {picture.num_bytes:,} bytes{seen}",
            markup=False,
            soft_wrap=True,
        )
    if view.encoded is not None:
        length, learnt = len(view.encoded.input_ids), view.encoded.num_answer_tokens
        console.print(f"{length:,} tokens, {learnt:,} of them learnt ({learnt / max(length, 1):.0%}), in green:")
        console.print()
        console.print(coloured(view.pieces), soft_wrap=True)
    else:
        console.print()
        for message in view.conversation.messages:
            console.print(_turn(message), soft_wrap=True)
    for problem in view.problems:
        console.print(Text(harmless(problem), "red"), soft_wrap=True)


def _turn(message: Message) -> Text:
    from llava.prompt.conversation import Image

    text = Text(f"{message.role}: ", "bold")
    for part in message.parts:
        if isinstance(part, Image):
            text.append(" picture ", _PICTURE)
        else:
            text.append(harmless(part.text), "green" if message.role == "assistant" and message.supervised else "")
    return text
