"""A checkpoint that was found and understood, before any of its tensors is read; and the model made of it.

Every reader (one module a format) returns an `Opened`. `materialise` builds the module without memory, then fills it
tensor by tensor and accounts for every one: loaded, tied, or ignored for a stated reason. Nothing stays random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava.checkpoint.adapters import Adapter
from llava.checkpoint.names import COMPUTED, Renaming, common_name
from llava.checkpoint.quantised import LoadIn, Nf4, Storage, import_bitsandbytes, pack_layer, packed_layers
from llava.checkpoint.weights import Source, close_files
from llava.errors import CheckpointError
from llava.model.config import LlavaConfig
from llava.model.llava import Llava
from llava.model.lora import ADAPTER, attach_lora
from llava.model.spread import carry_between, place_of, plan_spread

if TYPE_CHECKING:
    from llava.prompt.processor import Processor

HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
EMBEDDINGS = (EMBEDDING, "language_model.model.wte.weight")
SHOWN_PROBLEMS = 8


@dataclass(frozen=True)
class Decision:
    """One thing about a checkpoint and what decided it: Decision("projector", "linear", "config.json: absent")."""

    what: str
    value: str
    because: str


@dataclass(frozen=True)
class OpenOptions:
    """What a caller says beside the folder; `llava.checkpoint.load.load` explains each."""

    base: Path | None = None
    vision_tower: Path | None = None
    merge_lora: bool = True
    template: str | None = None


@dataclass(frozen=True)
class Opened:
    """A checkpoint understood but not read.

    tensors: every learnt tensor by its common name (llava.checkpoint.names). processor: makes the Processor that
    belongs to it. ignored: keys that are not used, each with the reason. adapter: a LoRA that stays beside the
    weights. naming: the format's own spelling, for errors. tokenizer_is_its_own: whether the folder holds the tokenizer
    as it was used; tower_name: the path or hub id of the tower, where the format names one; origin: what it was
    opened from, in values that JSON holds (`llava.checkpoint.tuned.reopen`).
    """

    format: str
    folder: Path
    config: LlavaConfig
    tensors: Mapping[str, Source]
    processor: Callable[[], Processor]
    decisions: tuple[Decision, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    adapter: Adapter | None = None
    naming: Renaming | None = None
    tokenizer_is_its_own: bool = False
    tower_name: str = ""
    origin: Mapping[str, Any] = field(default_factory=dict)

    def key_of(self, name: str) -> str:
        """The key that a common name has in this checkpoint's own spelling."""
        keys = [source.key for source in self.tensors.values()]
        return name if self.naming is None else self.naming.spelled(name, keys)


@dataclass(frozen=True)
class LoadReport:
    """What opening a checkpoint did, for `llava model show` and for the log."""

    format: str
    folder: Path
    files: tuple[Path, ...]
    num_parameters: int
    tied: tuple[str, ...]
    new: tuple[str, ...]
    ignored: Mapping[str, str]
    decisions: tuple[Decision, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.format}, {self.num_parameters:,} parameters from {len(self.files)} files"]
        lines += [f"  {d.what}: {d.value} ({d.because})" for d in self.decisions]
        lines += [f"  tied: {name}" for name in self.tied]
        lines += [f"  new: {name}" for name in self.new]
        lines += [f"  ignored: {name} ({why})" for name, why in list(self.ignored.items())[:SHOWN_PROBLEMS]]
        if len(self.ignored) > SHOWN_PROBLEMS:
            lines.append(f"  ignored: {len(self.ignored) - SHOWN_PROBLEMS} more")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def empty_model(config: LlavaConfig) -> Llava:
    """The module of a configuration with parameters on the meta device (no memory) and real computed tables."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return Llava.from_config(config)


def expected_shapes(model: Llava) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Common name to (name in memory, shape) of every parameter that a checkpoint must hold; tied ones left out."""
    tied = tied_names(model)
    names = {common_name(name, model): (name, tuple(p.shape)) for name, p in model.named_parameters()}
    return {common: place for common, place in names.items() if common not in tied}


def tied_names(model: Llava) -> tuple[str, ...]:
    """Common names of parameters that are another one: the output layer of a language model that ties it."""
    return (HEAD,) if model.config.text_config.get("tie_word_embeddings") else ()


