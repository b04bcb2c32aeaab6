"""How much arithmetic a run needs, how fast a device does it, and so how many hours it takes.

*Needed* FLOPs are what the mathematics asks for: no recomputation, no padding, weight gradients only of what trains,
scores only at answer positions; the last block counts whole, as is customary, though only a part of it is computed
(model/last_block.py). Model FLOPs utilisation (MFU) is needed FLOPs a second over the device's peak
(Chowdhery et al. 2022, arXiv:2204.02311, appendix B). Published LLaVA-1.5 training reached 26 % (7B, stage 2) and 29 %
(stage 1) on A100s by this count.

Not covered: mixtures of experts (their weights are no linear layers here), and towers of other than plain blocks are
counted by their linear layers alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llava.data.batch import PADDING_TREE, Batch
from llava.errors import UsageError, name_nearest
from llava.model.llava import Llava
from llava.model.vision import PLAIN_STACKS

# What training of this kind reaches of a device's peak unless said otherwise: an assumption, between the published
# LLaVA-1.5 (26 to 29 %, with padding and recomputation) and the best packed language model runs (50 %).
ASSUMED_MFU = 0.4
_MEASURED_SECONDS = 4e-3  # long against the clock and the call, short against a run


@dataclass(frozen=True)
class Device:
    """A device: name, dense matrix products in bfloat16 with float32 sums (float16 where there is no bfloat16), in
    TFLOP/s, and its memory in bytes. measured: the rate was measured here rather than read off the maker's sheet."""

    name: str
    teraflops: float
    memory: int
    measured: bool = False


def _device(name: str, teraflops: float, gigabytes: float) -> tuple[str, Device]:
    return name, Device(name, teraflops, int(gigabytes * 2**30))


# Dense figures of the makers' data sheets (never the ones "with sparsity"); SXM where a card comes in several forms.
DEVICES = dict(
    _device(*row)
    for row in (
        ("b200", 2250, 180),
        ("h200", 989, 141),
        ("h100", 989, 80),
        ("h100-pcie", 756, 80),
        ("a100", 312, 80),
        ("a100-40g", 312, 40),
        ("l40s", 362, 48),
        ("6000ada", 364, 48),
        ("a6000", 155, 48),
        ("a10", 125, 24),
        ("l4", 121, 24),
        ("5090", 210, 32),
        ("4090", 165, 24),
        ("3090", 71, 24),
        ("v100", 125, 32),
        ("t4", 65, 16),
        ("mi300x", 1307, 192),
    )
)
# In the order of looking: part of what a driver calls a card -> our name for it.
_DRIVER_NAMES = (
    ("b200", "b200"),
    ("h200", "h200"),
    ("h100 pcie", "h100-pcie"),
    ("h100", "h100"),
    ("a100-sxm4-40gb", "a100-40g"),
    ("a100-pcie-40gb", "a100-40g"),
    ("a100", "a100"),
    ("l40s", "l40s"),
    ("6000 ada", "6000ada"),
    ("rtx a6000", "a6000"),
    ("nvidia a10", "a10"),
    ("nvidia l4", "l4"),
    ("5090", "5090"),
    ("4090", "4090"),
    ("3090", "3090"),
    ("v100", "v100"),
    ("tesla t4", "t4"),
    ("mi300x", "mi300x"),
)


def named_device(name: str) -> Device:
    """A device of the table. Raises UsageError with the nearest name."""
    found = DEVICES.get(name.lower())
    if found is None:
        raise UsageError(f"device {name!r} is not in the table; {name_nearest(name.lower(), DEVICES)}")
    return found


def this_device(device: torch.device, dtype: torch.dtype) -> Device:
    """The device at hand: from the table where its driver's name is in it, else by a short measurement."""
    if device.type == "cpu":
        return Device(f"this CPU ({torch.get_num_threads()} threads)", measure_rate(device, dtype), main_memory(), True)
    module = torch.get_device_module(device)
    called = str(module.get_device_name(device))
    memory = int(module.mem_get_info(device)[1]) if hasattr(module, "mem_get_info") else 0
    known = next((DEVICES[ours] for part, ours in _DRIVER_NAMES if part in called.lower()), None)
    if known is None or dtype == torch.float32:
        return Device(called, measure_rate(device, dtype), memory, True)
    return Device(called, known.teraflops, memory)


def measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of square matrix products: the best of three, of the first size that takes some milliseconds."""
    side, best = 256, 0.0
    while best < _MEASURED_SECONDS and side < 16384:
        side *= 2
        left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
        best = min(_time_product(left, right) for _ in range(3))
    return 2 * side**3 / best / 1e12


def _time_product(left: torch.Tensor, right: torch.Tensor) -> float:
    on_device = left.device.type != "cpu"
    if on_device:
        torch.accelerator.synchronize(left.device)
    started = time.perf_counter()
    torch.mm(left, right)
    if on_device:
        torch.accelerator.synchronize(left.device)
    return time.perf_counter() - started


# --- needed FLOPs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What goes through a model: tokens without padding, answer tokens among them, tiles, and pairs of a token with one
    that it may see (itself included)."""

    tokens: int
    answer_tokens: int
    tiles: int
    pairs: int

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens,
            self.answer_tokens + other.answer_tokens,
            self.tiles + other.tiles,
            self.pairs + other.pairs,
        )

    def times(self, factor: float) -> Work:
        """So many times as much."""
        return Work(*(round(value * factor) for value in vars(self).values()))

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> Work:
        """The work in batches. A token sees as many tokens as its position says, and itself."""
        done = cls(0, 0, 0, 0)
        for batch in batches:
            real = batch.tree_ids != PADDING_TREE
            tiles = 0 if batch.pixel_values is None else len(batch.pixel_values)
            pairs = int((batch.position_ids[real] + 1).sum())
            done += cls(batch.num_tokens, batch.num_answer_tokens, tiles, pairs)
        return done


