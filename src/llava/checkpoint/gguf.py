"""GGUF, for llama.cpp and Ollama: the language model, the `mmproj` file with tower and projector, and a Modelfile.

Written tensor by tensor; needs the `gguf` package (`pip install 'llava[export]'`). Only written, never read back as a
model: K-quants are made from these files by llama.cpp's own `llama-quantize`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from llava.checkpoint.gguf_parts import ClassToken, KeyValue, Part, Planned, plan_language_model, plan_mmproj
from llava.checkpoint.gguf_vocabulary import make_vocabulary
from llava.checkpoint.ollama import write_jinja, write_modelfile
from llava.checkpoint.opened import EMBEDDING
from llava.checkpoint.weights import Source, write_text
from llava.errors import CheckpointError, MissingExtraError, name_nearest
from llava.model.config import LlavaConfig

if TYPE_CHECKING:
    from llava.prompt.processor import Processor

NumberFormat = Literal["f32", "f16", "q8_0"]
# llama.cpp's general.file_type
FILE_TYPES: dict[NumberFormat, int] = {"f32": 0, "f16": 1, "q8_0": 7}
Q8_BLOCK = 32
ROWS_AT_ONCE = 16_000_000  # numbers that are quantised together: bounds the 32-bit copy
LARGEST_F16 = 65504.0
PARTS = ("language_model.", "vision_tower.", "multi_modal_projector.", "image_newline")


@dataclass(frozen=True)
class GgufPlan:
    """What will be written: both files' keys and tensors, and the Modelfile. Made by `plan_gguf`, which reads nothing.

    notes: where llama.cpp treats this model otherwise than we do.
    """

    language_model: Part
    mmproj: Part
    modelfile: str
    language_model_name: str
    mmproj_name: str
    number_format: NumberFormat
    mmproj_format: NumberFormat
    notes: tuple[str, ...]

    @property
    def files(self) -> tuple[tuple[str, Part, NumberFormat], ...]:
        """(name, part, number format) of both GGUF files."""
        return (
            (self.language_model_name, self.language_model, self.number_format),
            (self.mmproj_name, self.mmproj, self.mmproj_format),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as written, for a progress bar."""
        return sum(
            _stored_as(tensor, _type_of(tensor, chosen))[2] for _, part, chosen in self.files for tensor in part.tensors
        )


def plan_gguf(
    tensors: Mapping[str, Source],
    config: LlavaConfig,
    *,
    processor: Processor,
    name: str,
    number_format: NumberFormat = "f16",
    class_token: ClassToken = "last",
) -> GgufPlan:
    """Plan `<name>-F16.gguf` (or -Q8_0, -F32), `mmproj-<name>-F16.gguf` and `Modelfile`.

    tensors: the whole model by common name. In a Q8_0 file the mmproj stays F16: tower and projector are small and
    lose most.

    class_token: llama.cpp from May 2025 on (pull 13321) puts a CLIP tower's class token behind the patches but still
    counts positions and outputs as if it came first (issue 25814, unmended in October 2026): every patch gets its
    neighbour's position, the first patch is lost and the class token is shown as the last patch. "last" turns the
    table of positions by one, so that in such a build every token has its own position; only the first patch stays
    lost. "first" writes the table as documented, for builds before that and for those that mend it. On 60 questions
    to a quickstart model a build of October 2026 answered 54 as we do with "last" and 40 with "first". SigLIP towers
    have no class token and are exact in every build.

    Raises CheckpointError for what llama.cpp cannot hold.
    """
    if number_format not in FILE_TYPES:
        raise CheckpointError(f"GGUF: format {number_format!r}; {name_nearest(number_format, get_args(NumberFormat))}")
    if class_token not in get_args(ClassToken):
        raise CheckpointError(f"GGUF: class token {class_token!r}; {name_nearest(class_token, get_args(ClassToken))}")
    strangers = [key for key in tensors if not key.startswith(PARTS)]
    if strangers:
        raise CheckpointError(
            f"{tensors[strangers[0]].file}: {tensors[strangers[0]].key!r} has no place in a GGUF file"
        )
    mmproj_format: NumberFormat = "f32" if number_format == "f32" else "f16"
    language = plan_language_model(tensors, config)
    vocabulary = make_vocabulary(processor.tokenizer, tensors[EMBEDDING].shape[0])
    images = processor.image_settings
    mmproj = plan_mmproj(tensors, config, mean=images.mean, std=images.std, class_token=class_token)
    language_keys: dict[str, KeyValue] = {
        "general.name": name,
        "general.type": "model",
        **language.keys,
        **vocabulary.keys(),
        "tokenizer.chat_template": write_jinja(
            processor.template, processor.tokenizer, images_on_own_lines=processor.image_position == "front"
        ),
    }
    turn_ends = [i for i in processor.stop_token_ids if i != processor.tokenizer.eos_token_id]
    if turn_ends:
        language_keys["tokenizer.ggml.eot_token_id"] = turn_ends[0]
    name = re.sub(r"[^\w.-]+", "-", name)  # a Modelfile's FROM line ends at a blank
    mmproj_keys: dict[str, KeyValue] = {"general.name": name, "general.type": "mmproj", **mmproj.keys}
    language_name = f"{name}-{number_format.upper()}.gguf"
    mmproj_name = f"mmproj-{name}-{mmproj_format.upper()}.gguf"
    return GgufPlan(
        language_model=Part(language.architecture, language_keys, language.tensors),
        mmproj=Part(mmproj.architecture, mmproj_keys, mmproj.tensors),
        modelfile=write_modelfile(
            processor.template,
            processor.tokenizer,
            language_model=language_name,
            mmproj=mmproj_name,
            context_length=int(config.text_config["max_position_embeddings"]),
        ),
        language_model_name=language_name,
        mmproj_name=mmproj_name,
        number_format=number_format,
        mmproj_format=mmproj_format,
        notes=(*language.notes, *vocabulary.notes, *mmproj.notes),
    )


