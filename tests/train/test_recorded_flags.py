"""What learns, at which rate and with which decay, under the flag sets of the original that were recorded.

Each set of its flags is written as our `tune` and `optim` sections. Where the original was wrong the correct rule is
held here, and docs/differences.md says why ("What learns").
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llava.errors import CheckpointError
from llava.model.config import LlavaConfig
from llava.model.llava import Llava
from llava.train.optimizer import build_optimizer
from llava.train.sections import LoraSection, OptimSection, TuneSection
from llava.train.stages import apply_stage
from tests.train.original_names import original_name

GOLDEN = Path(__file__).parent.parent / "golden" / "training"
RECORDED: dict[str, Any] = json.loads((GOLDEN / "trainable_and_groups.json").read_text())
# The recorded models' tensors outside projector, newline and language model; none of them ever learns.
TOWER_TENSORS = 55
START_END = (480, 481)


@dataclass(frozen=True)
class Flags:
    """Our settings for a recorded set. added, missing: names that learn here only, or in the original only."""

    tune: TuneSection
    rates: dict[str, float] = field(default_factory=dict)
    projector: str = "mlp2x_gelu"
    newline: bool = False
    start_end: bool = False
    added: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


ALIGN, WHOLE = TuneSection(), TuneSection(language_model="full")
LORA = TuneSection(language_model="lora", language_model_lora=LoraSection(rank=4, alpha=8.0))
LINEAR: dict[str, Any] = {"projector": "linear", "start_end": True}
FLAGS = {
    "full": Flags(WHOLE),
    "pretrain": Flags(ALIGN),
    "freeze_projector": Flags(TuneSection(projector="frozen", language_model="full")),
    # "freeze_backbone" forgets the output layer; here a frozen language model is frozen.
    "freeze_backbone": Flags(ALIGN, missing=("lm_head.weight",)),
    "projector_lr": Flags(WHOLE, {"projector_learning_rate": 1e-3}),
    "lora": Flags(LORA),
    "lora_projector_lr": Flags(LORA, {"projector_learning_rate": 1e-3}),
    # The rows of new tokens stayed random (LoRA), or all rows learnt in a forward pass that then raised.
    "lora_startend": Flags(LORA, **LINEAR, added=("model.embed_tokens.added_rows", "lm_head.added_rows")),
    "startend_pretrain": Flags(
        ALIGN,
        **LINEAR,
        added=("model.embed_tokens.added_rows", "lm_head.added_rows"),
        missing=("model.embed_tokens.weight",),
    ),
    "spatial_unpad_full": Flags(WHOLE, newline=True),
    # The newline was left random in stage 1, and was not saved.
    "spatial_unpad_pretrain": Flags(ALIGN, newline=True, added=("model.image_newline",)),
    "identity": Flags(WHOLE, projector="identity"),
    "mlp3x": Flags(WHOLE, projector="mlp3x_gelu"),
}


def build(flags: Flags, *, text_width: int = 16) -> Llava:
    """A model with the tensors of the recorded one: two Llama blocks, three CLIP blocks."""
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": text_width,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 482,
            "tie_word_embeddings": False,
        },
        image_token_id=5,
        projector=flags.projector,
        merge_type="spatial_unpad" if flags.newline else "flat",
        image_start_end=flags.start_end,
    )
    return Llava.from_config(config)


def learning(flags: Flags) -> tuple[dict[str, tuple[float, float]], int]:
    """The original's name -> (rate, decay) of everything that learns here, and how many tensors do not."""
    model = build(flags)
    optim = OptimSection(learning_rate=2e-5, weight_decay=0.1, **flags.rates)  # type: ignore[arg-type]
    apply_stage(model, flags.tune, optim=optim, added_ids=START_END if flags.start_end else ())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in build_optimizer(model.named_parameters(), optim).param_groups:
        for parameter in group["params"]:
            assert parameter.requires_grad
            name = original_name(names[id(parameter)], linear=flags.projector == "linear")
            found[name] = (group["peak"], group["weight_decay"])
    learnt = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(learnt) == len(found)
    return found, len(names) - len(found)


def recorded(name: str) -> dict[str, tuple[float, float]]:
    return {
        parameter.removeprefix("base_model.model."): (group["lr"], group["weight_decay"])
        for group in RECORDED[name]["groups"]
        for parameter in group["params"]
    }


def test_every_recorded_set_is_compared_but_the_one_that_did_not_run() -> None:
    assert set(RECORDED) == set(FLAGS) | {"bits4"}
    assert "error" in RECORDED["bits4"]


@pytest.mark.parametrize("name", FLAGS)
def test_what_learns_is_what_learnt_in_the_original(name: str) -> None:
    flags = FLAGS[name]
    found, frozen = learning(flags)
    original = {parameter.removeprefix("base_model.model.") for parameter in RECORDED[name]["trainable"]}
    assert original == set(recorded(name))
    assert set(found) == (original - set(flags.missing)) | set(flags.added)
    newly_frozen = len(flags.missing) - sum(added == "model.image_newline" for added in flags.added)
    assert frozen == RECORDED[name]["frozen_count"] + newly_frozen
    assert frozen >= TOWER_TENSORS


@pytest.mark.parametrize("name", FLAGS)
def test_rates_and_decay_are_the_originals(name: str) -> None:
    flags = FLAGS[name]
    found, _ = learning(flags)
    original = recorded(name)
    # The newline is a vector and belongs to the projector: no decay, the projector's rate.
    compared = set(found) - set(flags.added) - {"model.image_newline"}
    assert compared
    assert {parameter: found[parameter] for parameter in compared} == {
        parameter: original[parameter] for parameter in compared
    }


def test_the_newline_learns_at_the_projectors_rate_without_decay() -> None:
    flags = Flags(WHOLE, {"projector_learning_rate": 1e-3}, newline=True)
    assert learning(flags)[0]["model.image_newline"] == (1e-3, 0.0)
    assert recorded("spatial_unpad_full")["model.image_newline"] == (2e-5, 0.1)


def test_the_betas_and_eps_are_the_originals_by_default() -> None:
    optim = OptimSection(learning_rate=2e-5)
    for recording in RECORDED.values():
        for group in recording.get("groups", ()):
            assert (group["betas"], group["eps"]) == ([optim.beta1, optim.beta2], optim.eps)


def test_an_identity_projector_between_unequal_widths_is_refused_where_the_original_fails_later() -> None:
    with pytest.raises(CheckpointError, match="needs equal widths"):
        build(FLAGS["identity"], text_width=32)
