"""How much memory a training step takes, found by running it on tensors that have shapes and no values.

torch's fake tensors run the very code of a step (autocast, adapters, recomputation, attention by trees) in about a
second at 7B and allocate nothing, so that the figure follows the code rather than a formula beside it. Every storage
that the step makes is noted when it comes and when it goes; the peak is where the most were alive.

Not covered: what an allocator loses to rounding and fragments, and what kernels take inside (cuBLAS, cuDNN).
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava.model.tree_attention import TreeLayout

M = TypeVar("M", bound=nn.Module)


def fake_copy(model: M, *, always: bool = False) -> tuple[M, FakeTensorMode]:
    """A copy of a module whose parameters and buffers have shape, dtype and device, and no values.

    A module that is fake already is returned as it is, unless `always`. Work with the copy under `with mode:`.
    """
    tensors = [*model.parameters(), *model.buffers()]
    first = tensors[0].data if tensors else None
    if isinstance(first, FakeTensor) and not always:
        return model, first.fake_mode
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    with mode:
        for tensor in tensors:
            device = torch.device("cpu") if tensor.is_meta else tensor.device  # autocast knows no meta device
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            made = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            memo[id(tensor)] = made
    # deepcopy takes what stands in its memo for the original, so that tied weights stay tied.
    return copy.deepcopy(model, memo), mode


def fake_layout(layout: TreeLayout, mode: FakeTensorMode) -> TreeLayout:
    """A tree layout of the same shapes without values."""
    with mode:
        return layout.mapped(lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device))


@dataclass(frozen=True)
class Peak:
    """The most that was alive at once: bytes in all, and by the phase in which each storage was made."""

    total: int
    by_phase: Mapping[str, int]

    def of(self, phase: str) -> int:
        """Bytes that were made in a phase and alive at the peak."""
        return self.by_phase.get(phase, 0)


class MemoryTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes storages that operations make. Parameters are known from the start and not counted.

    COPIES: copies of parameters in another dtype (autocast's), whatever the phase.
    """

    COPIES = "copies"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._phase = ""
        self._events: list[tuple[str, int]] = []  # (phase, bytes made, or minus bytes gone)
        self._known: dict[int, int] = {}  # storage -> bytes
        self._parameters = {_key(p) for p in [*model.parameters(), *model.buffers()]}
        # .grad lies in storages of its own, counted apart by the caller.
        self._parameters |= {_key(p.grad) for p in model.parameters() if p.grad is not None}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is made inside is filed under this name."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def peak(self) -> Peak:
        """The largest sum of living storages so far."""
        now = highest = at = 0
        for index, (_, size) in enumerate(self._events):
            now += size
            if now > highest:
                highest, at = now, index
        alive: Counter[str] = Counter()
        for phase, size in self._events[: at + 1]:
            alive[phase] += size
        return Peak(highest, {phase: size for phase, size in alive.items() if size})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        phase = self._phase
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], Tensor):
            phase = self.COPIES if _key(args[0]) in self._parameters else phase
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf, phase)
        return result

    def _note(self, tensor: Tensor, phase: str) -> None:
        storage = tensor.untyped_storage()
        key = _key(tensor)
        if key in self._known or key in self._parameters:
            return
        size = storage.nbytes()
        self._known[key] = size
        self._events.append((phase, size))
        weakref.finalize(storage, self._forget, key, phase)

    def _forget(self, key: int, phase: str) -> None:
        self._events.append((phase, -self._known.pop(key, 0)))


def _key(tensor: Tensor) -> int:
    return cast(int, tensor.untyped_storage()._cdata)
