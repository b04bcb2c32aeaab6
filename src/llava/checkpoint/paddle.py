"""PaddleMIX folders: `.pdparams`, a pickle of NumPy arrays under Paddle's names. Read only.

The model is the original's: config.json has its keys, the tokenizer is its own. Names differ (`llama.` for `model.`,
PaddleNLP's own CLIP), linear weights are stored (in, out), and bfloat16 is stored as uint16, which NumPy has instead.

A pickle can run any code, so this one is read by an unpickler that knows what rebuilds an array and nothing else: the
first other name ends the reading before it is looked up. Not covered: Paddle's LoRA files and tensor-parallel shards.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava.checkpoint.names import Renaming
from llava.checkpoint.opened import Opened, OpenOptions
from llava.checkpoint.weights import Source
from llava.errors import CheckpointError

SUFFIX = ".pdparams"
INDEX = "model_state.pdparams.index.json"
# paddle.save keeps the names of its static graph beside the arrays
NAME_TABLE = "StructuredToParameterName@@"
# Paddle's names beside the original LLaVA's.
TO_ORIGINAL = Renaming((("llama.", "model."), ("qwen2.", "model."), ("mistral.", "model."), ("lm_head.", "lm_head.")))
TOWER = "model.vision_tower.vision_tower.vision_model."
TOWER_TOP = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding.weight": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
TOWER_LAYER = {"linear1": "mlp.fc1", "linear2": "mlp.fc2", "norm1": "layer_norm1", "norm2": "layer_norm2"}
TOWER_BLOCK = re.compile(r"transformer\.layers\.(\d+)\.(.+)\.(weight|bias)")
# Matrices that are looked up, not multiplied, lie as elsewhere.
NOT_TURNED = ("embed_tokens.weight", "positional_embedding.weight", "position_embedding.weight")


def detect(folder: Path, data: Mapping[str, Any]) -> bool:
    """Whether a folder holds .pdparams files."""
    return any(folder.glob(f"*{SUFFIX}"))


def read(folder: Path, data: Mapping[str, Any], options: OpenOptions) -> Opened:
    """Understand a folder; `data` is its config.json.

    Raises CheckpointError for a pickle that holds more than arrays, and for keys that no LLaVA has.
    """
    from llava.checkpoint.original import read_full

    if "mm_vision_tower" not in data:
        raise CheckpointError(
            f"{folder / 'config.json'}: no mm_vision_tower; copy the config.json written beside the weights"
        )
    return read_full(folder, data, options, raw=as_original(read_params(folder)), name="paddlemix")


def read_params(folder: Path) -> dict[str, Source]:
    """Every array of a folder under its own name and in its own orientation."""
    index = folder / INDEX
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if index.is_file():
        try:
            listed: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{index}: not a weight index; download it again") from error
        files = [folder / Path(name).name for name in sorted(set(listed.values()))]
    elif len(files) > 1:
        names = ", ".join(path.name for path in files[:4])
        raise CheckpointError(
            f"{folder}: {len(files)} {SUFFIX} files ({names}) but no {INDEX}; it lists which is which"
        )
    out: dict[str, Source] = {}
    for path in files:
        for key, source in _sources(path).items():
            if key in out:
                raise CheckpointError(
                    f"{path}: {key!r} is in {out[key].file.name} too; the shards do not belong together"
                )
            out[key] = source
    return out


def as_original(params: Mapping[str, Source]) -> dict[str, Source]:
    """Arrays under the original LLaVA's names and in torch's orientation."""
    rows = next((s.shape for key, s in params.items() if key.endswith("embed_tokens.weight")), None)
    out = {}
    for key, source in params.items():
        plain = TO_ORIGINAL.rename(key)
        if plain is None:
            raise CheckpointError(f"{source.file}: unexpected key {key!r} of shape {list(source.shape)}")
        turned = len(source.shape) == 2 and not key.endswith(NOT_TURNED)
        # PaddleNLP keeps the head (in, out); where it is tied, it is the embedding itself
        if key == "lm_head.weight" and source.shape == rows and source.shape[0] != source.shape[1]:
            turned = False
        if plain.startswith(TOWER):
            plain = TOWER + _tower_name(plain.removeprefix(TOWER))
        out[plain] = _turned(source) if turned else source
    return out


def _tower_name(name: str) -> str:
    """Hugging Face's CLIP name of PaddleNLP's; names that are Hugging Face's already stay."""
    if name in TOWER_TOP:
        return TOWER_TOP[name]
    match = TOWER_BLOCK.fullmatch(name)
    if match is None:
        return name
    return f"encoder.layers.{match[1]}.{TOWER_LAYER.get(match[2], match[2])}.{match[3]}"


