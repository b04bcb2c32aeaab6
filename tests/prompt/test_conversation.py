"""The parsers: every format in use gives the same conversation, and wrong records say where and what."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError, PromptError
from llava.prompt.conversation import (
    Conversation,
    Image,
    Message,
    Text,
    from_llava,
    from_openai,
    from_pairs,
    from_record,
    from_sharegpt,
)

CAT = Image(Path("cat.jpg"))
EXPECTED = Conversation(
    (
        Message("user", (CAT, Text("\nHow many cats?"))),
        Message("assistant", (Text("Two."),)),
        Message("user", (Text("Colours?"),)),
        Message("assistant", (Text("Grey."),)),
    ),
    "mix.json:17",
)
QUESTION = "<image>\nHow many cats?"
TURNS = [("human", QUESTION), ("gpt", "Two."), ("human", "Colours?"), ("gpt", "Grey.")]
LLAVA = {"id": "a1", "image": "cat.jpg", "conversations": [{"from": who, "value": text} for who, text in TURNS]}
PAIRS = {"image": "cat.jpg", "conversations": [[QUESTION, "Two."], ["Colours?", "Grey."]]}
SHAREGPT = {"images": ["cat.jpg"], "conversations": LLAVA["conversations"]}
SWIFT = {
    "images": ["cat.jpg"],
    "messages": [
        {"role": "user" if who == "human" else "assistant", "content": text} for who, text in TURNS
    ],
}  # fmt: skip
OPENAI = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "cat.jpg"}},
                {"type": "text", "text": "\nHow many cats?"},
            ],
        },
        *SWIFT["messages"][1:],
    ]
}


@pytest.mark.parametrize("record", [LLAVA, PAIRS, SHAREGPT, SWIFT, OPENAI])
def test_every_format_gives_the_same_conversation(record: dict[str, Any]) -> None:
    assert from_record(record, origin="mix.json:17") == EXPECTED


def test_pictures_go_where_their_marks_are() -> None:
    record = {"image": ["a", "b", "c"], "conversations": [{"from": "human", "value": "1<image>2<image><image>3"}]}
    (message,) = from_llava(record).messages
    a, b, c = (Image(Path(name)) for name in "abc")
    assert message.parts == (Text("1"), a, Text("2"), b, c, Text("3"))


@pytest.mark.parametrize("pictures", range(4))
@pytest.mark.parametrize("marks", range(4))
def test_pictures_and_marks_must_agree_and_an_error_names_both_counts(pictures: int, marks: int) -> None:
    record = {"image": ["p.png"] * pictures, "conversations": [["<image>" * marks + "q", "a"]]}
    if pictures == marks:
        assert len(from_pairs(record).images) == pictures
        return
    with pytest.raises(DataError, match=rf"f\.json:3: {pictures} pictures? but {marks} <image> in the text"):
        from_pairs(record, origin="f.json:3")


def test_a_mark_typed_in_a_chat_is_seven_characters() -> None:
    conversation = from_openai([{"role": "user", "content": "what is <image>?"}])
    assert conversation.messages[0].parts == (Text("what is <image>?"),)


def test_data_urls_become_bytes_and_paths_are_resolved() -> None:
    url = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
    part = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    assert from_openai([part]).images == (Image(b"pixels"),)
    assert from_llava({**LLAVA, "image": "x.png"}, resolve_image=lambda name: Path("/root") / name).images == (
        Image(Path("/root/x.png")),
    )
    broken = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,$$"}}]}
    with pytest.raises(PromptError, match=r"messages\[0\]: broken base64"):
        from_openai([broken])
    web = {"role": "user", "content": [{"type": "image_url", "image_url": "https://example.org/a.png"}]}
    with pytest.raises(PromptError, match="is a web address"):
        from_openai([web])


def test_a_swift_answer_without_loss_is_not_supervised() -> None:
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": False}]}
    assert from_record(record).messages[1].supervised is False


def test_a_system_text_is_a_message_of_its_own() -> None:
    conversation = from_sharegpt({**SHAREGPT, "system": "Be brief."})
    assert conversation.messages[0] == Message("system", (Text("Be brief."),))


def wrong(**changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(LLAVA)), **changes}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "a record must be an object, not list"),
        ({"id": 1}, "no 'conversations' in the record; found 'id'"),
        (wrong(conversations="hi"), "'conversations' must be a list"),
        (wrong(conversations=[]), "no turns"),
        (wrong(conversations=[{"from": "robot", "value": "x"}]), "unknown from 'robot'; known: system, human"),
        (wrong(conversations=[{"from": "human"}]), "'value' must be a string, not None"),
        (wrong(conversations=[{"from": "human", "value": "a"}] * 2, image=None), "turns 1 and 2 are both by the user"),
        (wrong(image=3), "'image' must be a path or a list of paths, not 3"),
        (wrong(image=[3]), "a picture must be a path"),
        (wrong(conversations=[["a"]]), r"conversations\[0\] must be a \[question, answer\] pair"),
        (wrong(conversations=[["a", 1]]), "assistant text must be a string"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\]: unknown role 'tool'"),
        ({"messages": [{"role": "user", "content": 1}]}, "content must be a string or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "unknown part type 'audio'"),
        ({"messages": [{"role": "user", "content": "x"}], "videos": ["v"]}, "'videos' are not supported"),
        ({"messages": []}, "no messages"),
        (wrong(conversations=[{"from": "human", "value": "a\ud800"}], image=None), "broken character at position 1"),
    ],
)
def test_a_wrong_record_says_where_and_what(record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        from_record(record, origin="mix.json:17")
    assert str(raised.value).startswith("mix.json:17: ")


def test_pictures_are_equal_by_path_and_bytes_and_otherwise_by_identity() -> None:
    import numpy as np

    array = np.zeros((2, 2, 3), np.uint8)
    assert Image(array) != Image(array.copy())
    assert Image(array) == Image(array)
    assert len({Image(b"a"), Image(b"a"), Image(Path("a"))}) == 2
