"""Groups to encoded conversations: pictures decoded once, bad samples named, long conversations cut at whole turns."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PIL

from llava.data.bad_samples import BadSample
from llava.data.encoding import GroupEncoder, truncate
from llava.data.sources import ConversationSet, read_conversations
from llava.errors import ContextLengthError, DataError
from llava.prompt.conversation import Conversation, Image, Message, Text
from llava.prompt.processor import IGNORE_LABEL, Encoded, Processor
from tests.data.tiny_processor import build_processor, record, write_lines, write_pictures


@pytest.fixture(scope="module")
def processor() -> Processor:
    return build_processor()


def open_lines(folder: Path, *records: object) -> ConversationSet:
    write_pictures(folder)
    return ConversationSet([read_conversations(write_lines(folder / "mix.jsonl", *records))])


def test_a_group_decodes_its_picture_once(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations = open_lines(tmp_path, record(), record("good.png", ("Which?", "Red.")), record(None))
    calls: list[object] = []
    whole = processor.prepare_image
    monkeypatch.setattr(processor, "prepare_image", lambda image: (calls.append(image), whole(image))[1])
    first, second, third = GroupEncoder(conversations, processor, max_tokens=100)((0, 1, 2))
    assert isinstance(first, Encoded) and isinstance(second, Encoded) and isinstance(third, Encoded)
    assert len(calls) == 1
    assert np.shares_memory(first.pixel_values, second.pixel_values)
    assert len(third.pixel_values) == 0


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (record("broken.png"), "broken.png: damaged"),
        (record("missing.png"), "missing.png: no such file"),
        (record("../good.png"), "leaves the image folder"),
        (record("https://example.org/a.png"), "is a web address; download it"),
        (record(None, ("Hello?", " ")), "turn 2 (of the assistant) is empty"),
        (record(None, ("", "Hello.")), "turn 1 (of the user) is empty"),
        ({"conversations": [{"from": "human", "value": "Hello"}]}, "no answer to learn"),
        ({"conversations": []}, "no turns"),
        ({"conversations": [{"from": "alien", "value": "Hello"}]}, "unknown from 'alien'"),
        ({"image": "good.png", "conversations": [{"from": "human", "value": "no mark"}]}, "1 picture but 0 <image>"),
        ({"conversations": "nothing"}, "must be a list"),
        ({}, "no 'conversations' in the record"),
        ([1], "a record must be an object"),
        ("text", "a record must be an object"),
        ({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "loss": False}]},
         "no answer to learn"),
    ],
)  # fmt: skip
def test_a_sample_that_cannot_be_used_is_named_and_its_neighbours_are_not_touched(
    tmp_path: Path, processor: Processor, bad: object, says: str
) -> None:
    conversations = open_lines(tmp_path, record(), bad, record())
    first, found, last = GroupEncoder(conversations, processor, max_tokens=100)((0, 1, 2))
    assert isinstance(found, BadSample)
    assert (found.number, found.origin) == (1, f"{tmp_path / 'mix.jsonl'}:2")
    assert says in found.reason
    assert not found.reason.startswith(found.origin)
    assert isinstance(first, Encoded) and isinstance(last, Encoded)


def test_a_broken_picture_is_decoded_once_for_all_its_conversations(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    whole = processor.prepare_image
    monkeypatch.setattr(processor, "prepare_image", lambda image: (calls.append(image), whole(image))[1])
    conversations = open_lines(tmp_path, *[record("broken.png")] * 3)
    found = GroupEncoder(conversations, processor, max_tokens=100)((0, 1, 2))
    assert [type(one) for one in found] == [BadSample] * 3
    assert len(calls) == 1


def test_a_long_conversation_is_an_error_left_out_or_cut(tmp_path: Path, processor: Processor) -> None:
    long = ("Tell me more.", "long " * 60)
    conversations = open_lines(tmp_path, record(), record("good.png", ("Colour?", "Red."), long), record(None, long))
    with pytest.raises(DataError, match=r"mix.jsonl:2: .* at most 100 fit.*data.too_long"):
        GroupEncoder(conversations, processor, max_tokens=100)((0, 1))
    assert len(GroupEncoder(conversations, processor, max_tokens=100, too_long="drop")((0, 1, 2))) == 1
    whole, cut = GroupEncoder(conversations, processor, max_tokens=100, too_long="truncate")((0, 1, 2))
    assert isinstance(whole, Encoded) and isinstance(cut, Encoded)
    assert cut.input_ids.tolist() == whole.input_ids.tolist()
    assert cut.labels.tolist() == whole.labels.tolist()
    assert cut.num_truncated > 60
    assert whole.num_truncated == 0


def test_a_conversation_that_just_fits_is_kept_and_one_token_less_cuts_it(processor: Processor) -> None:
    messages = tuple(Message(role, (Text(text),)) for role, text in (("user", "why"), ("assistant", "so")) * 3)
    conversation = Conversation(messages, "a.json:1")
    shorter = replace(conversation, messages=messages[:4])
    whole, two = (processor.encode(one, images=[]) for one in (conversation, shorter))
    for limit in (len(two.input_ids), len(whole.input_ids) - 1):
        cut = truncate(conversation, [], processor, max_tokens=limit, whole=whole)
        assert cut.input_ids.tolist() == two.input_ids.tolist()
    assert len(truncate(conversation, [], processor, max_tokens=len(two.input_ids) - 1, whole=whole).input_ids) < len(
        two.input_ids
    )


turns = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(turns=turns, limit=st.integers(8, 160), system=st.booleans(), skipped=st.sets(st.integers(0, 5)))
def test_truncation_keeps_whole_turns_and_pictures_and_always_something_to_learn(
    turns: list[tuple[int, int, int]], limit: int, system: bool, skipped: set[int]
) -> None:
    processor = build_processor()
    messages = [Message("system", (Text("Be brief."),))] if system else []
    for number, (pictures, question, answer) in enumerate(turns):
        shown = [Image(PIL.new("RGB", (8, 8), (number, place, 0))) for place in range(pictures)]
        messages.append(Message("user", (*shown, Text("why " * question))))
        messages.append(Message("assistant", (Text("so " * answer),), supervised=number not in skipped))
    conversation = Conversation(tuple(messages), "a.json:1")
    images = [processor.prepare_image(image) for image in conversation.images]
    whole = processor.encode(conversation, images=images)
    # The oracle tries every number of whole exchanges, the longest first.
    begin = 1 if system else 0
    expected = None
    for exchanges in range(len(turns), 0, -1):
        shorter = replace(conversation, messages=conversation.messages[: begin + 2 * exchanges])
        encoded = processor.encode(shorter, images=images[: len(shorter.images)])
        if len(encoded.input_ids) <= limit:
            expected = encoded if encoded.num_answer_tokens else None
            break
    if expected is None:
        with pytest.raises(ContextLengthError, match=r"a.json:1: \d+ tokens; no answer of it fits in"):
            truncate(conversation, images, processor, max_tokens=limit, whole=whole)
        return
    cut = truncate(conversation, images, processor, max_tokens=limit, whole=whole)
    assert cut.input_ids.tolist() == expected.input_ids.tolist()
    assert cut.labels.tolist() == expected.labels.tolist()
    assert len(cut.input_ids) <= limit
    assert (cut.labels != IGNORE_LABEL).any()
    assert int((cut.input_ids == processor.image_token_id).sum()) == 4 * len(cut.image_sizes)
    assert len(cut.pixel_values) == sum(cut.tiles_per_image)
    assert cut.num_truncated == len(whole.input_ids) - len(cut.input_ids)
