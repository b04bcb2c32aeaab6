"""What learns in which stage."""

from collections.abc import Callable

import pytest
import torch

from llava.errors import TrainingError
from llava.model.llava import Llava
from llava.train.sections import TuneSection
from llava.train.stages import apply_stage, check_reached, describe_stage


def trained_heads(model: Llava) -> set[str]:
    return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_stage_1_trains_the_projector_only(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    summaries = apply_stage(model, TuneSection())
    assert trained_heads(model) == {"multi_modal_projector"}
    assert not model.language_model.training
    assert not model.vision_tower.training
    assert {s.part: s.trained for s in summaries}["language_model"] == 0


def test_stage_2_trains_the_language_model_too(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    apply_stage(model, TuneSection(language_model="full"))
    assert trained_heads(model) == {"multi_modal_projector", "language_model"}
    assert model.language_model.training


def test_a_tuned_tower_trains_only_what_features_are_read_from(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    summaries = apply_stage(model, TuneSection(vision_tower="full"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("vision_tower")}
    assert any("layers.1." in name for name in trained)
    assert not any("layers.2." in name or "post_layernorm" in name for name in trained), (
        "layer -2 is the second of three"
    )
    assert summaries[0].unreached > 0
    assert "unreached" in describe_stage(summaries)[0][3]
    assert all(p.grad is None for p in model.parameters())


def test_the_table_adds_up(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    rows = describe_stage(apply_stage(model, TuneSection()))
    assert rows[-1][0] == "all"
    assert rows[-1][2] == f"{sum(p.numel() for p in model.parameters()):,}"


def test_a_part_whose_gradients_are_all_zero_is_named(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    apply_stage(model, TuneSection())
    for parameter in model.multi_modal_projector.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(TrainingError, match="every gradient of the projector is zero"):
        check_reached(model)
