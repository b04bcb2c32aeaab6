"""Beam search: the likeliest whole answer among several kept at each step; what captions are usually made with.

    completions = search_beams(engine, encoded_prompts, beams=3, params=SamplingParams(max_new_tokens=40))

Answers equal those of transformers' `generate(num_beams=...)`: scores are sums of log-probabilities divided by
length ** length_penalty, and the search ends when no beam can overtake the worst of the finished ones. Prompts are
searched together, a beam being a branch like any other. Not covered: sampling within beams, groups of beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.errors import EngineError
from llava.inference.engine import Engine
from llava.inference.requests import Completion, FinishReason
from llava.inference.sampling import SamplingParams
from llava.prompt.processor import Encoded


@dataclass(eq=False)
class _Beam:
    branch: int
    score: float
    token_ids: tuple[int, ...]


@dataclass(eq=False)
class _Search:
    """One prompt's beams. done: (score, token ids) of finished answers, best first."""

    num_prompt_tokens: int
    max_new_tokens: int
    live: list[_Beam]
    done: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)


@torch.inference_mode()
def search_beams(
    engine: Engine,
    prompts: Sequence[Encoded],
    *,
    beams: int,
    params: SamplingParams,
    length_penalty: float = 1.0,
) -> list[Completion]:
    """The best answer to each prompt. Other requests of the engine wait meanwhile.

    beams: how many beginnings are kept; length_penalty: above 1 prefers longer answers. Of params, max_new_tokens and
    stop_token_ids count. Raises EngineError for values out of range, ContextLengthError as `Engine.submit` does.
    """
    if not 1 <= beams <= 64:
        raise EngineError(f"beams = {beams!r}: must be a whole number from 1 to 64")
    if not params.plain:
        raise EngineError("beam search takes the likeliest answers: leave temperature at 0, repetition_penalty at 1")
    stops = frozenset(params.stop_token_ids)
    with engine.alone():
        searches = []
        branches: list[int] = []
        try:
            for encoded in prompts:
                started = engine.read_prompt(encoded, params)
                branches.append(started.branch)
                search = _Search(len(encoded.input_ids), started.max_new_tokens, [_Beam(started.branch, 0.0, ())])
                _advance(engine, search, started.logits, branches, beams, stops, length_penalty)
                searches.append(search)
            while any(search.live for search in searches):
                at_work = [search for search in searches if search.live]
                live = [beam for search in at_work for beam in search.live]
                logits = engine.decoder.step([b.branch for b in live], [b.token_ids[-1] for b in live])
                for search, rows in zip(at_work, torch.split(logits, [len(s.live) for s in at_work]), strict=True):
                    _advance(engine, search, rows, branches, beams, stops, length_penalty)
        finally:
            engine.decoder.free(branches)
    return [_completion(search, stops) for search in searches]


def _advance(
    engine: Engine,
    search: _Search,
    logits: Tensor,
    branches: list[int],
    beams: int,
    stops: frozenset[int],
    length_penalty: float,
) -> None:
    """Lengthen every live beam by a token, keep the best, set finished ones aside. logits: (live beams, V)."""
    scores = logits.float().log_softmax(dim=-1) + torch.tensor([[b.score] for b in search.live], device=logits.device)
    vocabulary = scores.shape[1]
    # Enough that as many as are kept remain when every stop token is among the best.
    wanted = min(max(2, 1 + len(stops)) * beams, scores.numel())
    values, places = scores.flatten().topk(wanted)
    length = len(search.live[0].token_ids) + 1
    at_end = length >= search.max_new_tokens
    kept: list[tuple[_Beam, float, int]] = []
    for rank, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
        parent, token_id = search.live[place // vocabulary], place % vocabulary
        if token_id in stops or at_end:
            # Only a stop among the best beams counts; one from below would crowd out better beginnings.
            if rank < beams:
                search.done.append((value / length**length_penalty, (*parent.token_ids, token_id)))
        elif len(kept) < beams:
            kept.append((parent, value, token_id))
    search.done = sorted(search.done, key=lambda done: -done[0])[:beams]
    if at_end or (kept and _is_over(search, kept[0][1], length, beams, length_penalty)):
        kept = []
    _branch_out(engine, search, kept, branches)


def _is_over(search: _Search, best_live: float, length: int, beams: int, length_penalty: float) -> bool:
    """Whether no live beam can come before the worst finished one."""
    if len(search.done) < beams:
        return False
    # As transformers has it: the score at today's length; what longer answers might come to is not weighed.
    return search.done[-1][0] >= best_live / float(length**length_penalty)


def _branch_out(engine: Engine, search: _Search, kept: Sequence[tuple[_Beam, float, int]], branches: list[int]) -> None:
    """Give every kept beginning a branch: its parent's own for the first child, a copy for the others."""
    parents = {id(parent) for parent, _, _ in kept}
    gone = [beam.branch for beam in search.live if id(beam) not in parents]
    taken: set[int] = set()
    live = []
    for parent, score, token_id in kept:
        branch = parent.branch
        if branch in taken:
            branch = engine.new_branch()
            engine.decoder.fork(parent.branch, branch)
            branches.append(branch)
        taken.add(branch)
        live.append(_Beam(branch, score, (*parent.token_ids, token_id)))
    engine.decoder.free(gone)
    for branch in gone:
        branches.remove(branch)
    search.live = live


def _completion(search: _Search, stops: frozenset[int]) -> Completion:
    _, token_ids = search.done[0]
    reason: FinishReason = "stop" if token_ids[-1] in stops else "length"
    return Completion(token_ids, reason, search.num_prompt_tokens)
