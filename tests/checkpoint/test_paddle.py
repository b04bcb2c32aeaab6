"""PaddleMIX: arrays come back as they were, and a pickle that would do anything else is refused before it does."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava
from llava.checkpoint import paddle
from llava.checkpoint.load import open_checkpoint
from llava.checkpoint.weights import read_folder
from llava.errors import CheckpointError

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoints"
ORIGINAL = GOLDEN / "a_v1_5_full" / "llava-v1.5-tiny"
TOWER_NAMES = (
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.patch_embedding", "conv1"),
    ("embeddings.position_embedding", "positional_embedding"),
    ("pre_layrnorm", "ln_pre"),
    ("post_layernorm", "ln_post"),
    ("encoder.layers", "transformer.layers"),
    ("mlp.fc", "linear"),
    ("layer_norm", "norm"),
)


@pytest.fixture(autouse=True)
def _in_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN / "bases")  # mm_vision_tower is a relative path


def paddle_arrays(*, dtype: str = "float16", tower: bool = False) -> dict[str, Any]:
    """The original's v1.5 case as PaddleMIX holds it: its names, linear weights (in, out), bfloat16 as uint16."""
    tensors = {key: source.read() for key, source in read_folder(ORIGINAL).items()}
    if tower:
        for key, source in read_folder(GOLDEN / "bases" / "openai" / "clip-tiny-patch14-56").items():
            if key.startswith("vision_model.") and "position_ids" not in key:
                tensors[f"model.vision_tower.vision_tower.{key}"] = source.read()
    out = {}
    for key, value in tensors.items():
        name = re.sub(r"^model\.", "llama.", key)
        if "vision_model." in name:
            head, _, rest = name.partition("vision_model.")
            for ours, theirs in TOWER_NAMES:
                rest = rest.replace(ours, theirs)
            name = f"{head}vision_model.{rest}"
        array = value.half().numpy()
        if dtype == "bfloat16":
            array = value.bfloat16().view(torch.int16).numpy().view(np.uint16)
        if array.ndim == 2 and "embed" not in name:
            array = array.T
        out[name] = array
    return out


def write_folder(folder: Path, arrays: dict[str, Any], *, protocol: int = 4, **changes: Any) -> Path:
    folder.mkdir()
    for path in ORIGINAL.iterdir():
        if "pytorch_model" not in path.name:
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava", **changes}))
    table = {paddle.NAME_TABLE: {name: f"linear_{i}.w_0" for i, name in enumerate(arrays)}}
    (folder / "model_state.pdparams").write_bytes(pickle.dumps({**arrays, **table}, protocol=protocol))
    return folder


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_paddlemix_folder_is_the_original_it_was_made_from(tmp_path: Path, protocol: int) -> None:
    folder = write_folder(tmp_path / "attempt-3", paddle_arrays(), protocol=protocol)
    ours, theirs = (llava.load(path, device="cpu", dtype="float32") for path in (folder, ORIGINAL))
    assert ours.report.format == "paddlemix"
    assert ours.model.config == theirs.model.config
    state = theirs.model.state_dict()
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_uint16_is_read_as_the_bfloat16_that_it_stands_for(tmp_path: Path) -> None:
    opened = open_checkpoint(write_folder(tmp_path / "m", paddle_arrays(dtype="bfloat16")))
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    expected = read_folder(ORIGINAL)["model.layers.0.mlp.up_proj.weight"].read()
    assert opened.tensors[name].dtype == torch.bfloat16
    assert torch.equal(opened.tensors[name].read(), expected.bfloat16())


def test_a_tower_of_its_own_is_read_under_paddles_clip_names(tmp_path: Path) -> None:
    arrays = paddle_arrays(tower=True)
    loaded = llava.load(write_folder(tmp_path / "m", arrays, unfreeze_mm_vision_tower=True), device="cpu")
    plain = llava.load(ORIGINAL, device="cpu")
    state = plain.model.vision_tower.state_dict()
    for name, value in loaded.model.vision_tower.state_dict().items():
        assert torch.equal(value, state[name].half().to(value.dtype)), name


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    arrays = paddle_arrays()
    folder = write_folder(tmp_path / "m", arrays)
    (folder / "model_state.pdparams").unlink()
    names = sorted(arrays)
    parts = {"model_state-00001-of-00002.pdparams": names[::2], "model_state-00002-of-00002.pdparams": names[1::2]}
    for file, keys in parts.items():
        (folder / file).write_bytes(pickle.dumps({key: arrays[key] for key in keys}, protocol=4))
    with pytest.raises(CheckpointError, match=r"2 \.pdparams files .* but no model_state"):
        open_checkpoint(folder)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / paddle.INDEX).write_text(json.dumps(index))
    assert set(open_checkpoint(folder).tensors) == set(open_checkpoint(ORIGINAL).tensors)


def test_a_lost_array_is_named(tmp_path: Path) -> None:
    arrays = paddle_arrays()
    del arrays["llama.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        llava.load(write_folder(tmp_path / "m", arrays), device="cpu")


def test_an_array_that_was_not_turned_is_an_error_with_its_shape(tmp_path: Path) -> None:
    arrays = paddle_arrays()
    key = "llama.layers.0.mlp.up_proj.weight"
    arrays[key] = arrays[key].T
    with pytest.raises(CheckpointError, match=r"up_proj\.weight.*has \[64, 128\], expected \[128, 64\]"):
        llava.load(write_folder(tmp_path / "m", arrays), device="cpu")


class Harmful:
    """Unpickled by the plain pickle module, it creates the file."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("call", ["touch", "system", "eval", "getattr", "load"])
def test_a_pickle_that_would_run_something_is_refused_and_nothing_runs(
    tmp_path: Path, call: str, protocol: int
) -> None:
    import os

    mark = tmp_path / "mark"
    harmful = {
        "touch": Harmful(Path.touch, mark),
        "system": Harmful(os.system, f"touch {mark}"),
        "eval": Harmful(eval, f"open({str(mark)!r}, 'w')"),
        "getattr": Harmful(getattr, "words", "upper"),
        "load": Harmful(np.load, str(mark)),
    }[call]
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(pickle.dumps({"llama.norm.weight": np.ones(4), "x": harmful}, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"a pickle can run any code"):
        paddle.load_pickle(path)
    assert not mark.exists()


@pytest.mark.parametrize("value", [np.array([{}], dtype=object), "words", [1.0], 3])
def test_what_is_no_array_of_numbers_is_refused(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(pickle.dumps({"w": value}, protocol=4))
    with pytest.raises(CheckpointError, match=r"'w' is a \w+, not an array of numbers"):
        paddle.load_pickle(path)


def test_a_cut_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(pickle.dumps({"w": np.ones(100)}, protocol=4)[:-20])
    with pytest.raises(CheckpointError, match=r"model_state\.pdparams"):
        paddle.load_pickle(path)
