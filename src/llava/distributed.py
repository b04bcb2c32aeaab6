"""Rank, world size, device and dtype: the only file that knows which accelerator there is.

Devices go through `torch.accelerator`, so CUDA, MPS, XPU and plug-in devices need no line of their own.
Several processes are those that torchrun or `llava train --devices N` started; between `joined` and its end they talk
through torch.distributed, and what they agree on here is small and goes over the CPU (gloo), beside the device's own
backend. Outside of `joined` every process counts as alone.
What needs torch imports it inside, so that commands that print help stay fast.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llava.errors import LlavaError, PeerFailedError, TrainingError, UsageError, name_nearest

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
# How long a collective waits: longer than the first process takes to write a checkpoint of a large model. A process
# that dies is noticed at once all the same (its connections close, and its launcher ends the others).
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# Set in the processes' store by the one that failed first, to its number.
FAILED_KEY = "llava/failed"
# How a lost neighbour shows up in the words of gloo, NCCL and the store.
_LOST = (
    "connection closed",
    "connection reset",
    "broken pipe",
    "socket",
    "remote process",
    "gloo",
    "nccl",
    "timed out",
)
_T = TypeVar("_T")


def rank() -> int:
    """This process's number among all, 0 when not launched by torchrun."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine, 0 when not launched by torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes work together, 1 when not launched by torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and progress."""
    return rank() == 0


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 natively (AVX512-BF16 or AMX on x86, BF16 on Arm).

    Without it bfloat16 is emulated and slower than float32; float16 on a CPU is slower everywhere (measured: 104 ms
    against 2.35 ms for a 2048 x 2048 prefill), so it is never a default there.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    text = cpuinfo.read_text(errors="replace")
    return any(flag in text for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def pick_device(name: str | None = None) -> torch.device:
    """The device to work on: the one named, else this rank's accelerator, else the CPU.

    Raises UsageError for a name torch does not know or a device that is not there.
    """
    import torch

    if name is None or name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            return torch.device("cpu")
        return _own_device(accelerator.type)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r}: not a device name; use cpu, cuda, cuda:1, mps, xpu") from error
    if device.type == "cpu":
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != device.type:
        found = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise UsageError(f"device {name!r}: not on this machine; found: {found}")
    if device.index is not None and device.index >= torch.accelerator.device_count():
        raise UsageError(f"device {name!r}: this machine has {torch.accelerator.device_count()} of them")
    if world_size() > 1 and ":" not in name:
        return _own_device(device.type)
    return device


def _own_device(kind: str) -> torch.device:
    """This process's device of a kind. Raises UsageError when more processes than devices were started."""
    import torch

    count = torch.accelerator.device_count()
    if local_rank() >= count:
        raise UsageError(f"process {local_rank()} of this machine has no device: there are {count}; start as many")
    return torch.device(kind, local_rank())


def pick_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """The number format to compute in: the one named, else bfloat16 where it is native, else float32.

    Raises UsageError for a name not in DTYPES.
    """
    import torch

    if name is not None and name != "auto":
        if name not in DTYPES:
            raise UsageError(f"dtype {name!r}: {name_nearest(name, DTYPES)}")
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


# --- several processes -------------------------------------------------------------------------------------------


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Work with the other processes for the time of the block; one alone, or one that has joined, has nothing to do.

    An error that is raised here is announced to the others; where it is the first one of the run it goes on as it is,
    and on every process that fails because of it a PeerFailedError takes its place. A process that vanishes without
    a word gives a TrainingError on the others. Raises UsageError when the processes cannot find each other.
    """
    if world_size() == 1 or is_joined():
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    try:
        store, number, count = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    except ValueError as error:
        raise UsageError(f"RANK and WORLD_SIZE are set, but {error}; start with `--devices N` or torchrun") from error
    backend = dist.get_default_backend_for_device(device.type)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
        backend = f"cpu:gloo,{device.type}:{backend}"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=COLLECTIVE_TIMEOUT)
    whole = True
    try:
        yield
    except Exception as error:
        whole = False
        first = _first_to_fail(store, error)
        if first is None:
            lost = " ".join(str(error).split())[:200]
            raise TrainingError(f"lost the connection to another process, which ended or hangs ({lost})") from error
        if first != number:
            raise PeerFailedError(f"process {first} failed first") from error
        raise
    finally:
        # gloo's thread may still need Python's lock to let go of the last message's tensor. What destroys the group
        # waits for that thread with the lock held, for ever, when an error gets there in under 5 ms.
        time.sleep(0.05)
        if whole or device.type == "cpu":  # a device's group may wait for messages that never come
            dist.destroy_process_group()


def is_joined() -> bool:
    """Whether this process works with others now."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def process_count() -> int:
    """How many processes work together now: world_size() inside of `joined`, else 1."""
    return world_size() if is_joined() else 1


def process_number() -> int:
    """This process's number among those that work together now: rank() inside of `joined`, else 0."""
    return rank() if is_joined() else 0


def sum_over_processes(*values: float) -> list[float]:
    """Each value summed over all processes (in float64, in the same order everywhere)."""
    return [sum(column) for column in zip(*gather_rows(*values), strict=True)]


def any_process(flag: bool) -> bool:
    """Whether the flag is up on any process; the same answer on all."""
    return any(row[0] for row in gather_rows(float(flag)))


def gather_rows(*values: float) -> list[list[float]]:
    """The values of every process, by process number."""
    if not is_joined():
        return [list(values)]
    import torch
    import torch.distributed as dist

    rows = torch.zeros(world_size(), len(values), dtype=torch.float64)
    rows[rank()] = torch.tensor(values, dtype=torch.float64)
    # Every other row of the sum is a zero, so nothing is rounded.
    dist.all_reduce(rows)
    found: list[list[float]] = rows.tolist()
    return found


def share_object(value: _T) -> _T:
    """Process 0's value, on every process. For small things of plain Python."""
    if not is_joined():
        return value
    import torch
    import torch.distributed as dist

    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    shared: _T = box[0]
    return shared


def refuse_difference(what: str, value: str) -> None:
    """Raise TrainingError on every process when `value` is not the same on all."""
    import hashlib

    number = int.from_bytes(hashlib.sha256(value.encode()).digest()[:6], "big")  # exact in a float64
    rows = gather_rows(float(number))
    odd = [process for process, row in enumerate(rows) if row != rows[0]]
    if odd:
        raise TrainingError(f"{what} on process {odd[0]} is not that of process 0; give every machine the same files")


def _first_to_fail(store: Any, error: Exception) -> int | None:
    """The process that failed first, which may be this one; None when a neighbour is gone without having said why."""
    is_echo = not isinstance(error, LlavaError) and any(word in str(error).lower() for word in _LOST)
    try:
        if not is_echo:
            return int(store.compare_set(FAILED_KEY, "", str(rank())))
        for _ in range(20):  # the one that failed may still be on its way to say so
            if store.check([FAILED_KEY]):
                return int(store.get(FAILED_KEY))
            time.sleep(0.1)
    except RuntimeError:  # the store went away with the process that kept it
        return None if is_echo else rank()
    return None
