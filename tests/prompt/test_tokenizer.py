"""Both dialects against recorded ids, and the promise that no words become a special token."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import CheckpointError, PromptError
from llava.prompt.tokenizer import Tokenizer, load_tokenizer
from tests.prompt.prompt_recordings import GOLDEN, llama_like, open_tokenizer, read

RECORDED = read("h_text/raw_tokenize.json")
MARKS = ("<im_start>", "<im_end>")


@cache
def recorded_tokenizer(name: str) -> Tokenizer:
    if name.startswith("llama_fast"):  # transformers 4.37's fast class gives the legacy ids, whatever the flag
        name = "llama_legacy"
    return open_tokenizer(name, added=MARKS)


KINDS = ("llama_legacy", "llama_nonlegacy", "mpt", "fast:prepend", "fast:first", "fast:always")


@cache
def tokenizer(kind: str) -> Tokenizer:
    if kind.startswith("fast:"):
        return llama_like(prefix=kind.removeprefix("fast:"))
    return open_tokenizer(kind, added=("<image>", *MARKS))


@pytest.mark.parametrize("name", [name for name in RECORDED if name != "strings"])
def test_ids_equal_every_recorded_string(name: str) -> None:
    for text, ids in zip(RECORDED["strings"], RECORDED[name]["ids"], strict=True):
        assert recorded_tokenizer(name).encode_markup(text) == ids, text


@pytest.mark.parametrize("name", [name for name in RECORDED if name != "strings" and "fast" not in name])
def test_decoded_words_equal_the_recorded_ones_but_for_leading_blanks(name: str) -> None:
    # transformers 4 swallows blanks that somebody typed first; they are words like others here.
    for ids, text in zip(RECORDED[name]["ids"], RECORDED[name]["decode_skip_special"], strict=True):
        assert recorded_tokenizer(name).decode(ids).lstrip(" ") == text.lstrip(" ")


NOT_BLANK_FIRST = [text for text in RECORDED["strings"] if not text.startswith((" ", "▁"))]
SPECIALS = ("</s>", "<s>", "<unk>", "<image>", "<im_start>", "<|im_end|>", "<|endoftext|>", "<|end|>", "[INST]")
words = st.lists(
    st.one_of(
        st.sampled_from(SPECIALS),
        st.sampled_from((" ", "  ", "\n", "USER:", "ASSISTANT:", "<", "s>", "</", "é", "图", "🙂", "<0x41>")),
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁"), max_size=6),
    ),
    max_size=8,
).map("".join)


def shown(kind: str, text: str) -> str:
    """What decoding gives back: the `tokenizers` library's Metaspace step swallows a first blank that was typed."""
    return text.removeprefix(" ") if kind in ("fast:first", "fast:always") else text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=words)
def test_words_never_give_a_special_token_and_decode_to_themselves(kind: str, text: str) -> None:
    subject = tokenizer(kind)
    for run in ("first", "after", "bare"):
        ids, starts = subject.encode_with_starts(text, kind=run)
        assert subject.special_ids.isdisjoint(ids)
        assert starts == sorted(starts)
        assert len(starts) == len(ids)
        assert all(0 <= start < len(text) for start in starts)
    assert subject.decode(subject.encode(text), skip_special=False) == shown(kind, text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=words, cut=st.integers(0, 20))
def test_starts_say_which_characters_a_token_stands_for(kind: str, text: str, cut: int) -> None:
    subject = tokenizer(kind)
    ids, starts = subject.encode_with_starts(text)
    if not 0 < cut < len(ids):
        return
    left = subject.decode(ids[:cut], skip_special=False)
    # A token may stand for a part of a character only (bytes): the broken end is left out of the comparison.
    if starts[cut] != starts[cut - 1] and "\ufffd" not in left:
        assert left == shown(kind, text[: starts[cut]])


@pytest.mark.parametrize("kind", KINDS)
def test_every_special_string_written_by_a_person_stays_words(kind: str) -> None:
    subject = tokenizer(kind)
    for token in subject.added_tokens:
        if subject.token_id(token) in subject.special_ids:
            for text in (token, f"a{token}b", f" {token} ", token * 3):
                assert subject.special_ids.isdisjoint(subject.encode(text)), text
                assert subject.decode(subject.encode(text), skip_special=False) == shown(kind, text)


def test_a_chat_mark_that_its_file_does_not_call_special_is_one_anyway() -> None:
    subject = tokenizer("fast:first")
    assert subject.token_id("<|end|>") in subject.special_ids
    assert subject.split_markup("a<|end|>\n") == ("a", subject.token_id("<|end|>"), "\n")


