"""Two exercises on random tokens that come before any language: copying, and looking up a record's field.

A small model does not find by itself, from questions, how to look something up in its context. Random tokens carry no
meaning that could be guessed instead, so the loss falls only with the circuits that look.
"""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from llava.quickstart.tokenizer_building import SPACE, WORLD_WORDS, list_numbers

_FIELD_MARKS = (*(SPACE + digit for digit in "01234"), "A")  # say which field of a record is wanted
_RECORD_END = "."


def list_field_marks(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that number a record's fields, and last of the one that ends it."""
    return [find_token(tokenizer, mark) for mark in (*_FIELD_MARKS, _RECORD_END)]


def find_token(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary must hold."""
    place = tokenizer.token_to_id(token)
    assert isinstance(place, int), token
    return place


def list_copy_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the copying phases draw from: the world's words, numbers and marks."""
    tokens = [SPACE + word for word in WORLD_WORDS] + list_numbers() + [SPACE + number for number in list_numbers()]
    tokens += [*"ABCD.,]?", SPACE + "[", *(SPACE + mark for mark in "ABCD01234")]
    return sorted({find_token(tokenizer, token) for token in tokens})


def copy_loss(model: LlamaForCausalLM, pool: list[int], rng: random.Random, *, easy: bool) -> Tensor:
    """Random tokens three times over; the second and third time they can be known."""
    tokens = pool[:: max(len(pool) // 56, 1)][:56] if easy else pool
    length = rng.randint(6, 20 if easy else 32)
    rows = 32 if easy else 24
    once = torch.tensor([[rng.choice(tokens) for _ in range(length)] for _ in range(rows)])
    ids = once.repeat(1, 3).to(model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        logits = model.lm_head(model.model(ids, use_cache=False).last_hidden_state[:, length - 1 : -1])
    # of each copy the first token cannot be known before the second time
    return F.cross_entropy(logits[:, 1:].float().flatten(0, 1), ids[:, length + 1 :].flatten())


def look_up_loss(
    model: LlamaForCausalLM, pool: list[int], marks: list[int], rng: random.Random, *, most: int
) -> Tensor:
    """Records of random tokens, then questions about them: one field (or two that only together name a record), the
    number of the field that is wanted, and its token. Nothing can be guessed from what tokens usually mean.

    most: how many fields a record may have, up to 6.
    """
    num_records, size = rng.randint(2, min(most, 5)), rng.randint(2, most)
    paired = size > 2 and rng.random() < 0.5
    free = [token for token in pool if token not in marks]
    rows: list[list[int]] = []
    places: list[list[int]] = []
    for _ in range(24):
        tokens = iter(rng.sample(free, num_records * size + 6))
        if paired:
            firsts, seconds = [[next(tokens) for _ in range(3)] for _ in range(2)]
            pairs = rng.sample([(first, second) for first in firsts for second in seconds], num_records)
            records = [[*pair, *(next(tokens) for _ in range(size - 2))] for pair in pairs]
        else:
            records = [[next(tokens) for _ in range(size)] for _ in range(num_records)]
        rows.append([token for record in records for token in (*record, marks[-1])])
        places.append([])
        for _ in range(12):
            record = rng.choice(records)
            if paired:
                wanted = rng.randrange(2, size)
                asked = [record[0], record[1]]
            else:
                key, wanted = rng.sample(range(size), 2)
                asked = [record[key]]
            rows[-1] += [*asked, marks[wanted], record[wanted]]
            places[-1].append(len(rows[-1]) - 1)
    ids = torch.tensor(rows, device=model.device)
    asked_at = torch.tensor(places, device=model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        hidden = model.model(ids, use_cache=False).last_hidden_state
        hidden = hidden.gather(1, (asked_at - 1)[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), ids.gather(1, asked_at).flatten())
