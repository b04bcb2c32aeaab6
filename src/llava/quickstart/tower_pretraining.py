"""Pretrain the quickstart's vision tower: a small ViT in CLIP's layout that learns what lies under each patch.

The loss is dense, as a detector's is, and not contrastive: a contrastive tower of this size trained for minutes stays
blind to shape. Every patch says, through a head that is thrown away afterwards, which shape it lies on (or background),
in which colour, where that object's box is, and whether the object's centre falls in it. No text is involved.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.data.scenes import COLOURS, PICTURE_SIDE, SHAPES, SUPERSAMPLING, Scene, draw_masks, draw_scene, render_masks

PATCH = 8
GRID = PICTURE_SIDE // PATCH
BOX_BINS = 33  # a coordinate is read off 33 bins over 0..1 by their mean
BACKGROUND = len(SHAPES)
IGNORE = -100
_COVERED, _BARE = 0.25, 0.08  # a patch covered more than this is the object's; between the two it says nothing


@dataclass(frozen=True)
class TowerSettings:
    """What decides the tower. Steps, not seconds, so that the result is a function of the seed."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_scenes: int = 112_000
    num_steps: int = 2_800
    batch_size: int = 128
    warmup_steps: int = 100
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.02
    position_std: float = 0.3  # CLIP's .02 is drowned by the patches' embeddings, and the tower then knows no places


@dataclass(frozen=True)
class PatchTargets:
    """What lies under each patch, for N pictures of P patches.

    shape: (N, P) int64, BACKGROUND where bare and IGNORE at an object's edge; colour: (N, P) int64, IGNORE where no
    object; box: (N, P, 4) float32 x1, y1, x2, y2 in 0..1; centre: (N, P) float32, 1 where an object's centre falls.
    """

    shape: NDArray[np.int64]
    colour: NDArray[np.int64]
    box: NDArray[np.float32]
    centre: NDArray[np.float32]


class DenseHead(nn.Module):
    """Reads shape, colour, box and centre off a patch feature; used in pretraining and for the gates only."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.split = (len(SHAPES) + 1, len(COLOURS), 4 * BOX_BINS, 1)
        self.layers = nn.Sequential(
            nn.LayerNorm(hidden_size), nn.Linear(hidden_size, 256), nn.GELU(), nn.Linear(256, sum(self.split))
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """features: (..., D) -> shape (..., 6), colour (..., 7), box bins (..., 4, 33), centre (...)."""
        shape, colour, box, centre = self.layers(features).float().split(self.split, dim=-1)
        return shape, colour, box.unflatten(-1, (4, BOX_BINS)), centre.squeeze(-1)


def build_tower(settings: TowerSettings) -> CLIPVisionModel:
    """A fresh CLIPVisionModel with weights from torch's generator, spread so that places are seen."""
    config = CLIPVisionConfig(
        hidden_size=settings.hidden_size,
        intermediate_size=4 * settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        image_size=PICTURE_SIDE,
        patch_size=PATCH,
        projection_dim=settings.hidden_size,
        hidden_act="gelu",
        # on a CPU plain attention's backward is much faster than the fused kernel's: .28 s a step, not .50
        attn_implementation="eager",
    )
    tower = CLIPVisionModel(config)
    for name, parameter in tower.named_parameters():
        if name.endswith("position_embedding.weight"):
            nn.init.normal_(parameter, std=settings.position_std)
        elif name.endswith("class_embedding"):
            nn.init.normal_(parameter, std=0.3)
        elif name.endswith("patch_embedding.weight"):
            nn.init.normal_(parameter, std=0.7 / math.sqrt(3 * PATCH * PATCH))
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.7 / math.sqrt(parameter.shape[1]))
    return tower


def patch_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """(N, 3, 64, 64) normalised pixels -> (N, 64, D): the last block's output without CLS and without the final norm.

    It is `hidden_states[-1]`: what a LLaVA with vision_feature_layer -1 sees.
    """
    return tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]  # type: ignore[no-any-return]


