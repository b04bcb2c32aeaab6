from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava.errors import UsageError
from llava.inference.decoder import PlainDecoder
from llava.inference.engine import Engine
from llava.inference.lean import is_lean
from llava.inference.requests import Request
from llava.inference.sampling import SamplingParams
from llava.model.llava import Llava
from llava.model.spread import block_list, carry_between, place_of, plan_spread, spread_devices
from llava.prompt.processor import Encoded
from tests.model.test_llava import tiny_config

CPU, OTHER = torch.device("cpu"), torch.device("meta")


def deep_model() -> Llava:
    config = tiny_config()
    deeper = config.with_changes(text_config={**config.text_config, "num_hidden_layers": 6})
    torch.manual_seed(0)
    return Llava.from_config(deeper).eval()


def test_every_parameter_has_one_place_and_blocks_go_in_order() -> None:
    model = deep_model()
    plan = plan_spread(model, [CPU, OTHER])
    for name, _ in model.language_model.named_parameters():
        holders = [path for path in plan if name.startswith(f"{path}.")]
        assert len(holders) == 1, name
    blocks = [device for path, device in plan.items() if path.split(".")[-1].isdigit()]
    assert len(blocks) == len(block_list(model.language_model)) == 6
    assert blocks == sorted(blocks, key=[CPU, OTHER].index)
    assert set(blocks) == {CPU, OTHER}


def test_devices_hold_about_as_much_each() -> None:
    model = deep_model()
    plan = plan_spread(model, [CPU, OTHER])
    held = {CPU: 0, OTHER: 0}
    for name, parameter in model.named_parameters():
        held[place_of(name, plan, CPU)] += parameter.nbytes
    block = sum(parameter.nbytes for parameter in block_list(model.language_model)[0].parameters())
    assert abs(held[CPU] - held[OTHER]) <= 2 * block or held[OTHER] == 0


def test_tower_and_projector_stay_on_the_first_device() -> None:
    plan = plan_spread(deep_model(), [CPU, OTHER])
    for name in ("vision_tower.embeddings.weight", "multi_modal_projector.linear_1.weight", "image_newline"):
        assert place_of(name, plan, CPU) == CPU


@pytest.mark.filterwarnings("ignore:.*offloaded")
def test_a_model_whose_blocks_lie_elsewhere_answers_the_same(tmp_path: Path) -> None:
    """The disk stands for the second device: its blocks come and go with each pass, carried by the same hooks."""
    alone, spread = deep_model(), deep_model()
    plan: dict[str, Any] = plan_spread(spread, [CPU, OTHER])
    plan = {path: "disk" if device == OTHER else "cpu" for path, device in plan.items()}
    carry_between(spread, plan, offload_dir=str(tmp_path))
    assert any(parameter.is_meta for parameter in spread.language_model.parameters())
    assert not is_lean(spread.language_model)
    ids = np.random.default_rng(0).integers(3, 60, size=12)
    requests = [Request(Encoded(ids, np.full_like(ids, -100)), SamplingParams(max_new_tokens=6))]
    assert Engine(spread).generate(requests) == Engine(alone, decoder=PlainDecoder(alone)).generate(requests)


def test_spreading_needs_several_devices() -> None:
    with pytest.raises(UsageError, match="names a device twice"):
        spread_devices("cpu,cpu")
    if torch.accelerator.device_count() < 2:
        with pytest.raises(UsageError, match="two accelerators or more"):
            spread_devices("spread")
