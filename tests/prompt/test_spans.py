"""Token ids and labels against every recorded training sample of the original, and the list of where ours differ."""

from collections import defaultdict
from typing import Any

import pytest

from llava.errors import PromptError
from llava.prompt.chat_template import Segment
from llava.prompt.conversation import Conversation, Image, Message, Text
from llava.prompt.spans import IMAGE_SLOT, Tokens, tokenize
from llava.prompt.templates import TEMPLATES
from tests.prompt.prompt_recordings import (
    GOLDEN,
    TEMPLATE_OF_VERSION,
    conversation_of,
    open_tokenizer,
    read,
    tokenizer_of,
    training_file,
    training_files,
)

IGNORE = -100
# Every class of difference: why ours is right is said in docs/differences.md under the same name.
ID_DIFFERENCES = {"two-pictures-in-one-message", "special-tokens-in-words"}
LABEL_DIFFERENCES = ID_DIFFERENCES | {
    "chatml-all-masked",
    "v0-drift",
    "unanswered-last-turn",
    "empty-answers-in-chatml",
    "separator-in-answer",
}


def cases() -> list[tuple[str, str]]:
    return [(name, case) for name in training_files() for case in training_file(name)["cases"]]


def run(name: str, case: dict[str, Any], **changes: Any) -> Tokens:
    recorded = training_file(name)
    version = recorded["version"]
    start_end = recorded["mm_use_im_start_end"]
    tokenizer = tokenizer_of(recorded["tokenizer"], version, start_end)
    template = TEMPLATES[TEMPLATE_OF_VERSION.get(version, version)]
    conversation = conversation_of(case, one_image=changes.pop("one_image", False))
    segments = template.render(conversation, open_turn=False, start_end_tokens=start_end)
    return tokenize(segments, tokenizer, **changes)


def labels_of(tokens: Tokens) -> list[int]:
    return [token if on else IGNORE for token, on in zip(tokens.ids, tokens.supervised, strict=True)]


def specials_in_words(name: str, case: dict[str, Any]) -> bool:
    recorded = training_file(name)
    tokenizer = tokenizer_of(recorded["tokenizer"], recorded["version"], recorded["mm_use_im_start_end"])
    words = [turn["value"].replace("<image>", "") for turn in case["conversations"]]
    return any(isinstance(piece, int) for text in words for piece in tokenizer.split_markup(text))


def difference_of(name: str, label: str, case: dict[str, Any]) -> str | None:
    """The class of difference that a recorded case falls into, None where everything has to be equal."""
    version = training_file(name)["version"]
    chatml = version in ("mpt", "chatml_direct", "mistral_direct")
    if label == "two_images":
        return "two-pictures-in-one-message"
    if specials_in_words(name, case):
        return "special-tokens-in-words"
    if version in ("llava_v0", "v0_mmtag"):
        return "v0-drift"
    if chatml and not name.startswith("v1.1.1code"):
        return "chatml-all-masked"
    if label == "odd_messages":
        return "unanswered-last-turn"
    if chatml and label.startswith("empty_answer"):
        return "empty-answers-in-chatml"
    if label == "answer_contains_sep" and case["warning"]:
        return "separator-in-answer"
    return None


@pytest.mark.parametrize("name", training_files())
def test_ids_equal_the_originals_once_its_two_habits_are_asked_for(name: str) -> None:
    # Its habits: special tokens in words are obeyed, and two pictures in a message become one.
    for label, case in training_file(name)["cases"].items():
        if "error" in case:
            continue
        assert run(name, case, parse_specials_in_text=True, one_image=True).ids == case["input_ids"], label


@pytest.mark.parametrize("name", training_files())
def test_ids_and_labels_equal_the_originals_outside_the_listed_differences(name: str) -> None:
    for label, case in training_file(name)["cases"].items():
        if "error" in case:
            continue
        tokens = run(name, case)
        difference = difference_of(name, label, case)
        if difference not in ID_DIFFERENCES:
            assert tokens.ids == case["input_ids"], label
        if difference is None:
            assert labels_of(tokens) == case["labels"], label
        else:
            assert difference in LABEL_DIFFERENCES


def test_every_listed_difference_occurs_and_is_explained() -> None:
    found = defaultdict(int)
    for name, label in cases():
        case = training_file(name)["cases"][label]
        if "error" in case or (difference := difference_of(name, label, case)) is None:
            continue
        tokens = run(name, case)
        if tokens.ids != case["input_ids"] or labels_of(tokens) != case["labels"]:
            found[difference] += 1
    # The recorded separator comes with a special token in it; on its own it has a test below.
    assert set(found) == LABEL_DIFFERENCES - {"separator-in-answer"}
    explained = (GOLDEN.parent.parent.parent / "docs" / "differences.md").read_text(encoding="utf-8")
    assert [name for name in sorted(LABEL_DIFFERENCES) if f"### {name}" not in explained] == []