def _turned(source: Source) -> Source:
    return source.changed(lambda: source.read().T.contiguous(), shape=source.shape[::-1])


class _OpenParams:
    """The one file held open: a pickle cannot be read by the array, so the last one is kept."""

    path: Path | None = None
    arrays: Mapping[str, Any] = {}

    def open(self, path: Path) -> Mapping[str, Any]:
        if self.path != path:
            self.path, self.arrays = None, {}  # free the last one first
            self.arrays, self.path = load_pickle(path), path
        return self.arrays


def _sources(path: Path) -> dict[str, Source]:
    holder = _OpenParams()
    return {
        key: Source(array.shape, _dtype(array, key, path), path, key, _reader(holder, path, key))
        for key, array in holder.open(path).items()
    }


def _reader(holder: _OpenParams, path: Path, key: str) -> Callable[[], torch.Tensor]:
    return lambda: _tensor(holder.open(path)[key])


def _dtype(array: Any, key: str, path: Path) -> torch.dtype:
    if array.dtype == np.uint16:
        return torch.bfloat16
    try:
        return torch.from_numpy(np.empty(0, array.dtype)).dtype
    except TypeError as error:
        raise CheckpointError(f"{path}: {key!r} holds {array.dtype}, which is no tensor's type") from error


def _tensor(array: Any) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def load_pickle(path: Path) -> Mapping[str, Any]:
    """The arrays of a .pdparams file by name. Raises CheckpointError for a file that holds anything else."""
    try:
        with path.open("rb") as file:
            loaded = _ArraysOnly(file, encoding="latin1").load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; the download or copy is incomplete") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, MemoryError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not readable as {SUFFIX} ({first}); download it again") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a dict of arrays")
    out = {}
    for key, value in loaded.items():
        if key == NAME_TABLE:
            continue
        if isinstance(value, tuple) and len(value) == 2:  # (name in the graph, array)
            value = value[1]
        if not isinstance(value, np.ndarray) or value.dtype.hasobject:
            raise CheckpointError(f"{path}: {key!r} is a {type(value).__name__}, not an array of numbers")
        out[str(key)] = value
    return out


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """What old pickles call to make the bytes of an array: `_codecs.encode`, for this one encoding."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"holds text encoded as {encoding!r}; refused")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds NumPy arrays in dicts and tuples, and refuses every other name before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        found = _rebuilders().get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise pickle.UnpicklingError(
                f"asks for {module}.{name}; a {SUFFIX} file holds NumPy arrays only, and a pickle can run any code, so "
                "it is refused. Ask its author for safetensors"
            )
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refers to data outside the file; refused")


def _rebuilders() -> dict[tuple[str, str], Any]:
    """All that a pickle of arrays may call."""
    reconstruct, from_buffer = (np.empty(0).__reduce_ex__(protocol)[0] for protocol in (2, 5))
    return {
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy.core.numeric", "_frombuffer"): from_buffer,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "tuple"): tuple,
        ("__builtin__", "tuple"): tuple,
        ("_codecs", "encode"): _encode,
    }
