"""A step spread over processes: DDP, or FSDP2 in the manner of ZeRO-2 and ZeRO-3.

The gradient is that of one process with all of the step's conversations: the sum over every process's answer tokens,
divided by the answer tokens of the whole step. Both wrappers average over processes, so the loss is multiplied by their
number first. Every process calls the wrapped module equally often, with blank batches where its share is smaller.

    ddp    every process holds everything; gradients are summed once, in the step's last backward pass
    zero2  gradients and optimizer are cut in as many parts as there are processes; weights are gathered once a pass
    zero3  the weights too: a block's are gathered when it is needed, and let go after it

Under zero2 and zero3 each micro-batch's gradients are reduced at once. Waiting for the last would spare communication,
but keep whole gradients on every process, which is what one chose them to avoid. Weights stay in float32; those of the
blocks are gathered in the number format of matrix products, which is what autocast computes with on one process.
Not covered: sharding over a part of the processes (hybrid), tensor parallelism, 4-bit weights with zero2 and zero3.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from llava.data.batch import Batch
from llava.distributed import process_count, process_number, refuse_difference
from llava.errors import RecipeError
from llava.model.checkpointing import find_blocks
from llava.model.llava import Llava
from llava.train.optimizer import clip_gradients
from llava.train.step_loss import StepLoss

Mode = Literal["one", "ddp", "zero2", "zero3"]

# Up to here every process can well hold weights, gradients and moments of what learns: 16 bytes a parameter.
DDP_LIMIT = 1_000_000_000


class Parallel:
    """A model wrapped for the processes at hand, and the few operations that differ by how it is wrapped.

    Wrapping changes the model in place (under zero2 and zero3 its parameters become DTensors), so it comes after
    freezing, adapters and activation checkpointing, and before the optimizer. device: of this process's step.
    """

    def __init__(
        self, model: Llava, *, mode: Mode, device: torch.device, dtype: torch.dtype, cpu_offload: bool = False
    ) -> None:
        assert (mode == "one") == (process_count() == 1)
        self.model = model
        self.mode = mode
        self.device = device
        self.processes = process_count()
        self.step_loss = StepLoss(model, dtype=dtype, with_all_parts=mode != "one")
        self._ddp: DistributedDataParallel | None = None
        if mode == "ddp":
            self._ddp = _wrap_ddp(self.step_loss)
        elif self.is_sharded:
            _shard(self.step_loss, mode=mode, device=device, dtype=dtype, cpu_offload=cpu_offload)

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds the whole model."""
        return self.mode in ("zero2", "zero3")

    def describe(self) -> str:
        """How and on what a step is computed, for the line before the first step."""
        return str(self.device) if self.mode == "one" else f"{self.processes} x {self.device.type} ({self.mode})"

    def backward(self, batch: Batch, *, scale: float, last: bool) -> Tensor:
        """Add the gradient of a batch's summed loss times `scale`, summed over all processes' batches; `last` says that
        the step is at its last. Returns this process's summed loss, without `scale` and without a graph."""
        with self._without_sync() if not last else nullcontext():
            scale *= self.processes
            loss = cast(Tensor, (self._ddp or self.step_loss)(batch, scale))
            # Text alone teaches nothing where the language model is frozen.
            if loss.requires_grad:
                torch.autograd.backward(loss)
        return loss.detach() / scale

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """Scale the gradients to a norm of at most `limit` over all processes; returns the norm before."""
        if not self.is_sharded:
            return clip_gradients(parameters, limit)
        gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
        squares = torch.zeros((), device=self.device)
        if gradients:
            squares = torch.stack(torch._foreach_norm(gradients)).to(self.device).square().sum()
        dist.all_reduce(squares)
        norm = float(squares.sqrt())
        if norm > limit:
            # As torch.nn.utils.clip_grad_norm_; a norm that is not finite scales nothing here, the step is skipped.
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        return norm

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors from sharded ones, on process 0's CPU, one after another; the other processes get none.

        A call of all processes with the same names. Tensors that are not sharded are process 0's own.
        """
        if not self.is_sharded:
            return dict(tensors)
        whole = {}
        for name, tensor in tensors.items():
            gathered = _gather_one(tensor, self.device)
            if process_number() == 0:
                whole[name] = gathered
        return whole

    def spread(self, whole: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The tensors that process 0 has, on every process; those of a sharded parameter (`model.NAME` or
        `optimizer.KEY.NAME`) as its own part of them. The other processes pass None."""
        if self.processes == 1:
            assert whole is not None
            return dict(whole)
        box: list[Any] = [None if whole is None else [(name, t.shape, t.dtype) for name, t in whole.items()]]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        parameters: dict[str, Any] = dict(self.model.named_parameters())
        spread = {}
        for name, shape, dtype in box[0]:
            tensor = whole[name].to(self.device) if whole else torch.empty(shape, dtype=dtype, device=self.device)
            dist.broadcast(tensor, src=0)
            own: Any = parameters.get(_parameter_of(name))
            if is_sharded(own) and own.shape == tensor.shape:
                # Every process has all of it now, so nothing is sent again; its part moves to where the weights lie.
                part = distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)
                tensor = part.to(own.to_local().device)
            spread[name] = tensor if own is not None else tensor.cpu()
        return spread

    def make_whole(self) -> bool:
        """After the last step: give process 0 a model of plain CPU tensors again, to be saved. True where it is whole.

        The others' models are emptied. No further step can be taken.
        """
        if not self.is_sharded:
            return process_number() == 0
        keeps = process_number() == 0
        done: dict[int, nn.Parameter] = {}  # tied weights stay tied
        for module in self.model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in done:
                    gathered = _gather_one(parameter, self.device)
                    done[id(parameter)] = nn.Parameter(
                        gathered if keeps else gathered.new_empty(0), requires_grad=parameter.requires_grad
                    )
                module._parameters[leaf] = done[id(parameter)]
        return keeps

    def _without_sync(self) -> AbstractContextManager[None]:
        return nullcontext() if self._ddp is None else cast(AbstractContextManager[None], self._ddp.no_sync())