@pytest.mark.parametrize("name", training_files())
def test_what_is_supervised_is_each_answer_with_its_end_and_nothing_else(name: str) -> None:
    recorded = training_file(name)
    template = TEMPLATES[TEMPLATE_OF_VERSION.get(recorded["version"], recorded["version"])]
    for label, case in recorded["cases"].items():
        if "error" in case:
            continue
        tokenizer = tokenizer_of(recorded["tokenizer"], recorded["version"], recorded["mm_use_im_start_end"])
        tokens = run(name, case)
        spans = spans_of(tokens)
        turns = case["conversations"]
        if template.drops_leading_answer and turns[0]["from"] == "gpt":
            turns = turns[1:]
        answers = [turn["value"] for turn in turns if turn["from"] == "gpt"]
        if template.empty_is_open:
            answers = [answer for answer in answers if answer]
        expected = [template.answer_lead + answer + template.answer_suffix for answer in answers]
        # A span's first piece may carry the blank that a tokenizer puts before a run; the words decide.
        texts = [tokenizer.decode(span, skip_special=False) for span in spans]
        assert [text.strip(" ") for text in texts] == [text.strip(" ") for text in expected], label


def test_the_chatml_rule_equals_that_of_the_originals_earlier_version() -> None:
    for start_end in (0, 1):
        right = training_file(f"v1.1.1code__mpt__mpt__startend{start_end}.json")
        for label, case in right["cases"].items():
            if difference_of(f"v1.1.1code__mpt__mpt__startend{start_end}.json", label, case) is None:
                assert labels_of(run(f"mpt__mpt__startend{start_end}__max2048.json", case)) == case["labels"], label


def spans_of(tokens: Tokens) -> list[list[int]]:
    spans: list[list[int]] = []
    before = False
    for token, on in zip(tokens.ids, tokens.supervised, strict=True):
        if on:
            if not before:
                spans.append([])
            spans[-1].append(token)
        before = on
    return spans


@pytest.mark.parametrize("name", ["llama_legacy", "llama_nonlegacy", "mpt"])
def test_prompts_with_image_marks_give_the_originals_ids(name: str) -> None:
    tokenizer = open_tokenizer(name)
    for case in read("h_text/tokenizer_image_token.json")[name]:
        segments = [Segment("image")] * 0
        for number, chunk in enumerate(case["prompt"].split("<image>")):
            segments += [Segment("image")] * (number > 0) + [Segment("markup", chunk)] * bool(chunk)
        assert tokenize(segments, tokenizer).ids == case["ids"], case["prompt"]


def test_a_picture_in_an_answer_is_never_supervised() -> None:
    tokenizer = open_tokenizer("llama_legacy")
    answer = Message("assistant", (Text("here "), Image(b""), Text(" it is")))
    conversation = Conversation((Message("user", (Text("show"),)), answer))
    tokens = tokenize(TEMPLATES["vicuna_v1"].render(conversation, open_turn=False), tokenizer)
    assert tokens.supervised[tokens.ids.index(IMAGE_SLOT)] is False
    assert sum(tokens.supervised) > 3


def test_an_unsupervised_answer_is_masked_and_the_others_are_not() -> None:
    tokenizer = open_tokenizer("llama_legacy")
    turns = [Message("user", (Text("a"),)), Message("assistant", (Text("one"),), supervised=False)]
    turns += [Message("user", (Text("b"),)), Message("assistant", (Text("two"),))]
    tokens = tokenize(TEMPLATES["vicuna_v1"].render(Conversation(tuple(turns)), open_turn=False), tokenizer)
    assert [tokenizer.decode(span).strip() for span in spans_of(tokens)] == ["two"]


def test_a_template_that_needs_bos_says_so_when_the_tokenizer_has_none() -> None:
    tokenizer = open_tokenizer("mpt")
    tokenizer.config.pop("bos_token")
    tokenizer._special_tokens_map.pop("bos_token", None)
    with pytest.raises(PromptError, match="needs a bos token"):
        tokenize([Segment("bos")], tokenizer)


def test_xtuner_turns_are_tokenized_apart_with_bos_again_after_eos() -> None:
    tokenizer = open_tokenizer("llama_legacy")
    turns = [Message("user", (Text("hi"),)), Message("assistant", (Text("ok"),))] * 2
    tokens = tokenize(TEMPLATES["xtuner_vicuna"].render(Conversation(tuple(turns)), open_turn=False), tokenizer)
    prompt, answer, separator = (tokenizer.encode(text) for text in ("USER: hi ASSISTANT:", "ok", "\n"))
    turn = [1, *prompt, *answer, 2, *separator]
    assert tokens.ids == turn * 2
    assert [tokenizer.decode(span, skip_special=False) for span in spans_of(tokens)] == ["ok</s>"] * 2


@pytest.mark.parametrize("name", ["vicuna_v1", "llama_2", "mpt", "llava_v0_training"])
def test_a_separator_inside_an_answer_masks_nothing(name: str) -> None:
    tokenizer = open_tokenizer("llama_legacy")
    words = "He said ASSISTANT: hello ### done [/INST] x <|im_end|> end"
    conversation = Conversation((Message("user", (Text("q"),)), Message("assistant", (Text(words),))))
    (span,) = spans_of(tokenize(TEMPLATES[name].render(conversation, open_turn=False), tokenizer))
    assert words in tokenizer.decode(span, skip_special=False)
