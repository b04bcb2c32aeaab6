"""`data check`: every problem found in one pass, each with its place and its way out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.data.check import check_conversations, histogram
from llava.data.encoding import GroupEncoder
from llava.data.sources import ConversationSet, read_conversations
from llava.errors import DataError
from llava.prompt.images import ImageSettings
from llava.prompt.processor import Processor
from llava.prompt.tokenizer import load_tokenizer

TOKENIZER = Path(__file__).parent.parent / "golden" / "prompt" / "tokenizers" / "vicuna-tiny-v1.5"


@pytest.fixture(scope="module")
def processor() -> Processor:
    tokenizer = load_tokenizer(TOKENIZER)
    (image,) = tokenizer.add_special_tokens(["<image>"])
    picture = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    settings = ImageSettings.from_preprocessor_config({**picture, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    from dataclasses import replace

    settings = replace(settings, mode="pad", patches_per_side=2, tokens_per_tile=4)
    return Processor(tokenizer, "llava_hf", image_settings=settings, image_token_id=image)


def record(image: str | None = "good.png", answer: str = "Red.", question: str = "Colour?") -> dict[str, object]:
    turns = [{"from": "human", "value": ("<image>\n" if image else "") + question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({"image": image} if image else {})}


def write(folder: Path, *records: object) -> Path:
    Image.new("RGB", (20, 10), (200, 0, 0)).save(folder / "good.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    path = folder / "mix.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_a_good_data_set_has_no_problems_and_is_counted(tmp_path: Path, processor: Processor) -> None:
    path = write(tmp_path, record(), record(question="Which?"), record(image=None))
    report = check_conversations(read_conversations(path), processor=processor)
    assert report.ok
    assert (report.records, report.turns, report.pictures, report.text_only) == (3, 6, 1, 1)
    assert len(report.tokens) == 3
    assert report.answer_tokens > 0
    assert list(report.lines())[-1] == "no problems"


@pytest.mark.parametrize(
    ("bad", "kind", "says"),
    [
        (record("missing.png"), "picture", "missing.png does not exist; fix the path"),
        (record("broken.png"), "picture", "broken.png"),
        (record("../good.png"), "record", "leaves the image folder"),
        (record(answer=" "), "empty answer", "an answer is empty"),
        ({"conversations": [{"from": "human", "value": "Hello"}]}, "nothing to learn", "no answer in it"),
        ({"conversations": [{"from": "alien", "value": "Hello"}]}, "record", "alien"),
        ({"image": "good.png", "conversations": [{"from": "human", "value": "no mark"}]}, "record", "1 picture but 0"),
        ({}, "record", "conversations"),
        ([1], "record", "must be an object"),
        (record(answer="long " * 60), "too long", "over 100; shorten it"),
    ],
)
def test_each_problem_is_named_with_its_line(
    tmp_path: Path, processor: Processor, bad: object, kind: str, says: str
) -> None:
    path = write(tmp_path, record(), bad, record())
    report = check_conversations(read_conversations(path), processor=processor, max_tokens=100)
    assert [found for found, _ in report.problems] == [kind]
    message = report.problems[0][1]
    assert says in message
    assert "mix.jsonl:2" in message


def test_nothing_stops_at_the_first_problem(tmp_path: Path) -> None:
    path = write(tmp_path, record("missing.png"), {}, record("missing.png"), record("broken.png"))
    report = check_conversations(read_conversations(path))
    assert len(report.problems) == 3, "a missing picture is named once, at its first mention"
    assert report.records == 4


def test_the_report_shortens_a_long_list(tmp_path: Path) -> None:
    report = check_conversations(read_conversations(write(tmp_path, *[{} for _ in range(30)])))
    lines = list(report.lines(shown=5))
    assert lines[5] == "... and 25 more problems"
    assert lines[-1] == "30 record"


def test_the_histogram_counts_every_value() -> None:
    values = [1, 1, 2, 50, 100]
    lines = list(histogram(values, bins=4))
    assert sum(int(line.split()[3]) for line in lines) == len(values)


def test_a_group_decodes_its_picture_once(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, record(), record(question="Which?"), record(image=None))
    calls: list[object] = []
    whole = processor.prepare_image
    monkeypatch.setattr(processor, "prepare_image", lambda image: (calls.append(image), whole(image))[1])
    encoder = GroupEncoder(ConversationSet([read_conversations(path)]), processor, max_tokens=100)
    encoded = encoder((0, 1, 2))
    assert len(calls) == 1
    assert np.shares_memory(encoded[0].pixel_values, encoded[1].pixel_values)
    assert len(encoded[2].pixel_values) == 0


def test_a_long_conversation_is_an_error_or_left_out(tmp_path: Path, processor: Processor) -> None:
    conversations = ConversationSet([read_conversations(write(tmp_path, record(), record(answer="long " * 60)))])
    with pytest.raises(DataError, match=r"mix.jsonl:2: .* at most 100 fit.*data.too_long"):
        GroupEncoder(conversations, processor, max_tokens=100)((0, 1))
    assert len(GroupEncoder(conversations, processor, max_tokens=100, drop_too_long=True)((0, 1))) == 1


def test_an_unreadable_picture_names_its_record(tmp_path: Path, processor: Processor) -> None:
    conversations = ConversationSet([read_conversations(write(tmp_path, record("broken.png")))])
    with pytest.raises(DataError, match=r"mix.jsonl:1: .*broken.png"):
        GroupEncoder(conversations, processor, max_tokens=100)((0,))
