"""Pretrain the quickstart's language model: first to copy from its own context, then to answer about scenes it reads.

What a small model does not find by itself from questions is how to look something up. Two phases of random tokens,
repeated, teach it that in minutes, and only then do questions about scenes teach what to look up. Scenes stand in the
context as text, and later for a part of the rows as a grid of symbols (scene_text.write_grid) through a small projector
that is thrown away afterwards: that is how a LLaVA's language model will meet pictures, but no pixel and no vision
tower is involved.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from llava.data.scenes import Scene, draw_scene
from llava.quickstart.scene_text import GRID, NUM_GRID_FEATURES, Row, RowWriter
from llava.quickstart.tokenizer_building import MODEL_MAX_LENGTH, SPACE, WORLD_WORDS, list_numbers

Report = Callable[[int, int, dict[str, float]], None]
SAVE_EVERY = 250  # steps
_MIXES = (
    # from which share of the question steps on: how often each form of context is drawn
    (0.0, {"names": 0.5, "places": 0.2, "boxes": 0.3}),
    (0.08, {"names": 0.25, "places": 0.25, "boxes": 0.45, "bare_boxes": 0.05}),
    (0.3, {"names": 0.15, "places": 0.15, "boxes": 0.45, "bare_boxes": 0.05, "grid": 0.2}),
    (0.6, {"names": 0.1, "places": 0.1, "boxes": 0.4, "bare_boxes": 0.1, "grid": 0.3}),
)


@dataclass(frozen=True)
class LanguageSettings:
    """What decides the language model. Steps, not seconds, so that the result is a function of the seed."""

    hidden_size: int = 192
    intermediate_size: int = 384
    num_layers: int = 6
    num_heads: int = 6
    copy_steps_easy: int = 150  # 56 tokens, up to 20 long
    copy_steps_hard: int = 500  # every token of the world, up to 32 long
    question_steps: int = 11_000
    batch_rows: int = 8
    row_tokens: int = 288
    copy_learning_rate: float = 2e-3
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    flat_share: float = 0.35  # of the question steps before the cosine begins
    averaging: float = 0.997  # the weights kept are a moving average


@dataclass
class LanguageState:
    """Everything a stopped run needs to go on: which phase and step come next, weights, average, optimizer."""

    model: LlamaForCausalLM
    projector: nn.Module
    average: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    step: int = 0


def build_language_model(settings: LanguageSettings, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A fresh LlamaForCausalLM from torch's generator.

    Output rows start as the input rows, so that copying is near from the start, and numbers start in order: each shares
    slow waves with its neighbours.
    """
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=MODEL_MAX_LENGTH,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id("</s>"),
        pad_token_id=None,
        tie_word_embeddings=False,
        # on a CPU plain attention's backward is three times faster than the fused kernel's at these sizes
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    rows = torch.randn(config.vocab_size, settings.hidden_size) * 0.02
    waves = torch.linalg.qr(torch.randn(settings.hidden_size, 12))[0].T * 0.01 * math.sqrt(settings.hidden_size / 6)
    for number in list_numbers():
        angles = 2 * math.pi * float(number) * torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
        wave = torch.cat([angles.sin(), angles.cos()]) @ waves
        for token in (number, SPACE + number):
            rows[tokenizer.token_to_id(token)] += wave
    shared = F.normalize(torch.randn(settings.hidden_size), dim=0)
    rows = F.normalize(rows - torch.outer(rows @ shared, shared)) * 0.02 * math.sqrt(settings.hidden_size)
    with torch.no_grad():
        model.lm_head.weight.copy_(rows)
        model.model.embed_tokens.weight.copy_(rows + 0.01 * math.sqrt(settings.hidden_size) * shared)
        for head in range(2):
            _start_copying(model, shared, head=head)
    return model


