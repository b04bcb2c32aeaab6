"""LoRA attached in place: nothing changes until it is trained, and merging gives what the adapted model gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import UsageError
from llava.model.llava import Llava
from llava.model.lora import adapter_state, attach_lora, is_adapted, lora_layers, merge_lora, merged_parameters
from tests.model.test_llava import tiny_model


def adapted_model() -> Llava:
    model = tiny_model()
    model.vision_tower.requires_grad_(False)
    attach_lora(model, rank=4, alpha=8, dropout=0.0, seed=0)
    return model


def fill(model: Llava) -> None:
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B["default"].weight.normal_(0, 0.1)


def test_a_new_lora_changes_nothing_and_is_the_same_for_a_seed() -> None:
    plain, first, second = tiny_model(), adapted_model(), adapted_model()
    rows = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(plain(rows), first(rows))
    again = adapter_state(second)
    assert all(torch.equal(value, again[name]) for name, value in adapter_state(first).items())


def test_adapters_are_trained_their_weights_are_not_and_the_rest_keeps_its_setting() -> None:
    model = adapted_model()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".lora_A." in name for name in trained)
    assert not any("_proj.base_layer" in name or name.startswith("vision_tower") for name in trained)
    assert "multi_modal_projector.linear_1.weight" in trained
    assert "language_model.lm_head.weight" in trained


def test_merging_gives_the_adapted_models_output_and_plain_layers() -> None:
    model = adapted_model()
    fill(model)
    rows = torch.arange(3, 12)[None]
    beside = dict(merged_parameters(model))
    with torch.no_grad():
        adapted = model(rows)
        merge_lora(model)
        assert (model(rows) - adapted).abs().max() < 1e-5
    assert not is_adapted(model)
    assert {name for name, _ in model.named_parameters()} == set(beside)
    assert all(torch.equal(parameter, beside[name]) for name, parameter in model.named_parameters())


def test_what_an_adapter_adds_is_b_times_a_times_alpha_over_rank() -> None:
    model = adapted_model()  # rank 4, alpha 8
    fill(model)
    for path, layer in lora_layers(model):
        inputs = torch.randn(3, layer.in_features)
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            expected = layer.base_layer(inputs) + 8 / 4 * (inputs @ down.T @ up.T)
            torch.testing.assert_close(layer(inputs), expected, msg=path)


def test_a_saved_model_has_its_lora_merged(tmp_path: Path) -> None:
    from llava.checkpoint import huggingface
    from llava.checkpoint.load import open_checkpoint
    from llava.checkpoint.opened import materialise

    class NoProcessor:
        stop_token_ids = (2,)

        def save(self, folder: Path) -> None: ...

        def block(self) -> dict[str, Any]:
            return {}

    model = adapted_model()
    fill(model)
    huggingface.save(model, NoProcessor(), tmp_path / "saved")  # type: ignore[arg-type]
    again, _ = materialise(open_checkpoint(tmp_path / "saved"), device=torch.device("cpu"), dtype=torch.float32)
    rows = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert (again(rows) - model(rows)).abs().max() < 1e-5
    assert is_adapted(model)


def test_targets_are_whole_paths_and_no_match_is_an_error() -> None:
    model = tiny_model()
    assert attach_lora(model, r"language_model\.model\.layers\.1\..*q_proj", rank=2) == [
        "language_model.model.layers.1.self_attn.q_proj"
    ]
    with pytest.raises(UsageError, match="match no linear layer"):
        attach_lora(tiny_model(), "q_proj")