def normalise(pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 with mean and standard deviation .5, as the preprocessor has it."""
    pixels = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float()
    return pixels.div_(127.5).sub_(1.0)


def draw_pictures(scenes: list[Scene], *, seed: int) -> tuple[NDArray[np.uint8], PatchTargets]:
    """Paint scenes and say what lies under each patch: (N, 64, 64, 3) uint8 and the targets."""
    pictures = np.empty((len(scenes), PICTURE_SIDE, PICTURE_SIDE, 3), dtype=np.uint8)
    targets = _empty_targets(len(scenes))
    for row, scene in enumerate(scenes):
        side = PICTURE_SIDE * (SUPERSAMPLING if scene.background.smooth_edges else 1)
        mask = draw_masks(scene, side=side)
        _fill_targets(targets, row, scene, np.asarray(mask))
        pictures[row] = render_masks(scene, mask, noise_seed=seed + row, side=PICTURE_SIDE)
    return pictures, targets


def target_patches(scenes: list[Scene]) -> PatchTargets:
    """The targets alone, for pictures that another renderer painted."""
    targets = _empty_targets(len(scenes))
    for row, scene in enumerate(scenes):
        _fill_targets(targets, row, scene, np.asarray(draw_masks(scene, side=PICTURE_SIDE * SUPERSAMPLING)))
    return targets


def pretrain_tower(
    settings: TowerSettings,
    *,
    seed: int,
    device: torch.device,
    report: Callable[[int, int, dict[str, float]], None] | None = None,
) -> tuple[CLIPVisionModel, DenseHead]:
    """Train a tower and its throw-away head from nothing; the same seed and thread count give the same weights.

    `report(step, num_steps, figures)` is called every 20 steps with the mean losses since the last call.
    """
    torch.manual_seed(seed)
    tower = build_tower(settings).to(device).train()
    head = DenseHead(settings.hidden_size).to(device)
    rng = random.Random(f"tower-{seed}")
    pictures, targets = draw_pictures([draw_scene(rng) for _ in range(settings.num_scenes)], seed=seed)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    order = np.random.default_rng(seed)
    sums: dict[str, float] = {}
    for step in range(settings.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _warm_cosine(step, settings.warmup_steps, settings.num_steps)
        rows = order.integers(0, settings.num_scenes, settings.batch_size)
        picked, wanted = _flip(pictures[rows], _pick(targets, rows), flipped=order.random(len(rows)) < 0.5)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            outputs = head(patch_features(tower, normalise(picked, device)))
        losses = dense_losses(outputs, wanted, device)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss.detach()) / 20
        if (step + 1) % 20 == 0:
            if report is not None:
                report(step + 1, settings.num_steps, sums)
            sums = {}
    return tower.eval(), head.eval()


def dense_losses(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor], targets: PatchTargets, device: torch.device
) -> dict[str, Tensor]:
    """The four losses of a batch, already weighted; they are summed."""
    shape, colour, box, centre = outputs
    shape_target = torch.from_numpy(targets.shape).to(device)
    colour_target = torch.from_numpy(targets.colour).to(device)
    inside = colour_target != IGNORE
    place = torch.from_numpy(targets.box).to(device)[inside] * (BOX_BINS - 1)  # (F, 4) in bins
    low = place.floor().clamp(max=BOX_BINS - 2)
    share = (place - low)[..., None]
    log_probs = box[inside].log_softmax(-1)  # (F, 4, bins)
    index = low.long()[..., None]
    box_loss = -(log_probs.gather(-1, index) * (1 - share) + log_probs.gather(-1, index + 1) * share).mean()
    return {
        "shape": F.cross_entropy(shape.flatten(0, 1), shape_target.flatten(), ignore_index=IGNORE),
        "colour": F.cross_entropy(colour.flatten(0, 1), colour_target.flatten(), ignore_index=IGNORE),
        "box": 0.5 * box_loss,
        "centre": F.binary_cross_entropy_with_logits(
            centre, torch.from_numpy(targets.centre).to(device), pos_weight=torch.tensor(1.5, device=device)
        ),
    }


def measure_tower(
    tower: CLIPVisionModel, head: DenseHead, pictures: NDArray[np.uint8], targets: PatchTargets, device: torch.device
) -> dict[str, float]:
    """Accuracy over the patches that lie on an object: shape, colour, box with IoU > .5; background over bare ones."""
    hits = {"shape": 0, "colour": 0, "box": 0, "background": 0}
    seen = dict.fromkeys(hits, 0)
    for start in range(0, len(pictures), 256):
        rows = np.arange(start, min(start + 256, len(pictures)))
        wanted = _pick(targets, rows)
        with torch.no_grad():
            shape, colour, box, _ = head(patch_features(tower, normalise(pictures[rows], device)))
        bins = torch.arange(BOX_BINS, device=device) / (BOX_BINS - 1)
        places = (box.softmax(-1) * bins).sum(-1).cpu().numpy()
        shapes, colours = shape.argmax(-1).cpu().numpy(), colour.argmax(-1).cpu().numpy()
        inside, bare = wanted.colour != IGNORE, wanted.shape == BACKGROUND
        for name, right in (
            ("shape", (shapes == wanted.shape)[inside]),
            ("colour", (colours == wanted.colour)[inside]),
            ("box", _overlap(places[inside], wanted.box[inside]) > 0.5),
            ("background", (shapes == wanted.shape)[bare]),
        ):
            hits[name] += int(right.sum())
            seen[name] += right.size
    return {name: hits[name] / seen[name] for name in hits}


def _warm_cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def _empty_targets(count: int) -> PatchTargets:
    return PatchTargets(
        shape=np.full((count, GRID * GRID), BACKGROUND, dtype=np.int64),
        colour=np.full((count, GRID * GRID), IGNORE, dtype=np.int64),
        box=np.zeros((count, GRID * GRID, 4), dtype=np.float32),
        centre=np.zeros((count, GRID * GRID), dtype=np.float32),
    )


def _fill_targets(targets: PatchTargets, row: int, scene: Scene, mask: NDArray[np.uint8]) -> None:
    cell = mask.shape[0] // GRID
    cells = mask.reshape(GRID, cell, GRID, cell)
    for number, item in enumerate(scene.objects, start=1):
        cover = (cells == number).mean(axis=(1, 3)).ravel()
        edge = (cover > _BARE) & (targets.colour[row] == IGNORE)
        targets.shape[row, edge] = IGNORE
        inside = cover >= _COVERED
        targets.shape[row, inside] = SHAPES.index(item.shape)
        targets.colour[row, inside] = COLOURS.index(item.colour)
        targets.box[row, inside] = item.box
        targets.centre[row, int(item.y * GRID) * GRID + int(item.x * GRID)] = 1.0


def _pick(targets: PatchTargets, rows: NDArray[np.int64]) -> PatchTargets:
    return PatchTargets(targets.shape[rows], targets.colour[rows], targets.box[rows], targets.centre[rows])


def _flip(
    pictures: NDArray[np.uint8], targets: PatchTargets, *, flipped: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], PatchTargets]:
    """Mirror the chosen pictures left to right, and their targets; both were copied by the picking."""
    pictures[flipped] = pictures[flipped][:, :, ::-1]
    for values in (targets.shape, targets.colour, targets.centre):
        values[flipped] = values[flipped].reshape(-1, GRID, GRID)[:, :, ::-1].reshape(-1, GRID * GRID)
    boxes = targets.box[flipped].reshape(-1, GRID, GRID, 4)[:, :, ::-1].reshape(-1, GRID * GRID, 4)
    targets.box[flipped] = np.stack([1 - boxes[..., 2], boxes[..., 1], 1 - boxes[..., 0], boxes[..., 3]], axis=-1)
    return pictures, targets


def _overlap(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """Intersection over union of (F, 4) boxes, pair by pair."""
    low, high = np.maximum(first[:, :2], second[:, :2]), np.minimum(first[:, 2:], second[:, 2:])
    shared = (high - low).clip(0).prod(axis=1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1) for boxes in (first, second)]
    return shared / (areas[0] + areas[1] - shared + 1e-9)  # type: ignore[no-any-return]
