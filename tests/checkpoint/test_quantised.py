"""Loading in 4 and 8 bit; the tests that pack need bitsandbytes (`pip install 'llava[quant]'`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import llava
from llava.checkpoint.quantised import packed_layers
from llava.errors import MissingExtraError, UsageError

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoints"
FOLDER = GOLDEN / "a_v1_5_full" / "llava-v1.5-tiny"
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture(autouse=True)
def _in_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN / "bases")


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_without_bitsandbytes_the_way_to_get_it_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"llava\[quant\]"):
        llava.load(FOLDER, device="cpu", load_in="4bit")


def test_an_unknown_width_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean '4bit'"):
        llava.load(FOLDER, device="cpu", load_in="4bits")  # type: ignore[arg-type]


def test_only_the_blocks_of_the_language_model_are_packed() -> None:
    model = llava.load(FOLDER, device="cpu", dtype="float32").model
    paths = packed_layers(model)
    assert len(paths) == 14
    assert all(path.startswith("language_model.model.layers.") for path in paths)


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes: pip install 'llava[quant]'")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("load_in", "error"), [("4bit", 0.12), ("8bit", 0.02)])
def test_packed_layers_answer_like_the_ones_they_replace(load_in: str, error: float) -> None:
    whole = llava.load(FOLDER, device="cpu", dtype="float32").model
    packed = llava.load(FOLDER, device="cpu", dtype="float32", load_in=load_in).model  # type: ignore[arg-type]
    hidden = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for path in sorted(packed_layers(whole))[:4]:
        if "down_proj" in path:
            continue
        expected = whole.get_submodule(path)(hidden)
        found = packed.get_submodule(path)(hidden)
        assert (found - expected).norm() / expected.norm() < error, path
    assert torch.equal(packed.lm_head.weight, whole.lm_head.weight)