def check_tensors(opened: Opened, model: Llava) -> None:
    """Raise CheckpointError when tensors are missing, unexpected or of a wrong shape, naming key, file and shapes."""
    expected = expected_shapes(model)
    problems = []
    for name, (_, shape) in expected.items():
        source = opened.tensors.get(name)
        if source is None:
            key = opened.key_of(name)
            problems.append(f"missing: {key!r} of shape {list(shape)} in {_file_like(name, opened)}")
        elif source.shape != shape:
            problems.append(
                f"wrong shape: {source.key!r} in {source.file} has {list(source.shape)}, expected {list(shape)}"
            )
    for name, source in opened.tensors.items():
        if name not in expected and name not in tied_names(model) and not COMPUTED.search(name):
            near = _renamed_from(name, opened, expected)
            problems.append(f"unexpected: {source.key!r} of shape {list(source.shape)} in {source.file}{near}")
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        shown = "; ".join(problems[:SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(
            f"{opened.folder}: {len(problems)} of the checkpoint's tensors do not fit its configuration: {shown}"
        )


def _file_like(name: str, opened: Opened) -> str:
    """The file where a missing tensor belongs: that of the tensor with the longest common beginning."""
    near = max(opened.tensors, key=lambda other: _common_length(name, other), default=None)
    return str(opened.folder if near is None else opened.tensors[near].file)


def _common_length(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _renamed_from(name: str, opened: Opened, expected: Mapping[str, Any]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, [key for key in expected if key not in opened.tensors], n=1)
    return f" (was it {opened.key_of(near[0])!r}?)" if near else ""


def materialise(
    opened: Opened,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load_in: LoadIn | None = None,
    storage: Callable[[Llava], Mapping[str, Storage]] | None = None,
    spread: Sequence[torch.device] = (),
) -> tuple[Llava, LoadReport]:
    """The model with every tensor read, on `device` in `dtype` (floating ones), and the account of all of them.

    load_in: pack the language model's linear layers to 4 or 8 bit as they arrive. storage: for training; given the
    module before its weights, says by name which of them are held otherwise. spread: the devices that share the
    language model's blocks, `device` first (llava.model.spread).
    Raises CheckpointError as `check_tensors` does, and when a stored output layer contradicts the tying.
    """
    model = empty_model(opened.config)
    check_tensors(opened, model)
    expected = expected_shapes(model)
    packed = frozenset[str]()
    if load_in is not None:
        import_bitsandbytes(load_in)
        packed = packed_layers(model)
    chosen = {} if storage is None else storage(model)
    plan = plan_spread(model, spread) if spread else {}
    # .bin shards can only be opened whole: read each once
    order = sorted(expected, key=lambda name: (str(opened.tensors[name].file), name))
    for name in order:
        source = opened.tensors[name]
        value = source.read()
        if tuple(value.shape) != source.shape:
            raise CheckpointError(f"{source.file}: {source.key!r} changed while it was read")
        place = expected[name][0]
        path, _, leaf = place.rpartition(".")
        held_as = chosen.get(place, dtype)
        where = place_of(place, plan, device)
        if isinstance(held_as, Nf4):
            pack_layer(model, path, value.to(held_as.compute), load_in="4bit", device=where, training=True)
        elif load_in is not None and leaf == "weight" and path in packed:
            pack_layer(model, path, value.to(dtype), load_in=load_in, device=where)
        else:
            set_parameter(model, place, value.to(where, held_as))
    tied = tied_names(model)
    if tied and HEAD in opened.tensors:
        _check_tied(opened)
    model.language_model.tie_weights()  # type: ignore[operator]
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, left
    close_files()
    if opened.adapter is not None:
        _attach(model, opened.adapter, device, dtype)
    if plan:
        carry_between(model, plan)
        model.eval()
    else:
        model.to(device).eval()
    report = LoadReport(
        format=opened.format,
        folder=opened.folder,
        files=tuple(sorted({opened.tensors[name].file for name in expected})),
        num_parameters=sum(prod(shape) for _, shape in expected.values()),
        tied=tied,
        new=tuple(name for name, source in opened.tensors.items() if source.key.startswith("new:")),
        ignored=opened.ignored,
        decisions=opened.decisions,
        notes=opened.notes,
    )
    return model, report


def _attach(model: Llava, adapter: Adapter, device: torch.device, dtype: torch.dtype) -> None:
    """Put a read LoRA beside the weights that it adapts, without merging."""
    import re

    in_memory = {common: name for common, (name, _) in expected_shapes(model).items()}
    places = {}
    for module, pair in adapter.pairs.items():
        common = adapter.rename(f"{module}.weight")
        if common is None or common not in in_memory:
            raise CheckpointError(f"{pair.a.file}: {pair.a.key!r} adapts {module!r}, which the base does not have")
        places[in_memory[common].removesuffix(".weight")] = pair
    for rank in sorted({pair.a.shape[0] for pair in places.values()}):
        group = {path: pair for path, pair in places.items() if pair.a.shape[0] == rank}
        targets = "|".join(re.escape(path) for path in group)
        attach_lora(
            model, targets, rank=rank, alpha=rank, dropout=0.0, scales={p: pair.scale for p, pair in group.items()}
        )
        for path, pair in group.items():
            for side, source in (("A", pair.a), ("B", pair.b)):
                set_parameter(model, f"{path}.lora_{side}.{ADAPTER}.weight", source.read().to(device, dtype))


def set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter, keeping whether it is trained."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    old = module._parameters[leaf]
    module._parameters[leaf] = nn.Parameter(value, requires_grad=old is None or old.requires_grad)


def _check_tied(opened: Opened) -> None:
    head = opened.tensors[HEAD]
    embedding = next(opened.tensors[name] for name in EMBEDDINGS if name in opened.tensors)
    if head.shape != embedding.shape or not torch.equal(head.read(), embedding.read()):
        raise CheckpointError(
            f"{head.file}: {head.key!r} differs from {embedding.key!r}, but config.json says tie_word_embeddings: "
            "true; set it to false if the output layer was trained apart"
        )
