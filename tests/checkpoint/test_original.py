"""The original's checkpoints against what the original's code gave for them: ids, logits, greedy tokens.

Recorded on CPU in float32 (rotary tables too) by haotian-liu/LLaVA c121f04; weights are stored in float16.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava
from llava.checkpoint.load import Loaded, open_checkpoint
from llava.checkpoint.opened import check_tensors, empty_model, materialise
from llava.errors import CheckpointError, LlavaError, UnknownFormatError, UsageError
from llava.prompt.conversation import Conversation, Image, Message, Text

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoints"
# folder, base, template recorded with, the case's expectations
CASES = {
    "v1.5 in two .bin shards": ("a_v1_5_full/llava-v1.5-tiny", None, "vicuna_v1"),
    "v1 with a linear projector and start/end tokens": ("b_v1_linear_startend/llava-v1-tiny", None, "llava_v1"),
    "v0": ("b_v0/llava-tiny-v0", None, "llava_v0"),
    "v1.6 with tiles and its own tower": ("c_v1_6_anyres/llava-v1.6-vicuna-tiny", None, "vicuna_v1"),
    "a projector on a base": ("d_projector_only/llava-tiny-v1.5-pretrain", "vicuna-tiny-v1.5", "vicuna_v1"),
    "an unmerged LoRA on a base": ("e_lora/llava-v1.5-tiny-lora", "vicuna-tiny-v1.5", "vicuna_v1"),
    "a delta on a base": ("f_delta/delta_llava-tiny-v0", "llama-tiny", "llava_v0"),
    "MPT": ("g_mpt/llava-mpt-tiny", None, "mpt"),
}
# The original merges a LoRA in float16; its own float32 logits are recorded for one picture.
RECORDED_KEYS = {"an unmerged LoRA on a base": "logits_merged_fp32"}


@pytest.fixture(autouse=True)
def _in_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN / "bases")  # mm_vision_tower is a relative path


def load_case(case: str, folder: Path | None = None, **options: Any) -> Loaded:
    name, base, template = CASES[case]
    where = GOLDEN / name if folder is None else folder
    return llava.load(where, base=base, device="cpu", dtype="float32", template=template, **options)


def recorded(case: str) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
    folder = (GOLDEN / CASES[case][0]).parent
    return json.loads((folder / "expected.json").read_text()), load_file(folder / "expected.safetensors")


def conversation(questions: list[str], picture: Path, turns: str) -> Conversation:
    first = Message("user", (Image(picture), Text(questions[0])))
    if turns == "p1":
        return Conversation((first,))
    answer = Message("assistant", (Text(questions[1]),))
    return Conversation((first, answer, Message("user", (Text(questions[2]),))))


def greedy(loaded: Loaded, encoded: Any, count: int) -> list[int]:
    row = torch.from_numpy(encoded.input_ids)[None]
    with torch.no_grad():
        features = torch.cat(
            loaded.model.encode_images(
                torch.from_numpy(encoded.pixel_values),
                image_sizes=encoded.image_sizes,
                tiles_per_image=encoded.tiles_per_image,
            )
        )
        out: list[int] = []
        for _ in range(count):
            hidden = loaded.model(row, image_features=features)
            out.append(int(loaded.model.logits(hidden[:, -1]).argmax()))
            row = torch.cat([row, torch.tensor([[out[-1]]])], dim=1)
    return out


def check_against_recording(loaded: Loaded, case: str) -> None:
    expected, tensors = recorded(case)
    questions = expected.get("questions") or [
        "What is in the image?",
        "A red bowl on a table.",
        "How many people are there?",
    ]
    if isinstance(questions, int):
        questions = ["What is in the image?", "A red bowl on a table.", "How many people are there?"]
    for name, values in expected["cases"].items():
        image = GOLDEN / values["image"]
        encoded = loaded.processor.encode(conversation(questions, image, name.split(".")[1]), open_turn=True)
        collapsed: list[int] = []
        for token in encoded.input_ids.tolist():
            if token != loaded.processor.image_token_id:
                collapsed.append(token)
            elif not collapsed or collapsed[-1] != -200:
                collapsed.append(-200)
        assert collapsed == values["input_ids"], name
        with torch.no_grad():
            logits = loaded.model.logits(
                loaded.model(
                    torch.from_numpy(encoded.input_ids)[None],
                    pixel_values=torch.from_numpy(encoded.pixel_values),
                    image_sizes=encoded.image_sizes,
                    tiles_per_image=encoded.tiles_per_image,
                )
            )[0]
        key = f"{name}.{RECORDED_KEYS.get(case, 'logits')}"
        if key in tensors:
            reference = tensors[key]
            difference = (logits[-len(reference) :, : reference.shape[1]] - reference).abs().max()
            assert difference < 1e-5, (name, difference)
        assert greedy(loaded, encoded, len(values["greedy_tokens"])) == values["greedy_tokens"], name


@pytest.mark.parametrize("case", CASES)
def test_ids_logits_and_greedy_tokens_equal_the_recorded_ones(case: str) -> None:
    check_against_recording(load_case(case), case)


@pytest.mark.parametrize("name", ["prompt", "attempt-3", "my-lora-mpt-v1"])
@pytest.mark.parametrize("case", ["v1.5 in two .bin shards", "a projector on a base", "MPT"])
def test_a_folder_may_have_any_name(case: str, name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / CASES[case][0], tmp_path / name)
    assert str(load_case(case, tmp_path / name).report).replace(name, "") == str(load_case(case).report).replace(
        str(GOLDEN / CASES[case][0]), str(tmp_path) + "/"
    )


@pytest.mark.parametrize(
    ("case", "template"),
    [
        ("v1.5 in two .bin shards", "vicuna_v1"),
        ("v0", "llava_v0"),
        ("v1.6 with tiles and its own tower", "vicuna_v1"),
        ("a delta on a base", "llava_v0"),
        ("MPT", "mpt"),
    ],
)
def test_the_template_is_decided_by_config_and_tokenizer(case: str, template: str) -> None:
    opened = open_checkpoint(GOLDEN / CASES[case][0], base=CASES[case][1])
    assert opened.config.template == template


def test_a_lora_may_stay_beside_the_weights() -> None:
    case = "an unmerged LoRA on a base"
    loaded = load_case(case, merge_lora=False)
    assert any("lora_A" in name for name, _ in loaded.model.named_parameters())
    expected, tensors = recorded(case)
    values = expected["cases"]["square.p1"]
    questions = ["What is in the image?"]
    encoded = loaded.processor.encode(conversation(questions, GOLDEN / values["image"], "p1"), open_turn=True)
    with torch.no_grad():
        hidden = loaded.model(
            torch.from_numpy(encoded.input_ids)[None], pixel_values=torch.from_numpy(encoded.pixel_values)
        )
        logits = loaded.model.logits(hidden)[0, -8:]
    assert (logits - tensors["square.p1.logits_unmerged_fp32"]).abs().max() < 1e-5


@pytest.mark.parametrize("spelling", ["", "model.", "base_model.model.model.", "transformer."])
@pytest.mark.parametrize("rows", [0, 2, 482])
def test_a_projector_file_opens_in_every_spelling_and_with_token_rows(spelling: str, rows: int, tmp_path: Path) -> None:
    folder = tmp_path / "projector"
    shutil.copytree(GOLDEN / "d_projector_only" / "llava-tiny-v1.5-pretrain", folder)
    state = torch.load(folder / "mm_projector.bin", weights_only=True)
    plain = {f"{spelling}mm_projector.{key.split('mm_projector.')[1]}": value for key, value in state.items()}
    config = json.loads((folder / "config.json").read_text())
    if rows:
        torch.manual_seed(0)
        plain["model.embed_tokens.weight"] = torch.randn(rows, 64)
        config["mm_use_im_start_end"] = True
        (folder / "config.json").write_text(json.dumps(config))
    torch.save(plain, folder / "mm_projector.bin")
    loaded = llava.load(folder, base="vicuna-tiny-v1.5", device="cpu", dtype="float32")
    weight = loaded.model.multi_modal_projector.linear_1.weight
    assert torch.equal(weight, state["model.mm_projector.0.weight"].half().float())
    if rows:
        first = loaded.processor.tokenizer.token_id("<im_start>")
        assert first == 480
        embedding, head = loaded.model.embed_tokens.weight, loaded.model.lm_head.weight
        assert torch.equal(embedding[480:482], plain["model.embed_tokens.weight"][-2:].half().float())
        assert torch.allclose(head[480], head[:480].mean(0), atol=1e-3)


def test_a_projector_or_lora_without_its_base_says_so() -> None:
    for case in ("a projector on a base", "an unmerged LoRA on a base"):
        with pytest.raises(UsageError, match=r"--base .*vicuna-tiny-v1\.5"):
            llava.load(GOLDEN / CASES[case][0])


def test_a_complete_model_given_a_base_is_not_taken_for_a_delta() -> None:
    with pytest.raises(UsageError, match="no delta"):
        llava.load(GOLDEN / CASES["v0"][0], base="llama-tiny")


def test_the_wrong_base_is_an_error_that_names_key_and_shapes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=480
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    shutil.copy("vicuna-tiny-v1.5/tokenizer.model", tmp_path)
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj.*right base"):
        llava.load(GOLDEN / CASES["an unmerged LoRA on a base"][0], base=tmp_path)


def test_tower_weights_in_the_checkpoint_are_used_only_when_the_config_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "c_v1_6_anyres" / "llava-v1.6-vicuna-tiny", folder)
    own = llava.load(folder, device="cpu", dtype="float32").model.vision_tower.state_dict()
    config = json.loads((folder / "config.json").read_text())
    config["unfreeze_mm_vision_tower"] = False
    (folder / "config.json").write_text(json.dumps(config))
    loaded = llava.load(folder, device="cpu", dtype="float32")
    named = torch.load("openai/clip-tiny-patch14-56/pytorch_model.bin", weights_only=True)
    key = "encoder.layers.0.mlp.fc1.weight"
    found = loaded.model.vision_tower.state_dict()[key]
    assert torch.equal(found, named[f"vision_model.{key}"].float())
    assert not torch.equal(found, own[key])
    assert sum("unfreeze_mm_vision_tower" in why for why in loaded.report.ignored.values()) > 40


def test_each_damaged_key_is_an_error_that_names_key_file_and_shape(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "g_mpt" / "llava-mpt-tiny", folder)
    path = folder / "model.safetensors"
    state = {k: v for k, v in load_file(path).items() if "vision_tower" not in k}
    save_file(state, path)
    empty = empty_model(open_checkpoint(folder).config)
    for name in state:
        for damage in ("dropped", "renamed", "reshaped"):
            damaged = dict(state)
            value = damaged.pop(name)
            if damage == "renamed":
                damaged[name + "_old"] = value
            if damage == "reshaped":
                damaged[name] = value.new_zeros((*value.shape, 2))
            save_file(damaged, path)
            with pytest.raises(CheckpointError) as caught:
                check_tensors(open_checkpoint(folder), empty)
            message = str(caught.value)
            assert "model.safetensors" in message and str(list(value.shape)) in message, (damage, name, message)
            assert name in message, (damage, name, message)


def test_each_damaged_key_of_a_sharded_bin_checkpoint_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "a_v1_5_full" / "llava-v1.5-tiny", folder)
    empty = empty_model(open_checkpoint(folder).config)
    for shard in sorted(folder.glob("*.bin")):
        state = torch.load(shard, weights_only=True)
        for name in state:
            for damage in ("dropped", "renamed", "reshaped"):
                damaged = dict(state)
                value = damaged.pop(name)
                if damage == "renamed":
                    damaged["x" + name] = value
                if damage == "reshaped":
                    damaged[name] = value.new_zeros((*value.shape, 2))
                torch.save(damaged, shard)
                with pytest.raises(CheckpointError) as caught:
                    check_tensors(open_checkpoint(folder), empty)
                message = str(caught.value)
                assert ".bin" in message and str(list(value.shape)) in message, (damage, name, message)
                assert name in message, (damage, name, message)
        torch.save(state, shard)


def damaged_copy(tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(GOLDEN / "c_v1_6_anyres" / "llava-v1.6-vicuna-tiny", folder)
    return folder


def test_a_missing_cut_or_swapped_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = damaged_copy(tmp_path)
    first, second = sorted(folder.glob("model-*.safetensors"))
    whole = first.read_bytes()
    first.unlink()
    with pytest.raises(CheckpointError, match=f"{first.name}: no such file"):
        open_checkpoint(folder)
    first.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=f"{first.name}.*cut short"):
        open_checkpoint(folder)
    first.write_bytes(whole[:4])
    with pytest.raises(CheckpointError, match=f"{first.name}.*cut short"):
        open_checkpoint(folder)
    first.write_bytes(second.read_bytes())
    second.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"swapped"):
        open_checkpoint(folder)


def test_a_cut_bin_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(GOLDEN / "a_v1_5_full" / "llava-v1.5-tiny", folder)
    shard = folder / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:50_000])
    with pytest.raises(CheckpointError, match=shard.name):
        open_checkpoint(folder)


def test_a_pickle_that_would_run_something_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    import pickle

    folder = tmp_path / "evil"
    shutil.copytree(GOLDEN / "b_v0" / "llava-tiny-v0", folder)

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (open, (str(tmp_path / "ran"), "w"))  # type: ignore[return-value]

    for write in (
        lambda path: torch.save({"model.norm.weight": Evil()}, path),
        lambda path: path.write_bytes(pickle.dumps({"model.norm.weight": Evil()})),
    ):
        write(folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="a pickle can run any code"):
            open_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_a_model_type_of_remote_code_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    shutil.copytree(GOLDEN / "b_v0" / "llava-tiny-v0", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "my_llm", "auto_map": {"AutoModelForCausalLM": "modeling.My"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"my_llm.*never run.*known: llava"):
        open_checkpoint(folder)


def test_an_unknown_folder_says_what_was_looked_for_and_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UnknownFormatError, match=r"Looked for tuned: .*huggingface: .*original: .*Found: notes\.txt"):
        open_checkpoint(tmp_path)


def test_nothing_of_the_source_is_changed_by_opening_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "g_mpt" / "llava-mpt-tiny", folder)
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}
    materialise(open_checkpoint(folder), device=torch.device("cpu"), dtype=torch.float32)
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_vision_tower": "nowhere/clip"}, r"mm_vision_tower 'nowhere/clip'.*--vision-tower"),
        ({"mm_projector_type": "qformer"}, r"projector 'qformer'.*mlp2x_gelu"),
        ({"mm_projector_type": "linear"}, r"unexpected: 'model\.mm_projector\.2\.bias'"),
        ({"mm_patch_merge_type": "maxpool"}, r"merge_type 'maxpool'.*spatial_unpad"),
        ({"mm_vision_select_layer": -9}, r"vision_feature_layer -9; a tower of 3 blocks"),
        ({"mm_hidden_size": 33}, r"mm_hidden_size is 33.*width is 32"),
        ({"image_aspect_ratio": "highres"}, r"image_aspect_ratio 'highres'; known"),
        ({"hidden_size": "wide"}, r"config\.json: not a llama configuration"),
        ({"s2": True}, r"s2 .*not supported"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_line_that_names_it(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = damaged_copy(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(LlavaError, match=message) as caught:
        llava.load(folder, device="cpu", dtype="float32")
    assert "\n" not in str(caught.value)


def test_a_lora_without_a_projector_says_where_it_should_be(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    shutil.copytree(GOLDEN / "e_lora" / "llava-v1.5-tiny-lora", folder)
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match=r"non_lora_trainables\.bin: holds no projector"):
        llava.load(folder, base="vicuna-tiny-v1.5")
    on_llava = llava.load(folder, base=GOLDEN / "a_v1_5_full" / "llava-v1.5-tiny", device="cpu", dtype="float32")
    assert on_llava.report.format == "original LoRA"


def test_a_damaged_tokenizer_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    folder = damaged_copy(tmp_path)
    (folder / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="damaged: its tokenizer does not open"):
        llava.load(folder, device="cpu")


@pytest.mark.parametrize("case", ["v1.5 in two .bin shards", "v0", "v1.6 with tiles and its own tower", "MPT"])
def test_an_opened_model_saved_from_memory_answers_as_recorded(case: str, tmp_path: Path) -> None:
    from llava.checkpoint import huggingface

    loaded = load_case(case)
    huggingface.save(loaded.model, loaded.processor, tmp_path / "saved")
    check_against_recording(llava.load(tmp_path / "saved", device="cpu", dtype="float32"), case)
