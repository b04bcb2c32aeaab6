"""MMPretrain's .pth files: the original's keys behind a prefix, and a tower in another naming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from llava.checkpoint.load import open_checkpoint
from llava.checkpoint.weights import read_folder
from llava.errors import CheckpointError, UsageError

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoints"
ORIGINAL = GOLDEN / "a_v1_5_full" / "llava-v1.5-tiny"
TOWER = GOLDEN / "bases" / "openai" / "clip-tiny-patch14-56"

EXAMPLE_OPTIONS = {"base": ORIGINAL}  # for the table of formats


@pytest.fixture(autouse=True)
def _in_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN / "bases")  # mm_vision_tower is a relative path


def language_state(folder: Path = ORIGINAL) -> dict[str, torch.Tensor]:
    return {f"model.lang_encoder.{key}": source.read().clone() for key, source in read_folder(folder).items()}


def tower_state(*, final_norm: bool = False) -> dict[str, torch.Tensor]:
    """CLIP's vision half as MMPretrain's VisionTransformer holds it, each number doubled to be told from CLIP's own."""
    source = {
        key.removeprefix("vision_model."): 2 * value.read()
        for key, value in read_folder(TOWER).items()
        if key.startswith("vision_model.") and not key.endswith("position_ids")
    }
    out = {
        "cls_token": source["embeddings.class_embedding"][None, None],
        "pos_embed": source["embeddings.position_embedding.weight"][None],
        "patch_embed.projection.weight": source["embeddings.patch_embedding.weight"],
        "pre_norm.weight": source["pre_layrnorm.weight"],
        "pre_norm.bias": source["pre_layrnorm.bias"],
    }
    if final_norm:
        out |= {"ln1.weight": source["post_layernorm.weight"], "ln1.bias": source["post_layernorm.bias"]}
    for number in range(3):
        block = f"encoder.layers.{number}"
        for leaf in ("weight", "bias"):
            qkv = [source[f"{block}.self_attn.{side}_proj.{leaf}"] for side in "qkv"]
            out[f"layers.{number}.attn.qkv.{leaf}"] = torch.cat(qkv)
            for theirs, ours in (
                ("ln1", "layer_norm1"),
                ("ln2", "layer_norm2"),
                ("attn.proj", "self_attn.out_proj"),
                ("ffn.layers.0.0", "mlp.fc1"),
                ("ffn.layers.1", "mlp.fc2"),
            ):
                out[f"layers.{number}.{theirs}.{leaf}"] = source[f"{block}.{ours}.{leaf}"]
    return out


def write(folder: Path, *files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, state in enumerate(files):
        torch.save(state, folder / f"part_{number}.pth")
    return folder


def write_example(folder: Path) -> Path:
    """A whole checkpoint, for the table of formats."""
    return write(folder, language_state(), tower_state())


def test_a_pth_is_the_original_it_was_made_from(tmp_path: Path) -> None:
    folder = write(tmp_path / "attempt-3", language_state())
    ours = llava.load(folder, base=ORIGINAL, device="cpu", dtype="float32")
    theirs = llava.load(ORIGINAL, device="cpu", dtype="float32")
    assert (ours.report.format, ours.model.config) == ("mmpretrain", theirs.model.config)
    state = theirs.model.state_dict()
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert ours.processor.tokenizer.encode("What is it?") == theirs.processor.tokenizer.encode("What is it?")


def test_a_bare_language_model_as_the_base_needs_the_tower_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", language_state())
    base = GOLDEN / "bases" / "vicuna-tiny-v1.5"
    with pytest.raises(UsageError, match="vision_tower="):
        open_checkpoint(folder, base=base)
    config = open_checkpoint(folder, base=base, vision_tower=TOWER).config
    assert (config.projector, config.image_mode, config.vision_feature_layer) == ("mlp2x_gelu", "pad", -2)


@pytest.mark.parametrize("prefix", ["", "backbone.", "visual."])
@pytest.mark.parametrize("final_norm", [True, False])
def test_the_towers_own_file_wins_over_the_towers_folder(tmp_path: Path, prefix: str, final_norm: bool) -> None:
    tower = {f"{prefix}{key}": value for key, value in tower_state(final_norm=final_norm).items()}
    folder = write(tmp_path / "m", language_state(), {**tower, "head.layers.head.weight": torch.zeros(2, 2)})
    loaded = llava.load(folder, base=ORIGINAL, device="cpu", dtype="float32")
    plain = llava.load(ORIGINAL, device="cpu", dtype="float32").model.vision_tower.state_dict()
    for name, value in loaded.model.vision_tower.state_dict().items():
        factor = 1 if "post_layernorm" in name and not final_norm else 2
        torch.testing.assert_close(value, factor * plain[name], rtol=0, atol=0)
    assert any("head.layers" in key for key in loaded.report.ignored)


def test_a_training_checkpoint_keeps_its_weights_in_state_dict(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"state_dict": language_state(), "meta": {"epoch": 1}})
    assert set(open_checkpoint(folder, base=ORIGINAL).tensors) == set(open_checkpoint(ORIGINAL).tensors)


def test_without_a_base_the_error_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither configuration nor tokenizer; .* base=, --base"):
        open_checkpoint(write(tmp_path / "m", language_state()))


def test_a_renamed_key_is_named_with_its_file(tmp_path: Path) -> None:
    state = language_state()
    state["model.lang_encoder.model.layers.0.mlp.up.weight"] = state.pop(
        "model.lang_encoder.model.layers.0.mlp.up_proj.weight"
    )
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        llava.load(write(tmp_path / "m", state), base=ORIGINAL, device="cpu")


def test_a_stray_key_of_the_tower_is_named(tmp_path: Path) -> None:
    tower = {**tower_state(), "layers.0.attn.gate.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"part_1\.pth: unexpected key 'layers\.0\.attn\.gate\.weight'"):
        open_checkpoint(write(tmp_path / "m", language_state(), tower), base=ORIGINAL)


def test_a_malicious_pth_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    class Harmful:
        def __reduce__(self) -> Any:
            return (Path.touch, (mark,))

    folder = write(tmp_path / "m", {"model.lang_encoder.x": Harmful()})
    with pytest.raises(CheckpointError, match="a pickle can run any code"):
        open_checkpoint(folder, base=ORIGINAL)
    assert not mark.exists()