def test_many_special_strings_in_one_text_take_no_quadratic_time() -> None:
    text = "<|end|>" * 5000  # the worst: tokens that the library itself would parse
    ids = tokenizer("fast:first").encode(text)
    assert tokenizer("fast:first").special_ids.isdisjoint(ids)


@pytest.mark.parametrize(("prefix", "expected"), [("prepend", True), ("always", True), ("first", False)])
def test_text_after_a_special_token_gets_a_blank_only_where_the_file_says_so(prefix: str, expected: bool) -> None:
    subject = llama_like(prefix=prefix)
    whole = tokenizers.Tokenizer.from_str(json.dumps(subject._spec))
    text = "USER: a</s>USER: b"
    assert subject.encode_markup(text) == [*subject.prefix_ids, *whole.encode(text, add_special_tokens=False).ids]
    after = subject.encode_plain("USER", kind="after")
    assert (after == subject.encode_plain("USER", kind="first")) is expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same_again(kind: str, tmp_path: Path) -> None:
    subject = tokenizer(kind)
    subject.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.special_ids == subject.special_ids
    assert again.vocab_size == subject.vocab_size
    for text in RECORDED["strings"]:
        assert again.encode_markup(text) == subject.encode_markup(text)
        assert again.encode(text) == subject.encode(text)


@pytest.mark.parametrize("kind", ["fast:prepend", "fast:first", "mpt", "llama_legacy", "llama_nonlegacy"])
def test_a_saved_tokenizer_opens_in_transformers_with_equal_ids(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    subject = tokenizer(kind)
    subject.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = RECORDED["strings"] if kind != "llama_nonlegacy" else NOT_BLANK_FIRST
    for text in texts:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert subject.encode_markup(text) == [*subject.prefix_ids, *ids], text


def test_added_tokens_go_behind_the_vocabulary_and_are_found_again() -> None:
    subject = open_tokenizer("llama_legacy")
    size = subject.vocab_size
    assert subject.add_special_tokens(["<image>", "<im_start>"]) == [size, size + 1]
    assert subject.add_special_tokens(["<image>"]) == [size]
    assert subject.vocab_size == size + 2
    with pytest.raises(PromptError, match="no token '<nothing>'"):
        subject.token_id("<nothing>")


def test_a_folder_without_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looked for tokenizer\.json and tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(tmp_path)


def test_added_tokens_are_read_from_any_of_the_three_files(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "tokenizers" / "llama-tiny", tmp_path, dirs_exist_ok=True)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 480, "<im_patch>": 481}))
    special = json.loads((tmp_path / "special_tokens_map.json").read_text())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "[PAD]"}))
    subject = load_tokenizer(tmp_path)
    assert subject.pad_token_id == 480
    assert {480, 481} <= subject.special_ids
    assert subject.encode_markup("a<im_patch>")[-1] == 481


def test_an_unknown_character_is_the_unknown_token_even_when_that_pads() -> None:
    subject = llama_like(prefix="prepend")
    spec = json.loads(json.dumps(subject._spec))
    spec["model"]["byte_fallback"] = False
    config = {**subject.config, "pad_token": "<unk>"}
    without_bytes = type(subject)(spec, config, {})
    assert 0 in without_bytes.encode("图")
    assert open_tokenizer("mpt").unk_token_id in open_tokenizer("mpt").special_ids  # it ends answers there


def test_a_model_that_rewrites_characters_still_says_where_tokens_begin() -> None:
    import io

    import sentencepiece

    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["USER: what is it? ASSISTANT: one fish"] * 50),
        model_writer=stream,
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    from llava.prompt.tokenizer_sentencepiece import SentencePieceTokenizer

    subject = SentencePieceTokenizer(stream.getvalue(), {}, {})
    text = "ﬁsh: ①② what"  # a ligature and circled digits: NFKC makes other characters of them
    ids, starts = subject.encode_with_starts(text)
    assert len(ids) == len(starts)
    assert starts == sorted(starts)
    assert all(0 <= start < len(text) for start in starts)
    colon = subject.encode_plain(":", kind="bare")[-1]
    assert starts[ids.index(colon)] == text.index(":")


def test_a_sentencepiece_model_saved_for_other_engines_is_still_read_as_one(tmp_path: Path) -> None:
    subject = open_tokenizer("llama_nonlegacy", added=("<image>",))
    subject.save(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    again = load_tokenizer(tmp_path)
    assert type(again) is type(subject)
    again.save(tmp_path, portable=False)
    assert not (tmp_path / "tokenizer.json").exists()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    assert load_tokenizer(tmp_path).encode_markup("  a<image> b") == subject.encode_markup("  a<image> b")
