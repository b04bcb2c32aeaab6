"""From one row of logits to one token id: greedy, or drawn at random under a request's own parameters.

The order is the one of transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p, each over what
the one before left. Every request draws from a generator of its own, so that its answer does not depend on what else
is in the batch. Beam search is in beams.py.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.errors import EngineError

_MAX_SEED = 2**63 - 1

# Below it the likeliest token is certain anyway, and float32 cannot hold much smaller numbers.
_MIN_TEMPERATURE = 1e-30


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. Raises EngineError for a value out of range.

    temperature: 0 takes the likeliest token (greedy); 1 draws from the model's own distribution.
    top_p: draw among the likeliest tokens that together reach this probability. top_k: among the k likeliest, 0 for
    all. min_p: among tokens at least this fraction as likely as the likeliest. repetition_penalty: logits of tokens
    already in the prompt or answer are divided (or, below 0, multiplied) by it. seed: None draws one.
    stop_token_ids: the answer ends with the first of these, which is its last token.
    logprobs: None for none; k records with each token its log-probability and those of the k likeliest tokens, all
    from the model's own distribution, before temperature and filters.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 512
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, low=0.0, high=100.0)
        _check_number("top_p", self.top_p, low=0.0, high=1.0, above=True)
        _check_number("min_p", self.min_p, low=0.0, high=1.0)
        _check_number("repetition_penalty", self.repetition_penalty, low=0.0, high=100.0, above=True)
        _check_integer("top_k", self.top_k, low=0, high=2**31)
        _check_integer("max_new_tokens", self.max_new_tokens, low=1, high=2**31)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, low=0, high=100)
        if self.seed is not None:
            _check_integer("seed", self.seed, low=-_MAX_SEED, high=_MAX_SEED)
        for token_id in self.stop_token_ids:
            _check_integer("stop_token_ids", token_id, low=0, high=2**31)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken every time."""
        return self.temperature == 0.0

    @property
    def plain(self) -> bool:
        """Whether the argmax of the raw logits is the answer, so that a whole batch can be picked at once."""
        return self.greedy and self.repetition_penalty == 1.0


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one place of an answer: the token taken, and the likeliest ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Picks one request's tokens. Holds its random generator and the tokens that it has seen."""

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int] = ()) -> None:
        self._params = params
        self._seen = set(prompt_ids) if params.repetition_penalty != 1.0 else None
        self._generator: torch.Generator | None = None
        if not params.greedy:
            seed = secrets.randbits(63) if params.seed is None else params.seed
            self._generator = torch.Generator().manual_seed(seed)

    def pick(self, logits: Tensor) -> int:
        """The next token id. logits: (V,) of any floating dtype and device."""
        logits = logits.float().cpu()
        if self._seen is not None:
            logits = penalise(logits, self._seen, penalty=self._params.repetition_penalty)
        if self._generator is None:
            token_id = int(logits.argmax())
        else:
            probabilities = filter_logits(logits, self._params).softmax(dim=-1)
            token_id = int(torch.multinomial(probabilities, 1, generator=self._generator))
        if self._seen is not None:
            self._seen.add(token_id)
        return token_id


def read_logprobs(logits: Tensor, token_id: int, *, top: int) -> TokenLogprobs:
    """Log-probabilities of a token and of the `top` likeliest. logits: (V,) of any floating dtype and device."""
    every = logits.float().log_softmax(dim=-1)
    values, ids = every.topk(min(top, len(every)))
    return TokenLogprobs(token_id, float(every[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def penalise(logits: Tensor, seen: Iterable[int], *, penalty: float) -> Tensor:
    """Lower the logits of tokens already seen (Keskar et al. 2019, arXiv:1909.05858). logits: (V,); a new tensor."""
    index = torch.tensor([token_id for token_id in seen if 0 <= token_id < logits.shape[-1]], dtype=torch.long)
    values = logits[index]
    return logits.index_copy(0, index, torch.where(values < 0, values * penalty, values / penalty))


def filter_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits to draw from: temperature applied, what the params rule out at -inf. logits: (V,) float32.

    The likeliest token always stays. Of tokens equally likely at the border of top-k all stay.
    """
    # Dividing by a tiny temperature may overflow; the largest logit at 0 keeps it finite and changes no probability.
    logits = (logits - logits.max()) / max(params.temperature, _MIN_TEMPERATURE)
    if 0 < params.top_k < logits.shape[-1]:
        border = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < border, -math.inf)
    if params.top_p < 1.0:
        ordered, order = logits.sort(descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        beyond = before >= params.top_p
        beyond[0] = False
        logits = logits.index_fill(0, order[beyond], -math.inf)
    if params.min_p > 0.0:
        probabilities = logits.softmax(dim=-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), -math.inf)
    return logits


def _check_number(name: str, value: object, *, low: float, high: float, above: bool = False) -> None:
    fits = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
        and not (above and value == low)
    )
    if not fits:
        raise EngineError(f"{name} = {value!r}: must be a number {'above' if above else 'from'} {low:g} to {high:g}")


def _check_integer(name: str, value: object, *, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise EngineError(f"{name} = {value!r}: must be a whole number from {low} to {high}")
