"""The VQA family's normalisers and soft accuracy, held to what the official code made of the same strings."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.eval.metrics.vqa import (
    CONTRACTIONS,
    PUNCTUATION,
    has_dot_limit,
    normalise_m4c,
    normalise_vqa,
    soft_accuracies,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"
STRINGS = json.loads((GOLDEN / "vqa_normalisers.json").read_text(encoding="utf-8"))
M4C = json.loads((GOLDEN / "m4c.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", STRINGS, ids=lambda case: repr(case["raw"])[:30])
def test_both_normalisers_make_of_a_string_what_the_official_ones_make(case: dict[str, str]) -> None:
    assert normalise_vqa(case["raw"]) == case["vqa_eval_normalised"]
    assert normalise_m4c(case["raw"]) == case["m4c_evalai_normalised"]


def test_the_m4c_normaliser_equals_the_originals_recordings() -> None:
    assert {raw: normalise_m4c(raw) for raw in M4C["evalai_processor"]} == M4C["evalai_processor"]


def test_soft_accuracy_equals_the_originals_recordings() -> None:
    scores = []
    for case in M4C["textvqa"]["cases"]:
        truths = [normalise_m4c(text) for text in case["gt_answers"]]
        scores.append(soft_accuracies(truths).get(normalise_m4c(case["pred_answer"]), 0.0))
    assert scores == pytest.approx(M4C["textvqa"]["per_case"], abs=1e-12)


@pytest.mark.parametrize(("equal", "score"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)])
def test_so_many_equal_answers_of_ten_are_worth_so_much(equal: int, score: float) -> None:
    truths = ["dog"] * equal + [f"other {n}" for n in range(10 - equal)]
    assert soft_accuracies(truths)["dog"] == pytest.approx(score, abs=1e-12)


@given(st.lists(st.sampled_from("abcd"), min_size=10, max_size=10))
def test_soft_accuracy_is_leaving_one_out_done_slowly(truths: list[str]) -> None:
    for answer, score in soft_accuracies(truths).items():
        shares = []
        for left_out in range(10):
            others = [text for place, text in enumerate(truths) if place != left_out]
            shares.append(min(1.0, sum(text == answer for text in others) / 3))
        assert score == pytest.approx(sum(shares) / 10, abs=1e-12)


def test_only_32_dots_go_unless_the_rule_is_repaired() -> None:
    assert normalise_m4c("a." * 40) == "a" * 32 + "a." * 8
    assert normalise_m4c("a." * 40, all_dots=True) == "a" * 40
    assert has_dot_limit("a." * 33)
    assert not has_dot_limit("a." * 32)


def test_a_comma_in_a_number_takes_away_every_mark_in_one_normaliser_only() -> None:
    assert normalise_vqa("1,000-dogs") == "1000dogs"
    assert normalise_m4c("1,000-dogs") == "1000 dogs"


def test_a_possessive_is_a_word_of_its_own_in_m4c() -> None:
    assert normalise_vqa("one's") == "one's"
    assert normalise_m4c("one's") == "1 's"


def test_the_tables_keep_the_official_oddities() -> None:
    assert len(CONTRACTIONS) == 120
    assert len(PUNCTUATION) == 21
    assert CONTRACTIONS["somebody'd"] == "somebodyd"
    assert normalise_vqa("Im here") == "im here"  # the table has "Im", which no lower-cased word meets
    assert normalise_vqa("shes") == "shes"
    assert normalise_vqa("Eleven") == "eleven"


@given(st.text(alphabet="aA1,.-?' \n\t", max_size=20))
def test_normalised_text_has_single_blanks_and_no_capitals(text: str) -> None:
    for normalise in (normalise_vqa, normalise_m4c):
        out = normalise(text)
        assert out == " ".join(out.lower().split())
