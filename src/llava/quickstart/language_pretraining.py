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
from transformers import LlamaForCausalLM

from llava.data.scenes import Scene, draw_scene
from llava.quickstart.language_start import LanguageSettings, build_language_model
from llava.quickstart.random_tokens import copy_loss, list_copy_tokens, list_field_marks, look_up_loss
from llava.quickstart.scene_text import (
    GRID,
    KIND_WEIGHTS,
    LATE_KIND_WEIGHTS,
    NUM_GRID_FEATURES,
    SECOND_ROUND_WEIGHTS,
    Row,
    RowWriter,
)

Report = Callable[[int, int, dict[str, float]], None]
SAVE_EVERY = 250  # steps
LATE_SHARE = 0.35  # of the question steps, before most turns go to the kinds that are learnt last
_MIXES = (
    # from which share of the question steps on: how often each form of context is drawn
    (0.0, {"names": 0.5, "places": 0.2, "boxes": 0.3}),
    (0.08, {"names": 0.25, "places": 0.25, "boxes": 0.45, "bare_boxes": 0.05}),
    (0.3, {"names": 0.15, "places": 0.15, "boxes": 0.45, "bare_boxes": 0.05, "grid": 0.2}),
    (0.5, {"names": 0.15, "places": 0.05, "boxes": 0.25, "bare_boxes": 0.25, "grid": 0.3}),
)
_SECOND_MIX = {"names": 0.2, "places": 0.05, "boxes": 0.3, "bare_boxes": 0.2, "grid": 0.25}


@dataclass
class LanguageState:
    """Everything a stopped run needs to go on: which phase and step come next, weights, average, optimizer."""

    model: LlamaForCausalLM
    projector: nn.Module
    average: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    step: int = 0


def start_language_state(
    settings: LanguageSettings, tokenizer: Tokenizer, *, seed: int, device: torch.device
) -> LanguageState:
    """A run before its first step."""
    torch.manual_seed(seed)
    model = build_language_model(settings, tokenizer).to(device)
    size = settings.hidden_size
    projector = nn.Sequential(nn.Linear(NUM_GRID_FEATURES, size), nn.GELU(), nn.Linear(size, size)).to(device)
    nn.init.normal_(cast(nn.Linear, projector[2]).weight, std=0.1)
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
    random_steps = settings.random_steps
    total = random_steps + settings.first_round_steps + settings.second_round_steps
    pool = list_copy_tokens(tokenizer)
    marks = list_field_marks(tokenizer)
    parameters = [*state.model.parameters(), *state.projector.parameters()]
    sums: dict[str, list[float]] = {}
    state.model.train()
    while state.step < total:
        rng = random.Random(f"language-{seed}-{state.step}")
        rate = _learning_rate(settings, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        if copy_steps <= state.step < random_steps:
            most = 3 + (state.step - copy_steps) // settings.look_up_steps_each
            name, loss = "look up", look_up_loss(state.model, pool, marks, rng, most=min(most, 6))
        elif state.step < copy_steps:
            name, loss = (
                "copy",
                copy_loss(state.model, pool, rng, easy=state.step < settings.copy_steps_easy),
            )
        else:
            share = (state.step - random_steps) / settings.question_steps
            rows = draw_rows(
                writer,
                rng,
                share=share,
                count=settings.batch_rows,
                max_tokens=settings.row_tokens,
                second_round=state.step >= random_steps + settings.first_round_steps,
            )
            name, loss = "questions", rows_loss(state.model, state.projector, rows, rng)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        state.optimizer.step()
        state.step += 1
        _average(state, settings.averaging if state.step > random_steps else 0.9)
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


def draw_rows(
    writer: RowWriter, rng: random.Random, *, share: float, count: int, max_tokens: int, second_round: bool = False
) -> list[Row]:
    """A step's rows; share: how far the first round has come, which decides the forms of context and the kinds."""
    if second_round:
        mix, kind_weights = _SECOND_MIX, SECOND_ROUND_WEIGHTS
    else:
        mix = [weights for start, weights in _MIXES if start <= share][-1]
        kind_weights = LATE_KIND_WEIGHTS if share >= LATE_SHARE else KIND_WEIGHTS
    forms = rng.choices(list(mix), list(mix.values()), k=count)
    return [
        writer.write_row(draw_row_scene(rng), form, rng, max_tokens=max_tokens, kind_weights=kind_weights)
        for form in forms
    ]


def draw_row_scene(rng: random.Random) -> Scene:
    """Mostly two to four objects: with one there is nothing to look up."""
    return draw_scene(rng, num_objects=rng.choices((1, 2, 3, 4), (0.06, 0.3, 0.32, 0.32))[0])


def rows_loss(model: LlamaForCausalLM, projector: nn.Module, rows: list[Row], rng: random.Random) -> Tensor:
    """Mean cross-entropy over the answers' tokens of all rows."""
    hidden, labels = run_rows(model, projector, rows, noise_seed=rng.getrandbits(32))
    wanted = labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][wanted])
    weights = np.concatenate([row.weights[row.labels != -100] for row in rows])
    losses = F.cross_entropy(logits.float(), labels[:, 1:][wanted], reduction="none")
    share = torch.from_numpy(weights).to(losses.device)
    return (losses * share).sum() / share.sum()


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


def _learning_rate(settings: LanguageSettings, step: int) -> float:
    if step < settings.random_steps:
        return settings.random_learning_rate * min((step + 1) / settings.warmup_steps, 1.0)
    done = step - settings.random_steps
    if done < settings.first_round_steps:
        return settings.learning_rate * _flat_cosine(done, settings.flat_share, settings.question_steps)
    done -= settings.first_round_steps
    return settings.second_learning_rate * _flat_cosine(done, settings.flat_share, settings.second_round_steps)


def _flat_cosine(done: int, flat_share: float, steps: int) -> float:
    """1 for a share of the steps, then a cosine down to .01."""
    flat = flat_share * steps
    if done <= flat:
        return 1.0
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - flat) / (steps - flat)))


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