def _start_copying(model: LlamaForCausalLM, shared: Tensor, *, head: int) -> None:
    """Start one head of each of the first two layers as the circuit that copies: find what followed this token before.

    First layer: look at the token before and write down which it was. Its query and key come from a direction that all
    embeddings share, and differ by one step of the rotary embedding. Second layer: look where this token was written
    down as the one before, on the slow frequencies that hardly turn with distance, and bring the token that stands
    there.
    Random tokens then sharpen in minutes what they would need much longer to find.
    """
    first, second = (model.model.layers[layer].self_attn for layer in (0, 1))
    size, half = first.head_dim, first.head_dim // 2
    rows = slice(head * size, (head + 1) * size)
    angles = model.model.rotary_emb.inv_freq[:half].float()
    query = torch.zeros(size)
    query[:4] = 1.15  # the fastest frequencies: the others hardly tell near places apart
    key = torch.cat([query[:half] * angles.cos(), query[:half] * angles.sin()])
    first.q_proj.weight[rows] += torch.outer(query, shared)
    first.k_proj.weight[rows] += torch.outer(key, shared)
    drawn = torch.cat([shared[:, None], torch.randn(shared.numel(), 3 * size)], dim=1)
    frames = torch.linalg.qr(drawn)[0].T[1:]  # orthonormal rows in D, none along the shared direction
    read, written, brought = (frames[part * size : (part + 1) * size] for part in range(3))
    slow = (torch.arange(size) % half >= half // 2).float()[:, None]
    first.v_proj.weight[rows] = read
    first.o_proj.weight[:, rows] = 0.12 * written.T
    second.q_proj.weight[rows] = 5.0 * slow * read
    second.k_proj.weight[rows] = slow * written
    second.v_proj.weight[rows] = brought
    second.o_proj.weight[:, rows] = 0.5 * brought.T


def start_language_state(
    settings: LanguageSettings, tokenizer: Tokenizer, *, seed: int, device: torch.device
) -> LanguageState:
    """A run before its first step."""
    torch.manual_seed(seed)
    model = build_language_model(settings, tokenizer).to(device)
    size = settings.hidden_size
    projector = nn.Sequential(nn.Linear(NUM_GRID_FEATURES, size), nn.GELU(), nn.Linear(size, size)).to(device)
    nn.init.normal_(cast(nn.Linear, projector[2]).weight, std=0.02 / math.sqrt(size) * 4)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *projector.parameters()], lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    return LanguageState(model, projector, average, optimizer)


def pretrain_language_model(
    settings: LanguageSettings,
    tokenizer: Tokenizer,
    *,
    seed: int,
    device: torch.device,
    state: LanguageState | None = None,
    report: Report | None = None,
    save: Callable[[LanguageState], None] | None = None,
) -> LanguageState:
    """Train from `state` (or from nothing) to the end; every step's data are a function of the seed and its number.

    `report(step, num_steps, figures)` every 20 steps with mean losses; `save(state)` every SAVE_EVERY.
    """
    state = state or start_language_state(settings, tokenizer, seed=seed, device=device)
    writer = RowWriter(tokenizer)
    copy_steps = settings.copy_steps_easy + settings.copy_steps_hard
    total = copy_steps + settings.question_steps
    pool = list_copy_tokens(tokenizer)
    parameters = [*state.model.parameters(), *state.projector.parameters()]
    sums: dict[str, list[float]] = {}
    state.model.train()
    while state.step < total:
        rng = random.Random(f"language-{seed}-{state.step}")
        rate = _learning_rate(settings, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        if state.step < copy_steps:
            name, loss = (
                "copy",
                _copy_loss(state.model, settings, pool, rng, easy=state.step < settings.copy_steps_easy),
            )
        else:
            share = (state.step - copy_steps) / settings.question_steps
            rows = draw_rows(writer, rng, share=share, count=settings.batch_rows, max_tokens=settings.row_tokens)
            name, loss = "questions", rows_loss(state.model, state.projector, rows, rng)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        state.optimizer.step()
        state.step += 1
        _average(state, settings.averaging if state.step > copy_steps else 0.9)
        sums.setdefault(name, []).append(float(loss.detach()))
        if report is not None and state.step % 20 == 0:
            report(state.step, total, {key: sum(values) / len(values) for key, values in sums.items()})
            sums = {}
        if save is not None and (state.step % SAVE_EVERY == 0 or state.step == total):
            save(state)
    return state


def averaged_model(state: LanguageState) -> LlamaForCausalLM:
    """A copy of the model that holds the moving average: what is measured and kept."""
    model = LlamaForCausalLM(state.model.config)
    model.load_state_dict(state.average)
    return model.to(state.model.device).eval()


def save_language_state(state: LanguageState, path: Path) -> None:
    """Write a run's state beside the old one and put it in its place."""
    content = {
        "model": state.model.state_dict(),
        "projector": state.projector.state_dict(),
        "average": state.average,
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
    }
    torch.save(content, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_language_state(state: LanguageState, path: Path) -> None:
    """Put a saved run's state into a fresh one."""
    device = state.model.device
    content = torch.load(path, map_location=device, weights_only=True)
    state.model.load_state_dict(content["model"])
    state.projector.load_state_dict(content["projector"])
    state.average = content["average"]
    state.optimizer.load_state_dict(content["optimizer"])
    state.step = content["step"]


def list_copy_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the copying phases draw from: the world's words, numbers and marks."""
    tokens = [SPACE + word for word in WORLD_WORDS] + list_numbers() + [SPACE + number for number in list_numbers()]
    tokens += [*"ABCD.,]?", SPACE + "[", *(SPACE + mark for mark in "ABCD01234")]
    ids = {tokenizer.token_to_id(token) for token in tokens}
    return sorted(place for place in ids if place is not None)


def draw_rows(writer: RowWriter, rng: random.Random, *, share: float, count: int, max_tokens: int) -> list[Row]:
    """A step's rows; share: how far the question phase has come, which decides the forms of context."""
    mix = [weights for start, weights in _MIXES if start <= share][-1]
    forms = rng.choices(list(mix), list(mix.values()), k=count)
    return [writer.write_row(draw_row_scene(rng), form, rng, max_tokens=max_tokens) for form in forms]


def draw_row_scene(rng: random.Random) -> Scene:
    """Mostly two to four objects: with one there is nothing to look up."""
    return draw_scene(rng, num_objects=rng.choices((1, 2, 3, 4), (0.06, 0.3, 0.32, 0.32))[0])


def rows_loss(model: LlamaForCausalLM, projector: nn.Module, rows: list[Row], rng: random.Random) -> Tensor:
    """Mean cross-entropy over the answers' tokens of all rows."""
    hidden, labels = run_rows(model, projector, rows, noise_seed=rng.getrandbits(32))
    wanted = labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][wanted])
    return F.cross_entropy(logits.float(), labels[:, 1:][wanted])


