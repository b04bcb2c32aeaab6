"""The page of a check: self-contained, escaped, with the odd records on it; and its charts."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava.data.check import CheckLimits, Report, check_conversations
from llava.data.check_charts import bin_values, histogram, two_bars
from llava.data.check_report import choose_examples, write_page
from llava.data.sources import ConversationSet, read_conversations
from llava.data.token_text import join_pieces, token_pieces
from llava.prompt.processor import IGNORE_LABEL, Processor
from tests.data.test_check import processor as processor  # the fixture

EVIL = "<script>alert(1)</script>"


def make_report(folder: Path, processor: Processor | None, records: list[dict[str, Any]]) -> Report:
    for number, size in enumerate([(20, 20), (64, 8), (200, 150)]):
        Image.new("RGB", size, (number * 80, 20, 20)).save(folder / f"{number}.png")
    path = folder / "mix.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    conversations = ConversationSet([read_conversations(path)])
    return check_conversations(conversations, processor=processor, limits=CheckLimits(max_tokens=300))


def talk(question: str, answer: str, *pictures: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>" * len(pictures) + question}, {"from": "gpt", "value": answer}]
    return {"image": list(pictures), "conversations": turns}


def write(folder: Path, report: Report, processor: Processor | None) -> str:
    write_page(folder / "check.html", report, processor=processor, facts={"verdict": EVIL, "model": "tiny"})
    return (folder / "check.html").read_text()


def test_the_page_asks_for_nothing_and_runs_nothing_whatever_the_data_says(
    tmp_path: Path, processor: Processor
) -> None:
    records = [talk(EVIL, EVIL, "0.png"), talk("a", "b", f"{EVIL}.png"), {"conversations": EVIL}]
    page = write(tmp_path, make_report(tmp_path, processor, records), processor)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "default-src 'none'" in page


def test_every_element_that_is_opened_is_closed(tmp_path: Path, processor: Processor) -> None:
    open_tags: list[str] = []

    class Balanced(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img", "br", "line", "rect"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("line", "rect"):
                assert open_tags.pop() == tag

    records = [talk("Which?", "Red.", "0.png"), talk("Both?", "Yes.", "0.png", "1.png"), {}]
    Balanced().feed(write(tmp_path, make_report(tmp_path, processor, records), processor))
    assert open_tags == []


def test_odd_records_are_shown_with_their_reason(tmp_path: Path, processor: Processor) -> None:
    records = [talk(f"Number {n}?", "Red.", "0.png") for n in range(20)]
    records[3] = talk("Long?", "word " * 30, "0.png")
    records[5] = talk("Which?", "Both.", "0.png", "1.png")
    records[7] = talk("No picture?", "None.")
    records[9] = talk("Large?", "Yes.", "2.png")
    records[11] = {}
    chosen = {example.because: example.record for example in choose_examples(make_report(tmp_path, processor, records))}
    assert chosen["most tokens"] == 3
    assert chosen["most pictures"] == 5
    assert chosen["largest picture"] == 9
    assert 7 in chosen.values()
    assert 11 not in chosen.values(), "a record that does not parse has nothing to show"


def test_without_a_model_the_page_shows_words(tmp_path: Path) -> None:
    page = write(tmp_path, make_report(tmp_path, None, [talk("Colour?", "Red as wine.", "0.png")]), None)
    assert "<i>Red as wine.</i>" in page
    assert "Give --model to count tokens" in page


def test_a_data_set_without_a_good_record_still_has_a_page(tmp_path: Path, processor: Processor) -> None:
    page = write(tmp_path, make_report(tmp_path, processor, [{}, {}]), processor)
    assert "malformed record" in page


@pytest.mark.parametrize("text", ["Red.", "Größe: 15 µm", "日本語の答え", "🦙🦙 two", "a  b\n\nc"])
def test_pieces_spell_the_text_and_cover_every_token(tmp_path: Path, processor: Processor, text: str) -> None:
    report = make_report(tmp_path, None, [talk("Größe?", text, "0.png")])
    encoded = processor.encode(report.conversations[0])
    pieces = list(token_pieces(encoded, processor))
    assert sum(piece.num_tokens for piece in pieces) == len(encoded.input_ids)
    learnt = sum(piece.num_tokens for piece in pieces if piece.kind == "learnt")
    assert learnt == int((encoded.labels != IGNORE_LABEL).sum())
    joined = join_pieces(pieces)
    assert [piece.kind for piece in joined] == ["read", "picture", "read", "learnt"]
    assert joined[1].num_tokens == encoded.tokens_per_image[0]
    assert joined[3].text.removesuffix("</s>").strip() == text


def test_bins_hold_every_value() -> None:
    generator = np.random.default_rng(0)
    for values in (np.array([5]), np.array([1, 1, 2, 50, 100000]), generator.integers(0, 3000, 5000), np.arange(7)):
        found = bin_values(values)
        assert sum(found.counts) + found.beyond == len(values)
        assert len(found.edges) == len(found.counts) + 1
        assert len(found.counts) <= 43


def test_a_histogram_marks_the_limit_and_the_values_beyond_it_all() -> None:
    values = np.append(np.arange(1, 1000), 10**6)
    svg = histogram(values, title="Tokens", unit="tokens", limit=500)
    assert "limit 500" in svg
    assert 'class="beyond"' in svg
    assert "nothing to count" in histogram(values[:0], title="Tokens", unit="tokens")


def test_a_few_whole_numbers_are_labelled_each_and_equal_ones_need_no_bar() -> None:
    svg = histogram(np.array([2, 2, 4, 5]), title="Turns", unit="turns")
    assert all(f">{value}</text>" in svg for value in (2, 3, 4, 5))
    assert "all 64" in histogram(np.full(9, 64), title="Widths", unit="pixels")
    assert "<svg" not in histogram(np.full(9, 64), title="Widths", unit="pixels")


def test_two_bars_say_the_ratio() -> None:
    assert "2.50x" in two_bars([("tokens", 1000, 400)])
