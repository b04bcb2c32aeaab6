"""Caption figures against pycocoevalcap 1.2's, recorded on made-up captions (tests/golden/eval/captions.json)."""

from __future__ import annotations

import json
import math
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from llava.errors import MissingExtraError, UsageError
from llava.eval.metrics import caption_tokens
from llava.eval.metrics.captions import Figures, bleu, cider, rouge_l

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[2] / "golden/eval/captions.json").read_text())
TOKENS = GOLDEN["tokens"]


def _figures() -> dict[str, Figures]:
    answers, references = TOKENS["answers"], TOKENS["references"]
    named = {f"Bleu_{n}": found for n, found in enumerate(bleu(answers, references), start=1)}
    return {**named, "ROUGE_L": rouge_l(answers, references), "CIDEr": cider(answers, references)}


@pytest.mark.parametrize("name", ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"])
def test_figures_are_pycocoevalcaps(name: str) -> None:
    found, expected = _figures()[name], GOLDEN["figures"][name]
    assert found.corpus == pytest.approx(expected["corpus"], rel=1e-9)
    assert found.each == pytest.approx(expected["each"], rel=1e-9, abs=1e-12)


def test_tokens_are_those_of_the_ptb_tokenizer_on_ordinary_captions() -> None:
    for key, answer in GOLDEN["answers"].items():
        assert caption_tokens.tokenize(answer) == TOKENS["answers"][key]
        cut = [caption_tokens.tokenize(text) for text in GOLDEN["references"][key]]
        assert cut == TOKENS["references"][key]


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("(A) [b] {c}", "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb-"),
        ("a two-year-old's toy; isn't it?", "a two-year-old 's toy is n't it"),
        ("line\nline", "line line"),
        ("5% #1 $2 & *", "5 % # 1 $ 2 & *"),
        (" ... -- ! ", ""),
        ("“Quoted” — dash", "quoted dash"),
    ],
)
def test_marks_are_dropped_but_brackets_keep_their_names(caption: str, tokens: str) -> None:
    assert caption_tokens.tokenize(caption) == tokens


def test_one_picture_alone_has_a_cider_of_zero() -> None:
    assert cider({"1": "a dog"}, {"1": ["a dog", "a cat"]}).corpus == 0.0


def test_the_longest_common_subsequence_is_the_longest() -> None:
    drawn = random.Random(0)
    for _ in range(40):
        one, two = (drawn.choices("abc", k=drawn.randint(1, 6)) for _ in range(2))
        longest = max(
            (size for size in range(len(one) + 1) for part in combinations(one, size) if _within(part, two)), default=0
        )
        precision, recall = longest / len(one), longest / len(two)
        weight = 1.2**2
        expected = (1 + weight) * precision * recall / (recall + weight * precision) if longest else 0.0
        assert math.isclose(rouge_l({"1": " ".join(one)}, {"1": [" ".join(two)]}).corpus, expected)


def _within(part: tuple[str, ...], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


def test_meteor_without_its_extra_or_without_java_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_tokens, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"llava\[caption\]"):
        caption_tokens.meteor({}, {})
    monkeypatch.setattr(caption_tokens, "find_spec", lambda name: object())
    monkeypatch.setattr(caption_tokens.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="no `java` on the path"):
        caption_tokens.tokenize_with_java({})


@pytest.mark.slow
@pytest.mark.skipif(not caption_tokens.java_is_there(), reason="needs pip install 'llava[caption]' and java")
def test_the_jars_give_the_recorded_tokens_and_meteor() -> None:
    cut = caption_tokens.tokenize_with_java(GOLDEN["references"])
    assert cut == TOKENS["references"]
    corpus, each = caption_tokens.meteor(TOKENS["answers"], cut)
    assert corpus == pytest.approx(GOLDEN["figures"]["METEOR"]["corpus"], rel=1e-6)
    assert each == pytest.approx(GOLDEN["figures"]["METEOR"]["each"], rel=1e-6)