def run_rows(
    model: LlamaForCausalLM, projector: nn.Module | None, rows: list[Row], *, noise_seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, D) of rows padded to the longest, and their labels (B, T).

    noise_seed: adds noise to the grids' symbols, as a tower's features are never exact; None leaves them clean.
    """
    device = model.device
    length = max(len(row.input_ids) for row in rows)
    fields = {name: _stack(rows, name, length, fill, device) for name, fill in _PADDING.items()}
    branch = fields["branch_ids"]
    same = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    seen = (same & torch.ones(length, length, dtype=torch.bool, device=device).tril())[:, None]
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16, device=device).masked_fill_(~seen, -1e4)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        embeddings = model.model.embed_tokens(fields["input_ids"])
        with_grid = [number for number, row in enumerate(rows) if row.grid is not None]
        if with_grid and projector is not None:
            grids = [row.grid for row in rows if row.grid is not None]
            grid = torch.from_numpy(np.stack(grids)).to(device)
            if noise_seed is not None:
                noise = np.random.default_rng(noise_seed).standard_normal(grid.shape, dtype=np.float32)
                grid = grid + 0.1 * torch.from_numpy(noise).to(device)
            start = rows[with_grid[0]].grid_start
            embeddings = embeddings.clone()
            embeddings[with_grid, start : start + GRID * GRID] = projector(grid).to(embeddings.dtype)
        hidden = model.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=fields["position_ids"], use_cache=False
        ).last_hidden_state
    return hidden, fields["labels"]


def _copy_loss(
    model: LlamaForCausalLM, settings: LanguageSettings, pool: list[int], rng: random.Random, *, easy: bool
) -> Tensor:
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


def _learning_rate(settings: LanguageSettings, step: int) -> float:
    copy_steps = settings.copy_steps_easy + settings.copy_steps_hard
    if step < copy_steps:
        return settings.copy_learning_rate * min((step + 1) / settings.warmup_steps, 1.0)
    done = step - copy_steps
    flat = settings.flat_share * settings.question_steps
    if done <= flat:
        return settings.learning_rate
    return settings.learning_rate * (
        0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - flat) / (settings.question_steps - flat)))
    )


@torch.no_grad()
def _average(state: LanguageState, keep: float) -> None:
    values = [value.detach() for _, value in state.model.named_parameters()]
    torch._foreach_lerp_(list(state.average.values()), values, 1 - keep)


_PADDING = {"input_ids": 0, "position_ids": 0, "branch_ids": -1, "labels": -100}


def _stack(rows: list[Row], name: str, length: int, fill: int, device: torch.device) -> Tensor:
    stacked: NDArray[np.int64] = np.full((len(rows), length), fill, dtype=np.int64)
    for number, row in enumerate(rows):
        stacked[number, : len(row.input_ids)] = getattr(row, name)
    return torch.from_numpy(stacked).to(device)
