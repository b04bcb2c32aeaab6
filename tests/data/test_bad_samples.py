"""Bad samples: counted once each, listed, capped, the same after a resume; what is known at the start is said."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llava.data.bad_samples import BadSample, BadSamples, allowed, refuse_unusable
from llava.data.encoding import GroupEncoder
from llava.data.loader import GlobalStep, Layout, Loader, StepPlan
from llava.data.sources import ConversationSet, read_conversations
from llava.errors import DataError
from llava.prompt.processor import IGNORE_LABEL, Encoded
from tests.data.tiny_processor import build_processor, record, write_lines, write_pictures

LAYOUT = Layout(tree_tokens=32, row_tokens=32, micro_batch_tokens=96, image_token_id=9, pad_token_id=0)


def bad(number: int) -> BadSample:
    return BadSample.of(number, f"a.json:{number}", f"a.json:{number}: broken")


def encode(group: Sequence[int]) -> list[Encoded | BadSample]:
    """Every fifth conversation is bad."""
    ids = [np.array([1, 100 + n, 100 + n]) for n in group]
    labels = [np.where(np.arange(3) == 2, one, IGNORE_LABEL) for one in ids]
    return [bad(n) if n % 5 == 0 else Encoded(one, label) for n, one, label in zip(group, ids, labels, strict=True)]


def make_loader(path: Path | None, *, count: int = 20, epochs: float = 2.0, **options: int) -> Loader:
    plan = StepPlan([(n,) for n in range(count)], 4, 7, epochs=epochs)
    ledger = BadSamples(max_share=0.5, conversations=count, path=path)
    return Loader(plan, encode, layout=LAYOUT, bad_samples=ledger, **options)


def targets(steps: Sequence[GlobalStep]) -> list[list[int]]:
    return [sorted(t for batch in step.micro_batches for t in batch.targets.tolist()) for step in steps]


def listed(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_leave_their_places_empty_and_move_nothing_else(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "run" / "bad_samples.jsonl"
    loader = make_loader(path, workers=workers)
    steps = list(loader)
    for step, found in zip(steps, targets(steps), strict=True):
        assert sorted(n for n in step.conversations if n % 5) == [t - 100 for t in found]
        assert sorted(one.number for one in step.bad) == sorted(n for n in step.conversations if n % 5 == 0)
        assert step.dropped == 0
    assert sorted(one.number for one in loader.bad_samples) == [0, 5, 10, 15]
    assert sorted(line["origin"] for line in listed(path)) == ["a.json:0", "a.json:10", "a.json:15", "a.json:5"]
    assert {line["reason"] for line in listed(path)} == {"broken"}


@pytest.mark.parametrize("stop", range(1, 10))
def test_the_count_and_the_list_survive_a_resume(tmp_path: Path, stop: int) -> None:
    whole = make_loader(tmp_path / "whole.jsonl")
    expected = targets(list(whole))
    path = tmp_path / "bad_samples.jsonl"
    first = make_loader(path)
    steps = iter(first)
    begun = [next(steps) for _ in range(stop)]
    state = json.loads(json.dumps(first.state_dict()))
    for _ in steps:  # the run goes on, but is killed before it saves again
        pass
    second = make_loader(path)
    second.load_state_dict(state)
    rest = list(second)
    assert targets(begun) + targets(rest) == expected
    assert listed(path) == listed(tmp_path / "whole.jsonl")
    assert second.state_dict() == whole.state_dict()


def test_a_new_run_drops_the_list_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    path.write_text("old\n")
    loader = make_loader(path)
    next(iter(loader))
    assert "old" not in (path.read_text() if path.exists() else "")


def test_processes_leave_out_the_same_samples_as_one_alone(tmp_path: Path) -> None:
    alone = list(make_loader(None))
    shares = [list(make_loader(None, rank=rank, world_size=2)) for rank in (0, 1)]
    for step, one, other in zip(alone, *shares, strict=True):
        assert step.conversations == one.conversations == other.conversations
        assert {b.number for b in step.bad} == {b.number for b in (*one.bad, *other.bad)}
        assert sorted(targets([one])[0] + targets([other])[0]) == targets([step])[0]


def test_above_the_cap_the_run_stops_and_names_the_first(tmp_path: Path) -> None:
    ledger = BadSamples(max_share=0.01, conversations=10_000, path=tmp_path / "bad.jsonl")
    for number in range(10):
        ledger.note([bad(number)], seen=1)
    with pytest.raises(DataError, match=r"11 of the 500 conversations read so far .*max_bad_share=0.01") as caught:
        ledger.note([bad(10)], seen=490)
    assert "a.json:0: broken; a.json:1: broken; a.json:2: broken; all are listed in" in str(caught.value)
    assert len(listed(tmp_path / "bad.jsonl")) == 11


def test_the_cap_counts_a_sample_once_however_many_epochs_meet_it() -> None:
    ledger = BadSamples(max_share=0.01, conversations=100)
    for _ in range(50):
        ledger.note([bad(number) for number in range(10)], seen=100)
    assert len(ledger) == 10


def test_no_bad_sample_is_forgiven_when_the_share_is_zero() -> None:
    with pytest.raises(DataError, match="1 of the 4 conversations"):
        BadSamples(max_share=0.0, conversations=1000).note([bad(3)], seen=4)


@pytest.mark.parametrize(
    ("share", "seen", "conversations", "expected"),
    [
        (0.001, 1, 10**6, 10),
        (0.001, 10**5, 10**6, 100),
        (0.0, 10**6, 10**6, 0),
        (0.001, 30, 30, 3),
        (0.001, 1, 1, 0),
        (1.0, 30, 30, 30),
    ],
)
def test_the_share_has_a_floor(share: float, seen: int, conversations: int, expected: int) -> None:
    assert allowed(share, seen=seen, conversations=conversations) == expected


def test_a_list_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        BadSamples(max_share=1.0, conversations=9, path=tmp_path / "file" / "bad.jsonl").note([bad(1)], seen=1)
    assert "cannot be written" in caplog.text


def open_lines(folder: Path, *records: object) -> ConversationSet:
    write_pictures(folder)
    return ConversationSet([read_conversations(write_lines(folder / "mix.jsonl", *records))])


def test_missing_pictures_are_counted_before_anything_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = open_lines(tmp_path, record("missing.png"), *[record()] * 19)
    with caplog.at_level(logging.WARNING):
        refuse_unusable(few, max_share=0.001)
    assert "1 of 20 conversations cannot be used" in caplog.text
    assert f"picture 'missing.png' is not in {tmp_path}" in caplog.text
    many = open_lines(tmp_path, *[record(f"{n}.png") for n in range(5)], *[record()] * 15)
    with pytest.raises(DataError, match=r"5 of 20 conversations cannot be used.*max_bad_share=0.001") as caught:
        refuse_unusable(many, max_share=0.001)
    assert [f"'{n}.png'" in str(caught.value) for n in range(5)] == [True, True, True, False, False]
    refuse_unusable(many, max_share=0.25)


def test_a_whole_corpus_of_bad_samples_is_listed_to_the_last(tmp_path: Path) -> None:
    ways = [
        record("missing.png"), record("broken.png"), record("../good.png"), record("/etc/passwd"), record("https://x.org/a"),
        record("data:image/png;base64,!"), record("data:image/png;base64,AAAA"), record(None, ("", "Hello.")),
        record(None, ("Hello?", "")), {}, [], 3, None, "text", {"conversations": None}, {"conversations": []},
        {"conversations": [{"from": "human"}]}, {"conversations": [{"value": "x"}]}, {"conversations": [[1, 2]]},
        {"conversations": [["a"]]}, {"conversations": [{"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "human", "value": "\ud800"}, {"from": "gpt", "value": "b"}]},
        {**record(), "image": 3}, {**record(), "image": ["good.png", "other.png"]}, {**record(), "image": None},
        {**record(), "image": {"path": 3}}, {"messages": []}, {"messages": "x"}, {"messages": [1]},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        {**record(), "videos": ["a.mp4"], "images": ["good.png"]},
    ]  # fmt: skip
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("<html>")
    ways += [record("empty.png"), record("text.png"), record(".")]
    conversations = open_lines(tmp_path, *[one for way in ways for one in (way, record())])
    expected = {2 * n for n in range(len(ways))}
    groups = conversations.group_by_picture(limit=4)
    encode = GroupEncoder(conversations, build_processor(), max_tokens=100)
    ledger = BadSamples(max_share=1.0, conversations=len(conversations), path=tmp_path / "bad.jsonl")
    loader = Loader(StepPlan(groups, 8, 0), encode, layout=LAYOUT, workers=2, bad_samples=ledger)
    steps = list(loader)
    assert sum(batch.num_conversations for step in steps for batch in step.micro_batches) == len(ways)
    assert {one.number for one in ledger} == expected
    assert {line["origin"] for line in listed(tmp_path / "bad.jsonl")} == {
        f"{tmp_path / 'mix.jsonl'}:{n + 1}" for n in expected
    }
