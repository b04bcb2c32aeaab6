"""BLEU, ROUGE-L and CIDEr over tokenised captions, equal to pycocoevalcap 1.2 on the same tokens.

A caption is a text whose tokens stand between single spaces. Each function takes the answers, {picture: caption}, and
the references, {picture: captions}, of the same pictures, and returns the corpus figure and one a picture.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Ngram = tuple[str, ...]
Answers = Mapping[str, str]
References = Mapping[str, Sequence[str]]

# pycocoevalcap's guards against division by zero; they show in the ninth decimal.
_TINY, _SMALL = 1e-15, 1e-9
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0


class Figures(NamedTuple):
    """corpus: the figure; each: one a picture, in the answers' order."""

    corpus: float
    each: list[float]


def bleu(answers: Answers, references: References, *, order: int = 4) -> list[Figures]:
    """BLEU-1 to BLEU-`order`: clipped counts over the corpus, and the reference of the closest length (the shorter
    of two) in the brevity penalty."""
    correct, guessed, length, reference_length = [0] * order, [0] * order, 0, 0
    each: list[list[float]] = [[] for _ in range(order)]
    for picture, answer in answers.items():
        tokens = answer.split()
        counts = _ngrams(tokens, order)
        most: Counter[Ngram] = Counter()
        for reference in references[picture]:
            most |= _ngrams(reference.split(), order)
        lengths = [len(reference.split()) for reference in references[picture]]
        closest = min((abs(size - len(tokens)), size) for size in lengths)[1]
        right = [0] * order
        for ngram, count in counts.items():
            right[len(ngram) - 1] += min(count, most[ngram])
        tried = [max(0, len(tokens) - n) for n in range(order)]
        for n, figure in enumerate(_precisions(right, tried, len(tokens), closest)):
            each[n].append(figure)
        correct = [a + b for a, b in zip(correct, right, strict=True)]
        guessed = [a + b for a, b in zip(guessed, tried, strict=True)]
        length, reference_length = length + len(tokens), reference_length + closest
    corpus = _precisions(correct, guessed, length, reference_length)
    return [Figures(figure, single) for figure, single in zip(corpus, each, strict=True)]


def rouge_l(answers: Answers, references: References) -> Figures:
    """ROUGE-L: F of the best precision and the best recall, which may come from two references; beta 1.2."""
    each = []
    for picture, answer in answers.items():
        tokens = answer.split(" ")
        precision = recall = 0.0
        for reference in references[picture]:
            others = reference.split(" ")
            common = _longest_common(others, tokens)
            precision, recall = max(precision, common / len(tokens)), max(recall, common / len(others))
        weight = _ROUGE_BETA**2
        each.append((1 + weight) * precision * recall / (recall + weight * precision) if precision and recall else 0.0)
    return Figures(sum(each) / len(each), each)


def cider(answers: Answers, references: References) -> Figures:
    """CIDEr, which is CIDEr-D: n-grams of 1 to 4, weighed by how few of these very pictures have them.

    With one picture every weight is 0. The length that the penalty compares counts bigrams, not words.
    """
    document_frequency: Counter[Ngram] = Counter()
    for picture in answers:
        document_frequency.update({ngram for text in references[picture] for ngram in _ngrams(text.split(), 4)})
    log_pictures = math.log(len(answers))
    each = []
    for picture, answer in answers.items():
        hypothesis = _weigh(answer, document_frequency, log_pictures)
        totals = [0.0] * 4
        for text in references[picture]:
            for n, value in enumerate(_similar(hypothesis, _weigh(text, document_frequency, log_pictures))):
                totals[n] += value
        each.append(sum(totals) / 4 / len(references[picture]) * 10.0)
    return Figures(sum(each) / len(each), each)


class _Weighed(NamedTuple):
    vectors: list[dict[Ngram, float]]
    norms: list[float]
    bigrams: int


def _weigh(text: str, document_frequency: Mapping[Ngram, int], log_pictures: float) -> _Weighed:
    vectors: list[dict[Ngram, float]] = [defaultdict(float) for _ in range(4)]
    squares, bigrams = [0.0] * 4, 0
    for ngram, count in _ngrams(text.split(), 4).items():
        n = len(ngram) - 1
        weight = count * (log_pictures - math.log(max(1.0, document_frequency.get(ngram, 0))))
        vectors[n][ngram] = weight
        squares[n] += weight**2
        bigrams += count if n == 1 else 0
    return _Weighed(vectors, [math.sqrt(square) for square in squares], bigrams)


def _similar(hypothesis: _Weighed, reference: _Weighed) -> list[float]:
    """Clipped cosine per n, times the Gaussian of the lengths' difference."""
    penalty = math.exp(-((hypothesis.bigrams - reference.bigrams) ** 2) / (2 * _CIDER_SIGMA**2))
    values = []
    for n in range(4):
        other = reference.vectors[n]
        value = sum(min(w, other.get(ngram, 0.0)) * other.get(ngram, 0.0) for ngram, w in hypothesis.vectors[n].items())
        norm = hypothesis.norms[n] * reference.norms[n]
        values.append((value / norm if norm else value) * penalty)
    return values


def _precisions(correct: Sequence[int], guessed: Sequence[int], length: int, reference_length: int) -> list[float]:
    ratio = (length + _TINY) / (reference_length + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, figures = 1.0, []
    for n, (right, tried) in enumerate(zip(correct, guessed, strict=True), start=1):
        product *= (right + _TINY) / (tried + _SMALL)
        figures.append(product ** (1 / n) * brevity)
    return figures


def _ngrams(tokens: Sequence[str], order: int) -> Counter[Ngram]:
    return Counter(tuple(tokens[at : at + n]) for n in range(1, order + 1) for at in range(len(tokens) - n + 1))


def _longest_common(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(two) + 1)
    for word in one:
        above_left = 0
        for at, other in enumerate(two, start=1):
            above_left, row[at] = row[at], above_left + 1 if word == other else max(row[at], row[at - 1])
    return row[-1]
