"""A language model over several devices, its blocks one after the other: for models that one device cannot hold.

Vision tower, projector, embeddings and output head lie on the first device; the blocks are dealt in order, so that each
device holds about as many bytes. accelerate's hooks carry the hidden states from one device to the next, so only one
device computes at a time: this makes a model fit, not fast. Not run on several accelerators yet; the tests spread a
model over the CPU and the disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from llava.errors import UsageError
from llava.model.llava import Llava


def spread_devices(name: str) -> list[torch.device]:
    """The devices that "spread" (all of them) or a list "cuda:0,cuda:1" means. Raises UsageError for fewer than two."""
    from llava.distributed import pick_device

    if name == "spread":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        count = 0 if accelerator is None else torch.accelerator.device_count()
        if accelerator is None or count < 2:
            raise UsageError(f"device 'spread': needs two accelerators or more, and this machine has {count}")
        return [torch.device(accelerator.type, index) for index in range(count)]
    devices = [pick_device(part.strip()) for part in name.split(",")]
    if len(set(devices)) != len(devices):
        raise UsageError(f"device {name!r}: names a device twice")
    return devices


def plan_spread(model: Llava, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Module path in the language model -> device. The model may be without values (on the meta device)."""
    language_model = model.language_model
    blocks = block_list(language_model)
    parts = dict(language_model.named_modules())
    path = next(name for name, module in parts.items() if module is blocks)
    sizes = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks]
    rest = sum(parameter.nbytes for parameter in model.parameters()) - sum(sizes)
    share = (sum(sizes) + rest) / len(devices)
    plan = dict.fromkeys(_leaves_outside(language_model, path), devices[0])
    held = float(rest)  # the first device holds everything that is not a block
    for number, size in enumerate(sizes):
        # A block belongs to the device in whose share its middle lies.
        index = min(int((held + size / 2) / share), len(devices) - 1)
        plan[f"{path}.{number}"] = devices[index]
        held += size
    return plan


def place_of(name: str, plan: Mapping[str, Any], default: torch.device) -> Any:
    """Where a parameter of the whole model belongs under a plan."""
    inner = name.removeprefix("language_model.")
    if inner == name:
        return default
    for path, device in plan.items():
        if inner.startswith(f"{path}."):
            return device
    return default


def carry_between(model: Llava, plan: Mapping[str, Any], **options: Any) -> None:
    """Put the hooks in that carry hidden states from device to device. options: of accelerate.dispatch_model."""
    from accelerate import dispatch_model

    first = next(iter(plan.values()))
    dispatch_model(model.language_model, device_map=dict(plan), main_device=first, force_hooks=True, **options)


def block_list(language_model: nn.Module) -> nn.ModuleList:
    """The transformer blocks: the longest list of modules."""
    lists = [module for module in language_model.modules() if isinstance(module, nn.ModuleList)]
    assert lists, "a language model has a list of blocks"
    return max(lists, key=len)


def _leaves_outside(language_model: nn.Module, blocks: str) -> list[str]:
    """Paths of the largest modules that hold none of the blocks."""
    found: list[str] = []

    def walk(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            here = f"{path}.{name}" if path else name
            if here == blocks:
                continue
            if blocks.startswith(f"{here}."):
                walk(child, here)
            else:
                found.append(here)

    walk(language_model, "")
    return found