@dataclass(frozen=True)
class Cost:
    """Needed FLOPs of training, forward and backward, for one of each: token, answer token, tile, pair."""

    token: float
    answer_token: float
    tile: float
    pair: float

    def of(self, work: Work) -> float:
        """Needed FLOPs of some work."""
        return (
            self.token * work.tokens
            + self.answer_token * work.answer_tokens
            + self.tile * work.tiles
            + self.pair * work.pairs
        )

    @classmethod
    def of_model(cls, model: Llava) -> Cost:
        """What this model with this stage costs. model may be fake (shapes without values).

        A linear layer of P numbers costs 2 P a token forward, 2 P for the gradient of its input where something below
        it trains, 2 P for its own where it trains itself.
        """
        config = model.config
        skipped = _unused_blocks(model)
        tower_layers = [m for m in _linears(model.vision_tower) if id(m) not in skipped]
        tower, below = _linear_cost(tower_layers, below=False)
        patches = config.patches_per_side**2 + int(config.tower_has_cls)
        tower_width = int(config.vision_config["hidden_size"])
        blocks = len({id(b) for b in _tower_blocks(model)} - skipped)
        attention = 4 * tower_width * patches * patches * blocks * (3 if below else 1)
        stem = sum(
            2 * m.weight.numel() * config.patches_per_side**2
            for m in model.vision_tower.modules()
            if isinstance(m, nn.Conv2d)
        )
        projector, below = _linear_cost(_linears(model.multi_modal_projector), below=below)
        below = below or any(p.requires_grad for p in model.embed_tokens.parameters())
        decoder, below = _linear_cost(_linears(model.decoder), below=below)
        head, _ = _linear_cost(_linears(model.lm_head), below=below)
        text = config.text_config
        heads = int(text.get("num_attention_heads") or text["n_heads"])
        width = heads * int(text.get("head_dim") or config.text_width // heads)
        layers = int(text.get("num_hidden_layers") or text["n_layers"])
        return cls(
            token=decoder,
            answer_token=head,
            tile=tower * patches + attention + stem + projector * config.features_per_tile,
            pair=4.0 * width * layers * (3 if below else 1),
        )


def _linear_cost(layers: Iterable[nn.Module], *, below: bool) -> tuple[float, bool]:
    """(FLOPs a token of layers in order, whether anything up to here trains)."""
    cost = 0.0
    for layer in layers:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        trains = weight.requires_grad
        numbers = _shape_numel(layer)
        cost += 2.0 * numbers * (1 + below + trains)
        below = below or trains
    return cost, below


def _linears(module: nn.Module) -> list[nn.Module]:
    """The linear layers in a module, in order, those with quantised weights too."""
    return [m for m in module.modules() if hasattr(m, "in_features") and hasattr(m, "out_features") and _has_weight(m)]


def _has_weight(module: nn.Module) -> bool:
    """peft's layers hand through the sizes of the layer inside them; those count once."""
    return isinstance(module._parameters.get("weight"), torch.Tensor)


def _shape_numel(layer: nn.Module) -> int:
    """Numbers in a linear layer's weight; packed 4-bit weights hold two a byte, so its sizes are asked."""
    return int(layer.in_features) * int(layer.out_features)  # type: ignore[arg-type]


def _tower_blocks(model: Llava) -> Sequence[nn.Module]:
    stack: object = getattr(model.vision_tower, "vision_model", model.vision_tower)
    encoder = getattr(stack, "encoder", None)
    return list(getattr(encoder, "layers", []))


def _unused_blocks(model: Llava) -> set[int]:
    """ids of the tower's modules that no feature depends on: blocks behind the chosen layer, heads and poolers."""
    if model.config.vision_config["model_type"] not in PLAIN_STACKS:
        return set()
    blocks = _tower_blocks(model)
    layer = model.config.vision_feature_layer
    layers = (layer,) if isinstance(layer, int) else layer
    used = max(index + len(blocks) + 1 if index < 0 else index for index in layers)
    kept = {id(m) for block in blocks[:used] for m in block.modules()}
    return {id(m) for m in model.vision_tower.modules()} - kept


def hours(flops: float, device: Device, *, processes: int = 1, mfu: float = ASSUMED_MFU) -> float:
    """Hours of so many needed FLOPs on so many devices at this share of their peak."""
    return flops / (device.teraflops * 1e12 * mfu * processes) / 3600


def main_memory() -> int:
    """Bytes of main memory; a container's limit counts. 0 where the system does not say."""
    import os
    from pathlib import Path

    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total
