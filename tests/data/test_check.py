"""`data check`: every problem found in one pass, each with its place and its way out."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.data.bad_samples import BadSample
from llava.data.check import CheckLimits, Report, Sharing, check_conversations
from llava.data.check_findings import KINDS
from llava.data.encoding import GroupEncoder
from llava.data.mixture import SourceSpec, open_sources
from llava.data.packing import grow_trees
from llava.data.sources import ConversationSet, read_conversations
from llava.prompt.images import ImageSettings
from llava.prompt.processor import Processor
from llava.prompt.tokenizer import load_tokenizer

TURNS = [{"from": "human", "value": "Colour?"}, {"from": "gpt", "value": "Red."}]
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


def write_hostile(folder: Path) -> None:
    """Pictures that must not open, and one of a single pixel."""
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "truncated.jpg")
    whole = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "empty.jpg").write_bytes(b"")
    Image.new("L", (2010, 10)).save(folder / "thin.png")
    Image.new("L", (9000, 9000)).save(folder / "bomb.png")
    Image.new("L", (1, 1)).save(folder / "one.png")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")


def check(path: Path, processor: Processor | None = None, **limits: Any) -> Report:
    return check_conversations(
        ConversationSet([read_conversations(path)]), processor=processor, limits=CheckLimits(**limits)
    )


def kinds(report: Report) -> list[str]:
    return [kind for kind, _ in report.log.by_kind()]


def findings(report: Report) -> list[dict[str, Any]]:
    return [json.loads(line) for line in report.log.lines()]


def test_a_good_data_set_has_no_problems_and_is_counted(tmp_path: Path, processor: Processor) -> None:
    report = check(write(tmp_path, record(), record(question="Which?"), record(image=None)), processor)
    assert report.ok
    summary = report.summary()
    assert (summary["records"], summary["turns"]["all"], summary["text_only"]) == (3, 6, 1)
    assert summary["pictures"] == {"distinct": 1, "mentions": 2, "opened": 1}
    assert summary["turns"]["by_role"] == {"user": 3, "assistant": 3}
    assert summary["tokens"]["supervised"] > 0
    assert list(report.log.lines()) == []


BAD: list[tuple[object, str, str]] = [
    (record("missing.png"), "missing picture", "missing.png: no such file; fix the path"),
    (record("broken.png"), "unreadable picture", "broken.png"),
    (record("truncated.jpg"), "unreadable picture", "truncated.jpg: damaged"),
    (record("page.jpg"), "not a picture", "page.jpg: not a JPEG"),
    (record("empty.jpg"), "not a picture", "empty.jpg: empty"),
    (record("thin.png"), "picture too large", "ratio may be 200 to 1"),
    (record("bomb.png"), "picture too large", "make it smaller"),
    (record("folder"), "unreadable picture", "not a regular file"),
    (record("pipe"), "unreadable picture", "not a regular file"),
    (record("../good.png"), "escaping path", "leaves the image folder"),
    (record("/etc/passwd"), "escaping path", "leaves the image folder"),
    (record(answer=" "), "empty answer", "turn 2: an answer is empty"),
    ({"conversations": [{"from": "human", "value": " "}, TURNS[1]]}, "empty question", "turn 1: neither words nor"),
    ({"conversations": [{"from": "human", "value": "Hello"}]}, "nothing to learn", "no answer in it"),
    ({"conversations": [{"from": "alien", "value": "Hello"}]}, "roles", "alien"),
    ({"conversations": [{"from": "human", "value": "a"}] * 2}, "roles", "turns must alternate"),
    ({"image": "good.png", "conversations": [{"from": "human", "value": "no mark"}]}, "marks and pictures", "but 0"),
    (record(question="<image> <image>"), "marks and pictures", "1 picture but 3 <image>"),
    ({}, "malformed record", "conversations"),
    ([1], "malformed record", "must be an object"),
    (record(answer="long " * 60), "too long", "(4 of them pictures), over 100"),
]


@pytest.mark.parametrize(("bad", "kind", "says"), BAD, ids=[f"{kind}-{says}" for _, kind, says in BAD])
def test_each_error_is_named_with_its_file_line_and_kind(
    tmp_path: Path, processor: Processor, bad: object, kind: str, says: str
) -> None:
    path = write(tmp_path, record(), bad, record(question="Which?"))
    write_hostile(tmp_path)
    report = check(path, processor, max_tokens=100)
    assert kinds(report) == [kind]
    (entry,) = findings(report)
    assert (entry["file"], entry["line"], entry["record"]) == (str(path), 2, 1)
    assert entry["severity"] == "error"
    assert says in entry["message"]
    assert report.num_bad == 1
    assert report.stops_a_run == (kind == "too long"), "one of three is forgiven, as it is in a run"


ODD: list[tuple[object, str]] = [
    ({"conversations": [{"from": "gpt", "value": "I start."}, *TURNS]}, "opens with an answer"),
    ({"conversations": [*TURNS, {"from": "human", "value": "And?"}]}, "ends with a question"),
    ({"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]}, "mark in words"),
    (record("one.png"), "tiny picture"),
    (record(), "duplicate"),
]


@pytest.mark.parametrize(("odd", "kind"), ODD, ids=[kind for _, kind in ODD])
def test_what_is_odd_is_a_warning_and_no_conversation_is_lost(
    tmp_path: Path, processor: Processor, odd: object, kind: str
) -> None:
    path = write(tmp_path, record(), odd)
    write_hostile(tmp_path)
    report = check(path, processor)
    assert kinds(report) == [kind]
    assert report.ok
    assert report.num_bad == 0
    assert [(entry["severity"], entry["line"]) for entry in findings(report)] == [("warning", 2)]


def test_a_web_address_is_named_whether_it_is_refused_or_cannot_be_fetched(tmp_path: Path) -> None:
    path = write(tmp_path, record("https://example.org/a.jpg"), record("http://127.0.0.1/a.jpg"))
    refused = check(path)
    assert dict(refused.log.by_kind()) == {"web address": 2}
    assert "data.allow_urls" in findings(refused)[0]["message"]
    fetched = check_conversations(
        open_sources([SourceSpec(str(write(tmp_path, record("http://127.0.0.1/a.jpg"))))], allow_urls=True)
    )
    assert dict(fetched.log.by_kind()) == {"web address": 1}
    assert "not a public address" in findings(fetched)[0]["message"]


def test_every_kind_of_finding_is_tested() -> None:
    others = {"web address", "does not fit the template", "left out", "cut"}
    assert {kind for _, kind, _ in BAD} | {kind for _, kind in ODD} | others == set(KINDS)


def test_nothing_stops_at_the_first_problem_and_each_record_is_listed(tmp_path: Path) -> None:
    report = check(write(tmp_path, record("missing.png"), {}, record("missing.png"), record("broken.png")))
    listed = [(entry["line"], entry["kind"]) for entry in findings(report)]
    assert listed == [
        (1, "missing picture"),
        (2, "malformed record"),
        (3, "missing picture"),
        (3, "duplicate"),
        (4, "unreadable picture"),
    ]


def test_a_picture_is_decoded_once_however_often_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.data import check as module

    looked: list[object] = []
    look = module.look_at

    def counting(image: Any, **how: Any) -> Any:
        looked.append(image.source)
        return look(image, **how)

    monkeypatch.setattr(module, "look_at", counting)
    report = check(write(tmp_path, *[record(question=f"Number {n}?") for n in range(30)]), conversations_per_tree=4)
    assert len(looked) == 1
    assert report.sharing == Sharing(30, 8, None, None), "eight groups of at most four"


def test_headers_alone_miss_a_truncated_picture_and_say_sizes_all_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, record("truncated.jpg"))
    write_hostile(tmp_path)
    conversations = ConversationSet([read_conversations(path)])
    report = check_conversations(conversations, decode=False)
    assert report.ok
    assert list(report.widths) == list(report.heights) == [64]


def test_sharing_is_counted_with_the_trees_that_a_run_grows(tmp_path: Path, processor: Processor) -> None:
    shown = [record(question=f"Number {n}?") for n in range(5)]
    path = write(tmp_path, *shown, record(image=None), record("missing.png"), record(answer="long " * 60))
    report = check(path, processor, max_tokens=100, too_long="drop")
    conversations = ConversationSet([read_conversations(path)])
    alone = [processor.encode(conversations[n]) for n in range(6)]
    trees = grow_trees(alone[:5], image_token_id=processor.image_token_id, max_tokens=4096)
    shared = sum(tree.num_tokens for tree in trees) + len(alone[5].input_ids)
    total = sum(len(one.input_ids) for one in alone)
    assert report.sharing == Sharing(5, 1, total, shared)
    assert shared < total
    assert dict(report.log.by_kind()) == {"missing picture": 1, "left out": 1}


def test_a_cut_conversation_counts_with_what_is_left(tmp_path: Path, processor: Processor) -> None:
    two_turns = record()["conversations"]
    assert isinstance(two_turns, list)
    long = {**record(), "conversations": [*two_turns, {"from": "human", "value": "long " * 60}, two_turns[1]]}
    path = write(tmp_path, long)
    report = check(path, processor, max_tokens=100, too_long="truncate")
    assert kinds(report) == ["cut"]
    first = {**long, "conversations": two_turns}
    kept = processor.encode(read_conversations(write(tmp_path, first))[0])
    assert report.sharing == Sharing(1, 1, len(kept.input_ids), len(kept.input_ids))


def test_what_the_check_calls_an_error_is_what_a_run_leaves_out(tmp_path: Path, processor: Processor) -> None:
    path = write(tmp_path, *[bad for bad, kind, _ in BAD if kind != "too long"], *[odd for odd, _ in ODD])
    write_hostile(tmp_path)
    conversations = ConversationSet([read_conversations(path)])
    report = check_conversations(conversations, processor=processor)
    encode = GroupEncoder(conversations, processor, max_tokens=2048)
    left_out = [number for number in range(len(conversations)) if isinstance(encode((number,))[0], BadSample)]
    assert left_out == np.flatnonzero(report.bad).tolist()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ROLES = st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool"])
WORDS = st.sampled_from(["<image>\nWhat?", "Red.", "", " ", "\ud800", "<image><image>"]) | JSON
TURN = st.fixed_dictionaries({"from": ROLES, "value": WORDS}) | st.fixed_dictionaries({"role": ROLES, "content": WORDS})
NAMES = st.sampled_from(
    ["good.png", "broken.png", "nowhere.png", "../x", "", "\ud800", "a\0b", "data:,x", "https://x/y"]
)
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "image": NAMES | st.lists(NAMES, max_size=2) | JSON,
        "images": st.lists(NAMES, max_size=2) | JSON,
        "conversations": st.lists(TURN, max_size=4) | JSON,
        "messages": st.lists(TURN, max_size=4) | JSON,
        "system": JSON,
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(RECORDS | JSON, min_size=1, max_size=8))
def test_whatever_the_records_are_the_check_ends_and_agrees_with_a_run(
    tmp_path: Path, processor: Processor, records: list[Any]
) -> None:
    conversations = ConversationSet([read_conversations(write(tmp_path, record(), *records))])
    report = check_conversations(conversations, processor=processor)
    encode = GroupEncoder(conversations, processor, max_tokens=2048)
    left_out = [number for number in range(len(conversations)) if isinstance(encode((number,))[0], BadSample)]
    assert left_out == np.flatnonzero(report.bad).tolist()
    for entry in findings(report):
        assert entry["line"] == entry["record"] + 1


def test_more_errors_than_are_forgiven_stop_a_run(tmp_path: Path) -> None:
    good = [record(question=f"Number {n}?") for n in range(95)]
    assert not check(write(tmp_path, *good, *[{}] * 10)).stops_a_run
    assert check(write(tmp_path, *good, *[{}] * 11)).stops_a_run


def test_what_a_template_cannot_hold_is_named(tmp_path: Path, processor: Processor) -> None:
    report = check(write(tmp_path, record(), record(image=None)), processor.with_template("plain"))
    assert kinds(report) == ["does not fit the template"]
    assert "takes one picture and its caption" in findings(report)[0]["message"]


def test_each_source_has_figures_of_its_own(tmp_path: Path, processor: Processor) -> None:
    first = write(tmp_path, record(), {}, record(question="Which?"))
    second = tmp_path / "second.jsonl"
    second.write_text(json.dumps(record(image=None)))
    report = check_conversations(
        ConversationSet([read_conversations(first), read_conversations(second)]), processor=processor
    )
    one, two = report.by_file()
    assert (one["file"], one["records"], one["bad_records"], one["picture_mentions"]) == (str(first), 3, 1, 2)
    assert (two["file"], two["records"], two["bad_records"], two["picture_mentions"]) == (str(second), 1, 0, 0)
    assert one["tokens"] + two["tokens"] == report.summary()["tokens"]["all"]
    assert one["supervised"] + two["supervised"] == report.summary()["tokens"]["supervised"]


def test_the_limits_are_those_of_a_recipe() -> None:
    from llava.train.sections import DataSection, OptimSection

    here = {key: value for key, value in vars(CheckLimits()).items() if key != "batch_conversations"}
    data = DataSection(files=["mix.json"])
    assert here == {key: getattr(data, key) for key in here}
    assert CheckLimits().batch_conversations == OptimSection(learning_rate=1e-3).batch_conversations


def test_the_json_holds_figures_and_every_finding(tmp_path: Path) -> None:
    report = check(write(tmp_path, record(), *[{} for _ in range(100)]))
    report.log.write_json(tmp_path / "check.json", report.summary())
    written = json.loads((tmp_path / "check.json").read_text())
    assert written["records"] == 101
    assert written["kinds"] == {"malformed record": 100}
    assert [entry["line"] for entry in written["findings"]] == list(range(2, 102))
    assert not list(tmp_path.glob("*.partial"))