def choose_mode(asked: str, model: nn.Module) -> Mode:
    """What `run.parallel` comes to with the processes at hand. Raises RecipeError for what cannot be."""
    if process_count() == 1:
        return "one"
    mode: Mode = cast(Mode, asked)
    if asked == "auto":
        learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
        mode = "ddp" if learns <= DDP_LIMIT else "zero3"
    if mode != "ddp" and any(not p.is_floating_point() for p in model.parameters()):
        raise RecipeError(f"run.parallel: {mode} cannot shard 4-bit weights; set run.parallel to ddp")
    return mode


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over processes."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor; a whole one as it is."""
    return cast(Tensor, tensor.to_local() if is_sharded(tensor) else tensor)


def _wrap_ddp(step_loss: StepLoss) -> DistributedDataParallel:
    trained = {name: p for name, p in step_loss.named_parameters() if p.requires_grad}
    refuse_difference("the list of what learns", repr([(name, tuple(p.shape)) for name, p in trained.items()]))
    for parameter in trained.values():
        dist.broadcast(parameter.data, src=0)
    # Frozen weights come from files and are compared by digest; sending them as well would take minutes.
    # Buffers are constants (rotary frequencies); newer torch has another word for not sending them at every pass.
    known = inspect.signature(DistributedDataParallel).parameters
    quiet = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    settings: dict[str, Any] = {"init_sync": False, "gradient_as_bucket_view": True, quiet: False}
    return DistributedDataParallel(step_loss, **settings)


def _shard(step_loss: StepLoss, *, mode: Mode, device: torch.device, dtype: torch.dtype, cpu_offload: bool) -> None:
    """Shard block by block, and what is left with the root: embeddings, projector, norms, output layer.

    The tower's blocks and not the tower: FSDP2 renames the class of what it wraps, and transformers 5 finds the hidden
    states to return by class name.
    """
    model = step_loss.model
    low = dtype in (torch.bfloat16, torch.float16)
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=device.type != "cpu") if cpu_offload else OffloadPolicy()
    common: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (process_count(),)),
        "offload_policy": offload,
        "reshard_after_forward": mode == "zero3",
    }
    for block in (*find_blocks(model.vision_tower), *find_blocks(model.decoder)):
        # Autocast computes layer_norm in float32 on devices, but on the CPU it takes no weights of another format.
        refuses = device.type == "cpu" and any(isinstance(module, nn.LayerNorm) for module in block.modules())
        fully_shard(block, mp_policy=policy if low and not refuses else plain, **common)
    # The root is not let go of between the passes: the backward pass begins with its output layer.
    fully_shard(step_loss, mp_policy=plain, **{**common, "reshard_after_forward": False})


def _gather_one(tensor: Any, device: torch.device) -> Tensor:
    """A whole tensor on the CPU. Offloaded parts travel through the device, whose backend knows how."""
    part = tensor.detach()
    if is_sharded(part):
        if part.to_local().device.type != device.type:
            part = part.to(device)
        part = part.full_tensor()
    return cast(Tensor, part.cpu())


def _parameter_of(name: str) -> str:
    """The parameter that a tensor of a checkpoint belongs to, "" for none."""
    kind, _, rest = name.partition(".")
    if kind == "model":
        return rest
    return rest.partition(".")[2] if kind == "optimizer" else ""


def sharded_modules(module: nn.Module) -> Iterator[str]:
    """The paths of the modules that FSDP2 gathers as one."""
    for name, child in module.named_modules():
        if isinstance(child, FSDPModule):
            yield name
