"""What a run will need before it starts: memory a device, by component.

    estimate = estimate_memory(model, MicroBatch.of(batch), dtype=torch.bfloat16)
    estimate.total, estimate.weights, estimate.activations

Weights, gradients and moments are counted exactly from the model's parameters; what a forward and backward pass holds
is traced with fake tensors (train/memory_trace.py) through the model's own code, with whatever adapters and
recomputation are on it. `model` may be a real one or one made under `FakeTensorMode` from a configuration alone.

What many processes change is arithmetic: ZeRO-2 keeps a process's share of float32 weights, gradients and moments and
the whole weights in the computing dtype; ZeRO-3 keeps two blocks of them at a time (Rajbhandari et al. 2020,
arXiv:1910.02054, section 5).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import nn

from llava.data.batch import Batch
from llava.model.last_block import last_block_only_at
from llava.model.llava import Llava
from llava.model.tree_attention import TreeLayout
from llava.model.tree_support import find_tree_support
from llava.train.adamw_8bit import BLOCK, SMALLEST
from llava.train.loss import answer_loss
from llava.train.memory_trace import MemoryTrace, Peak, fake_copy, fake_layout

# What a driver, its libraries' workspaces and the allocator's fragments take beside the tensors: an assumption.
RESERVE_BYTES = 1 << 30
FRAGMENT_SHARE = 0.03
_BLOCKS_IN_FLIGHT = 2  # FSDP gathers the next block while one computes

OptimizerName = Literal["adamw", "adamw_8bit"]


@dataclass(frozen=True)
class MicroBatch:
    """What goes forward at once: `rows` of `tokens`, answer tokens among them, tiles (pictures, or parts of them).

    layout: where trees lie, when attention goes by trees; without it rows are taken as plain causal ones.
    """

    rows: int
    tokens: int
    answer_tokens: int
    tiles: int
    layout: TreeLayout | None = None

    @classmethod
    def of(cls, batch: Batch, *, by_trees: bool = True) -> MicroBatch:
        """The shape of a batch."""
        rows, tokens = batch.input_ids.shape
        tiles = 0 if batch.pixel_values is None else len(batch.pixel_values)
        return cls(rows, tokens, batch.num_answer_tokens, tiles, batch.layout if by_trees else None)


@dataclass(frozen=True)
class Sharding:
    """How many processes share a model, and how."""

    mode: Literal["none", "ddp", "zero2", "zero3"] = "none"
    processes: int = 1
    cpu_offload: bool = False

    @property
    def shards(self) -> int:
        """Into how many parts weights, gradients and moments are cut."""
        return self.processes if self.mode in ("zero2", "zero3") else 1


@dataclass(frozen=True)
class ModelState:
    """Bytes that a model holds whatever goes through it: exact sums over its parameters and buffers.

    compute_blocks: the weights of all blocks of layers in the computing dtype, largest_block: those of the largest;
    outside_blocks: all other weights (embeddings, output layer, projector) as they are; outside_gradients: theirs.
    """

    weights: int
    gradients: int
    optimizer: int
    compute_blocks: int
    largest_block: int
    outside_blocks: int
    outside_gradients: int

    @property
    def compute_weights(self) -> int:
        """All weights as a step computes with them."""
        return self.compute_blocks + self.outside_blocks


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a step, by component; `total` is their sum.

    weight_copies: weights in the computing dtype beside the float32 ones (autocast's, or gathered by FSDP);
    activations: what the language model's layers keep for the backward pass; logits: scores at answer positions;
    pictures: pixels, the tower and the projector; backward: what the backward pass holds beside the gradients;
    reserve: driver, workspaces and fragments (an assumption, none on a CPU). host: bytes in CPU memory (offload).
    """

    weights: int
    gradients: int
    optimizer: int
    weight_copies: int
    activations: int
    logits: int
    pictures: int
    backward: int
    reserve: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(int(getattr(self, field.name)) for field in fields(self)) - self.host

    def rows(self) -> list[tuple[str, int]]:
        """(component, bytes) of what is not zero, the total last."""
        named = [(field.name.replace("_", " "), int(getattr(self, field.name))) for field in fields(self)]
        return [*[(name, size) for name, size in named if size and name != "host"], ("total", self.total)]