def write_gguf(folder: Path, plan: GgufPlan, *, advance: Callable[[int], None] | None = None) -> tuple[Path, ...]:
    """Write the two GGUF files and the Modelfile into an existing folder; returns them, each on the disk (fsync).

    advance: called with the bytes of each tensor written. Raises MissingExtraError without the gguf package.
    """
    for name, part, chosen in plan.files:
        _write_file(folder / name, part, chosen, advance)
    write_text(folder / "Modelfile", plan.modelfile)
    return (folder / plan.language_model_name, folder / plan.mmproj_name, folder / "Modelfile")


def verify_gguf(folder: Path, plan: GgufPlan) -> int:
    """Re-open what `write_gguf` wrote and compare every tensor, bit by bit, with its source; returns how many.

    Raises CheckpointError naming the first that is missing or differs.
    """
    gguf = import_gguf()
    compared = 0
    for name, part, chosen in plan.files:
        path = folder / name
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for planned in part.tensors:
            stored = found.pop(planned.name, None)
            if stored is None:
                raise CheckpointError(f"{path}: {planned.name!r} was not written; convert again")
            if stored.data.tobytes() != _encode(planned, _type_of(planned, chosen)).tobytes():
                raise CheckpointError(f"{path}: {planned.name!r} differs from {planned.origin!r}; convert again")
            compared += 1
        if found:
            raise CheckpointError(f"{path}: holds {next(iter(found))!r}, which was not to be written")
    return compared


def import_gguf() -> Any:
    """The gguf package. Raises MissingExtraError when it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("writing GGUF", "export") from error
    return gguf


def _write_file(path: Path, part: Part, number_format: NumberFormat, advance: Callable[[int], None] | None) -> None:
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, part.architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in {**part.keys, "general.file_type": FILE_TYPES[number_format]}.items():
        _add_key(writer, key, value)
    for tensor in part.tensors:
        kind = _type_of(tensor, number_format)
        dtype, shape, size = _stored_as(tensor, kind)
        writer.add_tensor_info(tensor.name, shape, dtype, size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in part.tensors:
            data = _encode(tensor, _type_of(tensor, number_format))
            writer.write_tensor_data(data)
            if advance is not None:
                advance(data.nbytes)
        writer.flush()
        for file in writer.fout:
            os.fsync(file.fileno())
    finally:
        writer.close()


def _add_key(writer: Any, key: str, value: KeyValue) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _type_of(tensor: Planned, number_format: NumberFormat) -> Any:
    """The ggml type of a tensor: Q8_0 needs rows of whole blocks, others stay F16."""
    types = import_gguf().GGMLQuantizationType
    if tensor.exact or number_format == "f32":
        return types.F32
    if number_format == "q8_0" and len(tensor.shape) == 2 and tensor.shape[1] % Q8_BLOCK == 0:
        return types.Q8_0
    return types.F16


def _stored_as(tensor: Planned, kind: Any) -> tuple[Any, tuple[int, ...], int]:
    """NumPy type, shape and bytes of a tensor in the file; blocks are counted in bytes along the last axis."""
    import numpy as np

    gguf = import_gguf()
    if kind == gguf.GGMLQuantizationType.Q8_0:
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        return np.dtype(np.uint8), tuple(shape), int(np.prod(shape))
    dtype = np.dtype(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
    return dtype, tensor.shape, int(np.prod(tensor.shape)) * dtype.itemsize


def _encode(tensor: Planned, kind: Any) -> Any:
    """A tensor's numbers as the file holds them."""
    import numpy as np

    gguf = import_gguf()
    value = tensor.make().detach().cpu()
    if tuple(value.shape) != tensor.shape:
        raise CheckpointError(f"{tensor.origin!r} gave shape {list(value.shape)}, expected {list(tensor.shape)}")
    if kind == gguf.GGMLQuantizationType.F32:
        return value.to(torch.float32).contiguous().numpy()
    if kind == gguf.GGMLQuantizationType.F16:
        if value.dtype != torch.float16 and value.numel() and float(value.abs().max()) > LARGEST_F16:
            raise CheckpointError(
                f"{tensor.origin!r} holds numbers beyond {LARGEST_F16:g}, which F16 cannot; write it with f32"
            )
        return value.to(torch.float16).contiguous().numpy()
    out = np.empty(gguf.quant_shape_to_byte_shape(tensor.shape, kind), dtype=np.uint8)
    for begin, rows in _row_groups(value):
        out[begin : begin + rows.shape[0]] = gguf.quants.quantize(rows.to(torch.float32).numpy(), kind)
    return out


def _row_groups(value: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    rows = max(1, ROWS_AT_ONCE // max(1, value.shape[1]))
    for begin in range(0, value.shape[0], rows):
        yield begin, value[begin : begin + rows]
