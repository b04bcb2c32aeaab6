"""Conversion: what comes out opens, equals its source, and a run that is stopped or refused leaves nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from llava.checkpoint import convert as conversion
from llava.checkpoint.convert import convert, extract_projector, make_delta_folder
from llava.checkpoint.load import open_checkpoint
from llava.checkpoint.weights import read_folder
from llava.errors import CheckpointError, UsageError
from llava.model.config import LlavaConfig
from tests.checkpoint.test_original import CASES, GOLDEN, check_against_recording, load_case

REACHED = {case: values for case, values in CASES.items() if case != "an unmerged LoRA on a base"}


@pytest.fixture(autouse=True)
def _in_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN / "bases")


def convert_case(case: str, target: Path, **options: Any) -> conversion.ConvertReport:
    folder, base, template = CASES[case]
    return convert(GOLDEN / folder, target, base=base, template=template, **options)


@pytest.mark.parametrize("case", CASES)
def test_every_layout_of_the_original_converted_to_hf_answers_as_recorded(case: str, tmp_path: Path) -> None:
    report = convert_case(case, tmp_path / "hf", to="hf")
    assert report.num_compared >= len(open_checkpoint(tmp_path / "hf").tensors)
    check_against_recording(llava.load(tmp_path / "hf", device="cpu", dtype="float32"), case)


@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_opens_what_hf_writes_with_nothing_missing_and_equal_logits(
    case: str, tmp_path: Path
) -> None:
    import transformers

    convert_case(case, tmp_path / "hf", to="hf", dtype="float32")
    ours = load_case(case)
    tiled = ours.model.config.image_mode == "anyres"
    kind = transformers.LlavaNextForConditionalGeneration if tiled else transformers.LlavaForConditionalGeneration
    stock, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    from llava.prompt.conversation import Conversation, Image, Message, Text

    message = Message("user", (Image(GOLDEN / "bases/images/wide.png"), Text("What is it?")))
    encoded = ours.processor.encode(Conversation((message,)), open_turn=True)
    row, pixels = torch.from_numpy(encoded.input_ids)[None], torch.from_numpy(encoded.pixel_values)
    sizes: dict[str, Any] = {"image_sizes": torch.tensor(encoded.image_sizes)} if tiled else {}
    with torch.no_grad():
        theirs = stock.eval()(input_ids=row, pixel_values=pixels[None] if tiled else pixels, **sizes).logits
        hidden = ours.model(
            row, pixel_values=pixels, image_sizes=encoded.image_sizes, tiles_per_image=encoded.tiles_per_image
        )
        assert (theirs[..., : ours.model.config.vocab_size] - ours.model.logits(hidden)).abs().max() < 1e-5


def settings(config: LlavaConfig) -> dict[str, Any]:
    block = config.to_dict()
    block["text_config"].pop("tie_word_embeddings")  # MPT's differs: stock LLaVA cannot tie it
    block.pop("tie_word_embeddings")
    return {key: value for key, value in block.items() if key != "llava"} | {"template": config.template}


@pytest.mark.parametrize("case", REACHED)
def test_hf_and_back_to_the_original_is_the_identity(case: str, tmp_path: Path) -> None:
    convert_case(case, tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "back", to="original")
    first, last = open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "back")
    assert settings(last.config) == settings(first.config)
    check_against_recording(llava.load(tmp_path / "back", device="cpu", dtype="float32"), case)


def test_the_original_written_again_keeps_its_vocabulary_and_moves_with_its_tower(tmp_path: Path) -> None:
    convert_case("v1.5 in two .bin shards", tmp_path / "first", to="original")
    (tmp_path / "first").rename(tmp_path / "prompt")
    opened = open_checkpoint(tmp_path / "prompt")
    assert opened.config.vocab_size == 480
    check_against_recording(llava.load(tmp_path / "prompt", device="cpu", dtype="float32"), "v1.5 in two .bin shards")


def test_a_delta_made_here_and_added_again_gives_the_target(tmp_path: Path) -> None:
    target = GOLDEN / CASES["v0"][0]
    make_delta_folder(target, "llama-tiny", tmp_path / "delta")
    convert(tmp_path / "delta", tmp_path / "sum", base="llama-tiny", to="original")
    expected, found = open_checkpoint(target), open_checkpoint(tmp_path / "sum")
    for name, source in expected.tensors.items():
        # one rounding to float16 on the way
        assert (source.read().float() - found.tensors[name].read().float()).abs().max() < 1e-3, name
    check_against_recording(llava.load(tmp_path / "sum", device="cpu", dtype="float32"), "a delta on a base")


def test_a_projector_taken_out_of_a_model_opens_on_its_base(tmp_path: Path) -> None:
    for source in ("original", "hf"):
        folder = GOLDEN / CASES["a projector on a base"][0]
        if source == "hf":
            convert(folder, tmp_path / "whole", base="vicuna-tiny-v1.5", to="hf")
            folder = tmp_path / "whole"
        base = "vicuna-tiny-v1.5" if source == "original" else None
        extract_projector(folder, tmp_path / source, base=base)
        loaded = llava.load(tmp_path / source, base="vicuna-tiny-v1.5", device="cpu", dtype="float32")
        check_against_recording(loaded, "a projector on a base")


def test_shards_are_as_large_as_asked_and_dtype_as_named(tmp_path: Path) -> None:
    convert_case("v1.5 in two .bin shards", tmp_path / "hf", dtype="bfloat16", max_shard_bytes=100_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) >= 4
    assert {source.dtype for source in read_folder(tmp_path / "hf").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_peak_memory_stays_near_the_largest_tensor(tmp_path: Path) -> None:
    """200 MB of weights in 40 tensors pass through a process that grows by a few of them at most."""
    from safetensors.torch import save_file

    from llava.checkpoint.weights import write_safetensors

    save_file({f"t{i}": torch.zeros(1_250_000) for i in range(40)}, tmp_path / "model.safetensors")
    start = conversion._reset_peak()
    (tmp_path / "out").mkdir()
    write_safetensors(tmp_path / "out", read_folder(tmp_path), max_shard_bytes=50_000_000)
    conversion.compare(read_folder(tmp_path), read_folder(tmp_path / "out"))
    assert conversion._peak_bytes() - start < 40_000_000


def test_a_target_that_is_there_or_inside_the_source_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(GOLDEN / CASES["v0"][0], source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        convert(source, tmp_path / "full")
    with pytest.raises(UsageError, match="is inside"):
        convert(source, source / "hf")
    with pytest.raises(UsageError, match="did you mean 'gguf'"):
        convert(source, tmp_path / "new", to="guf")


def test_a_written_tensor_that_differs_is_found_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava.checkpoint import huggingface

    fill = huggingface.fill

    def fill_wrongly(temporary: Path, *args: Any, **options: Any) -> None:
        fill(temporary, *args, **options)
        path = temporary / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(huggingface, "fill", fill_wrongly)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* differs from"):
        convert_case("v0", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from llava.checkpoint import weights
from llava.checkpoint.convert import convert
def slow(total):
    def advance(count):
        print("writing", flush=True)
        time.sleep(0.2)
    return advance
convert(sys.argv[1], sys.argv[2], begin=slow)
"""


@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_half_done_and_the_next_one_finishes(how: int, tmp_path: Path) -> None:
    source, target = GOLDEN / CASES["v0"][0], tmp_path / "hf"
    command = [sys.executable, "-c", KILLED, str(source), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(how)
        process.wait(timeout=60)
    assert not target.exists()
    convert(source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert open_checkpoint(target).format == "huggingface llava"


def test_the_source_is_not_touched(tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(GOLDEN / CASES["v0"][0], source)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()}
    time.sleep(0.01)
    convert(source, tmp_path / "hf")
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()} == before