def estimate_memory(
    model: Llava,
    batch: MicroBatch,
    *,
    dtype: torch.dtype,
    optimizer: OptimizerName = "adamw",
    sharding: Sharding = Sharding(),
    accumulates: bool = True,
    on_accelerator: bool | None = None,
) -> MemoryEstimate:
    """The memory that training this model on micro-batches of this shape takes on each device.

    model: stage applied (what trains has requires_grad), recomputation set up; real or fake, and left as it is.
    dtype: what matrix products are computed in. accumulates: a step has several micro-batches, so that the last one's
    activations stand beside the first one's gradients. on_accelerator: reckon with a driver's share (None: where the
    model lies on one).
    """
    state = count_state(model, optimizer, dtype=dtype)
    peak = trace_step(model, batch, dtype=dtype, accumulates=accumulates)
    device = next(model.parameters()).device
    shards = sharding.shards
    copies, backward = peak.of(MemoryTrace.COPIES), peak.of("backward")
    if shards > 1:
        # FSDP gathers blocks in the computing dtype, and what is outside of them for the whole step.
        in_flight = min(state.compute_blocks, _BLOCKS_IN_FLIGHT * state.largest_block)
        copies = state.outside_blocks + (state.compute_blocks if sharding.mode == "zero2" else in_flight)
        backward += state.outside_gradients + (state.largest_block if state.gradients else 0)
    # Gradients that the trace saw grow are not counted again.
    gradients = state.gradients // shards if accumulates else 0
    own = (state.weights // shards, gradients, state.optimizer // shards)
    offloaded = sharding.cpu_offload and shards > 1
    weights, gradients, moments = (0, 0, 0) if offloaded else own
    estimate = MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=moments,
        weight_copies=copies,
        activations=peak.of("language model"),
        logits=peak.of("logits"),
        pictures=peak.of("pictures"),
        backward=backward,
        reserve=0,
        host=sum(own) if offloaded else 0,
    )
    if not (device.type != "cpu" if on_accelerator is None else on_accelerator):
        return estimate
    return replace(estimate, reserve=RESERVE_BYTES + int(FRAGMENT_SHARE * estimate.total))


def count_state(model: nn.Module, optimizer: OptimizerName = "adamw", *, dtype: torch.dtype) -> ModelState:
    """Exact bytes of weights, gradients and moments as one process holds them."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [list(block.parameters()) for stack in stacks for block in stack]
    inside = {id(p) for block in blocks for p in block}
    sizes = [sum(p.numel() * min(dtype.itemsize, p.element_size()) for p in block) for block in blocks]
    outside = [p for p in parameters if id(p) not in inside]
    return ModelState(
        weights=sum(t.numel() * t.element_size() for t in [*parameters, *model.buffers()]),
        gradients=sum(p.numel() * p.element_size() for p in trained),
        optimizer=sum(_moment_bytes(p, optimizer) for p in trained),
        compute_blocks=sum(sizes),
        largest_block=max(sizes, default=0),
        outside_blocks=sum(p.numel() * p.element_size() for p in outside),
        outside_gradients=sum(p.numel() * p.element_size() for p in outside if p.requires_grad),
    )


def trace_step(model: Llava, batch: MicroBatch, *, dtype: torch.dtype, accumulates: bool = True) -> Peak:
    """The peak of one micro-batch's forward and backward pass, beyond the weights (and gradients, if it accumulates).

    Phases: "pictures", "language model", "logits", "backward", and MemoryTrace.COPIES.
    """
    picks = find_tree_support(model.language_model).last_block
    fake, mode = fake_copy(model)
    before = {name: p.grad for name, p in fake.named_parameters()}
    device = next(fake.parameters()).device
    side = fake.config.image_size
    shape = (batch.rows, batch.tokens)
    with mode:
        for parameter in fake.parameters():
            parameter.grad = torch.empty_like(parameter) if accumulates and parameter.requires_grad else None
        layout = None if batch.layout is None else fake_layout(batch.layout, mode)
        read = torch.arange(batch.answer_tokens, device=device) if picks and batch.answer_tokens else None
        trace = MemoryTrace(fake)
        with trace:
            with _autocast(device, dtype):
                with trace.phase("language model"):
                    ids = torch.zeros(shape, dtype=torch.long, device=device)
                with trace.phase("pictures"):
                    pixels = torch.empty(batch.tiles, 3, side, side, device=device)
                    features = fake.encode_tiles(pixels) if batch.tiles else None
                with trace.phase("language model"):
                    embeddings = fake.embed_tokens(ids)
                    if features is not None:
                        is_image = (ids == 0)[..., None]
                        embeddings = embeddings.masked_scatter(is_image, features.flatten(0, 1).to(embeddings))
                    with last_block_only_at(fake.language_model, read):
                        hidden = fake.decode(
                            embeddings, position_ids=None if layout is None else ids, tree_layout=layout
                        )
                with trace.phase("logits"):
                    answers = torch.zeros(max(batch.answer_tokens, 1), dtype=torch.long, device=device)
                    loss = answer_loss(hidden, fake, predictors=answers, targets=answers)
                del embeddings, hidden, features
            with trace.phase("backward"):
                torch.autograd.backward(loss)
    for name, parameter in fake.named_parameters():
        parameter.grad = before[name]
    return trace.peak()


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    if dtype in (torch.float32, torch.float64):
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def _moment_bytes(parameter: nn.Parameter, optimizer: OptimizerName) -> int:
    count = parameter.numel()
    step = 4  # its number
    if optimizer == "adamw_8bit":
        small = count < SMALLEST
        return step + (8 * count if small else 2 * (count + 4 * math.ceil(count / BLOCK)))
    return step + 2 * count * parameter.element_size()
