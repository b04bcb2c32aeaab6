"""A folder of adapters on bases of other layouts and families, moved, incomplete, and read from memory alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llava.checkpoint.fingerprint import fingerprint
from llava.checkpoint.load import Loaded, load, open_checkpoint
from llava.checkpoint.tuned import MANIFEST, Manifest
from llava.checkpoint.tuned_writing import write_tuned
from llava.errors import CheckpointError
from llava.train.sections import LoraSection, TuneSection
from llava.train.stages import apply_stage
from tests.train.test_adapter_runs import assert_close, open_float32, scores

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoints"
WHOLE = GOLDEN / "a_v1_5_full" / "llava-v1.5-tiny"
MPT = GOLDEN / "g_mpt" / "llava-mpt-tiny"
VICUNA = GOLDEN / "bases" / "vicuna-tiny-v1.5"
PROJECTOR = GOLDEN / "d_projector_only" / "llava-tiny-v1.5-pretrain"
EARLIER = GOLDEN / "e_lora" / "llava-v1.5-tiny-lora"
LORA = TuneSection(language_model="lora", language_model_lora=LoraSection(rank=2, alpha=4.0))


def tune(base: Path, section: TuneSection = LORA, *, under: Path | None = None) -> Loaded:
    """A base with adapters and a projector that were moved by hand. under: what a projector or LoRA folder needs."""
    loaded = load(
        base,
        base=under,
        device="cpu",
        dtype="float32",
        vision_tower=GOLDEN / "bases" / "openai" / "clip-tiny-patch14-56",
    )
    apply_stage(loaded.model, section)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return loaded


def write(loaded: Loaded, folder: Path) -> Path:
    assert loaded.opened is not None
    return write_tuned(loaded.model, loaded.processor, folder, opened=loaded.opened, parts=[], recipe={}, versions={})


@pytest.mark.parametrize(
    ("base", "under"),
    [(WHOLE, None), (MPT, None), (PROJECTOR, VICUNA), (EARLIER, VICUNA)],
    ids=["v1.5", "MPT", "projector alone", "the original's LoRA"],
)
def test_adapters_on_the_originals_models_open_and_merge(base: Path, under: Path | None, tmp_path: Path) -> None:
    loaded = tune(base, under=under)
    expected = scores(loaded)
    folder = write(loaded, tmp_path / "run")
    assert_close(expected, scores(open_float32(folder, merge_lora=False)))
    assert_close(expected, scores(open_float32(folder)))
    # the same files without the manifest are the original's own layout
    config = json.loads((folder / "config.json").read_text())
    assert config["mm_projector_type"] == loaded.model.config.projector


def test_the_originals_own_reader_sees_the_same_model(tmp_path: Path) -> None:
    loaded = tune(WHOLE)
    folder = write(loaded, tmp_path / "run")
    (folder / MANIFEST).unlink()
    read = load(
        folder,
        base=WHOLE,
        device="cpu",
        dtype="float32",
        vision_tower=GOLDEN / "bases" / "openai" / "clip-tiny-patch14-56",
    )
    assert read.report.format == "original LoRA"
    vocabulary = read.model.config.vocab_size
    assert_close(scores(loaded)[..., :vocabulary], scores(read)[..., :vocabulary])


def test_a_fully_trained_tower_comes_with_the_folder(tmp_path: Path) -> None:
    loaded = tune(WHOLE, LORA.model_copy(update={"vision_tower": "full"}))
    assert_close(scores(loaded), scores(open_float32(write(loaded, tmp_path / "run"))))


def test_a_folder_that_moved_with_its_base_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "before").mkdir()
    shutil.copytree(WHOLE, tmp_path / "before" / "base")
    monkeypatch.chdir(tmp_path / "before")
    folder = write(tune(Path("base")), Path("run"))
    expected = scores(open_float32(folder))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "before").rename(tmp_path / "after")
    assert_close(expected, scores(open_float32(tmp_path / "after" / "run")))
    (tmp_path / "after" / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"was tuned on base, which does not open .* name the base with base="):
        open_checkpoint(tmp_path / "after" / "run")


def test_what_is_missing_or_unreadable_is_named(tmp_path: Path) -> None:
    folder = write(tune(WHOLE), tmp_path / "run")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: no such file, but llava\.json lists it"):
        open_checkpoint(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "version": 9}))
    with pytest.raises(CheckpointError, match="written by a newer llava"):
        open_checkpoint(folder)
    del manifest["weights"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not a manifest"):
        open_checkpoint(folder)


def test_a_fingerprint_is_of_the_weights_and_not_of_their_files(tmp_path: Path) -> None:
    from llava.checkpoint.convert import convert

    convert(WHOLE, tmp_path / "hf", vision_tower=GOLDEN / "bases" / "openai" / "clip-tiny-patch14-56")
    convert(tmp_path / "hf", tmp_path / "sharded", max_shard_bytes=100_000)
    first, second = (fingerprint(open_checkpoint(tmp_path / name).tensors) for name in ("hf", "sharded"))
    assert first == second
    convert(tmp_path / "hf", tmp_path / "rounded", dtype="bfloat16")
    assert fingerprint(open_checkpoint(tmp_path / "rounded").tensors) != first


def test_the_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = write(tune(WHOLE), tmp_path / "run")
    manifest = Manifest.read(folder)
    assert json.loads(manifest.to_json()) == json.loads((folder / MANIFEST).read_text())
    assert set(manifest.files) == {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"}
    assert isinstance(torch.load(folder / "non_lora_trainables.bin", weights_only=True), dict)
    assert all(
        isinstance(v, Tensor) for v in torch.load(folder / "non_lora_trainables.bin", weights_only=True).values()
    )
