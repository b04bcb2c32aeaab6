"""What learns in which stage."""

import importlib.util
from collections.abc import Callable

import pytest
import torch

from llava.errors import TrainingError
from llava.model.llava import Llava
from llava.train.optimizer import build_optimizer
from llava.train.sections import LoraSection, OptimSection, TuneSection
from llava.train.selection import part_of
from llava.train.stages import TABLE_HEAD, apply_stage, check_reached, describe_stage, peak_rate
from tests.model.test_llava import tiny_model

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes: pip install 'llava[quant]'")


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


def test_the_table_says_rate_rank_and_how_weights_are_held(tiny_llava: Callable[..., Llava]) -> None:
    tune = TuneSection(vision_tower="lora", language_model="last_layers", language_model_layers=1)
    optim = OptimSection(learning_rate=1e-3, language_model_learning_rate=2e-5, vision_tower_learning_rate=5e-6)
    rows = describe_stage(apply_stage(tiny_llava(), tune, optim=optim, compute=torch.bfloat16))
    assert [len(row) for row in rows] == [len(TABLE_HEAD)] * 4
    tower, projector, language = (dict(zip(TABLE_HEAD, row, strict=True)) for row in rows[:3])
    assert (tower["rate"], tower["LoRA rank"], tower["held in"]) == ("5e-06", "64", "float32, bfloat16")
    assert (projector["rate"], projector["LoRA rank"], projector["held in"]) == ("0.001", "", "float32")
    assert (language["rate"], language["held in"]) == ("2e-05", "float32, bfloat16")


def test_every_part_has_its_own_rate_in_the_optimizer(tiny_llava: Callable[..., Llava]) -> None:
    optim = OptimSection(learning_rate=1.0, language_model_learning_rate=2.0, vision_tower_learning_rate=3.0)
    model = tiny_llava()
    apply_stage(model, TuneSection(vision_tower="lora", language_model="lora"))
    peaks = {
        id(p): group["peak"]
        for group in build_optimizer(model.named_parameters(), optim).param_groups
        for p in group["params"]
    }
    wanted = {"vision_tower": 3.0, "projector": 1.0, "language_model": 2.0}
    assert all(peaks[id(p)] == wanted[part_of(name)] for name, p in model.named_parameters() if p.requires_grad)
    assert peak_rate("projector", optim) == 1.0


@pytest.mark.parametrize("mode", ["frozen", "lora"])
def test_frozen_weights_in_the_products_format_change_no_bit_of_loss_or_gradient(
    tiny_llava: Callable[..., Llava], mode: str
) -> None:
    tune = TuneSection(language_model=mode)  # type: ignore[arg-type]
    made = []
    for compute in (torch.float32, torch.bfloat16):
        model = tiny_llava()
        apply_stage(model, tune, compute=compute)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(1, 3, 8, 8, generator=generator)
        ids = torch.tensor([[1, 5, 5, 5, 5, 11, 12, 13]])
        with torch.random.fork_rng(), torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(0)  # of dropout
            hidden = model(ids, pixel_values=pixels)
            loss = model.logits(hidden).float().log_softmax(-1)[0, 5:, 20].sum()
        loss.backward()
        made.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss_32, grads_32), (loss_16, grads_16) = made
    assert torch.equal(loss_32, loss_16)
    assert grads_32.keys() == grads_16.keys()
    assert all(torch.equal(grads_32[name], grads_16[name]) for name in grads_32)  # type: ignore[arg-type]


def test_float32_runs_hold_everything_in_float32(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    apply_stage(model, TuneSection(language_model="lora"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own
def test_a_loras_gradients_are_pefts_own_on_the_same_weights(tiny_llava: Callable[..., Llava]) -> None:
    from peft import LoraConfig, get_peft_model

    ids = torch.tensor([[1, 11, 12, 13, 14, 15]])
    model = tiny_llava()
    settings = LoraSection(rank=4, alpha=8.0, dropout=0.0)
    apply_stage(model, TuneSection(projector="frozen", language_model="lora", language_model_lora=settings), seed=3)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.1)
    model.logits(model(ids)).log_softmax(-1)[..., 7].sum().backward()
    ours = {name.removeprefix("language_model."): p for name, p in model.named_parameters() if p.requires_grad}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny_llava().language_model, config).train()  # type: ignore[arg-type]
    peft = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert peft.keys() == ours.keys()
    for name, parameter in peft.items():
        parameter.data.copy_(ours[name].data)
    theirs(ids).logits.log_softmax(-1)[..., 7].sum().backward()
    for name, parameter in peft.items():
        torch.testing.assert_close(parameter.grad, ours[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def test_adapters_start_from_the_seed_alone(tiny_llava: Callable[..., Llava]) -> None:
    def start(seed: int, compute: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        model = tiny_llava()
        apply_stage(model, TuneSection(vision_tower="lora", language_model="lora"), seed=seed, compute=compute)
        return {name: p.detach() for name, p in model.named_parameters() if ".lora_A." in name}

    first, torch_state = start(0), torch.get_rng_state()
    second, rounded, other = start(0), start(0, torch.bfloat16), start(1)
    assert all(torch.equal(first[n], second[n]) and torch.equal(first[n], rounded[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)
    assert len({tuple(value.flatten()[:4].tolist()) for value in first.values()}) == len(first)
    for value in first.values():
        bound = value.shape[1] ** -0.5
        assert value.abs().max() <= bound and value.abs().max() > 0.9 * bound, "kaiming-uniform, as peft's"
    assert torch_state is not None


def test_an_adapter_without_a_gradient_is_named(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    apply_stage(model, TuneSection(language_model="lora"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    lost = "language_model.model.layers.1.mlp.up_proj.lora_B.default.weight"
    model.get_parameter(lost).grad = None
    with pytest.raises(TrainingError, match=rf"1 trained tensors got no gradient: {lost}"):
        check_reached(model)
    model.get_parameter(lost).grad = torch.full_like(model.get_parameter(lost), float("inf"))
    with pytest.raises(TrainingError, match=rf"not finite at the first step: {lost}"):
        check_reached(model)


@needs_bitsandbytes
@pytest.mark.parametrize("training", [True, False], ids=["ours", "bitsandbytes' own"])
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel:UserWarning")  # the trap's only sign
def test_an_answer_before_training_takes_no_gradients_or_is_named(training: bool) -> None:
    """bitsandbytes repacks by itself on processors with AVX512-BF16; on others both ways train."""
    from bitsandbytes.nn.modules import has_avx512bf16

    model = tiny_model()  # the repacking needs widths of 64
    apply_stage(model, TuneSection(projector="frozen", language_model="qlora"))
    for layer in model.modules():
        if not training and hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = has_avx512bf16()
    ids = torch.tensor([[1, 11, 12, 13]])
    with torch.no_grad():
        model.eval()(ids)
    model.train()
    model.logits(model(ids)).sum().backward()
    if training or not has_avx512bf16():
        check_reached(model)
    else:
        with pytest.raises(TrainingError, match=r"repacked 14 layers \(language_model.*wrong gradient or none"):
            check_reached(model)


@needs_bitsandbytes
@pytest.mark.parametrize("part", ["vision_tower", "projector", "language_model"])
@pytest.mark.parametrize("mode", ["frozen_4bit", "qlora"])
def test_packed_parts_learn_or_pass_gradients_on(tiny_llava: Callable[..., Llava], part: str, mode: str) -> None:
    modes = {"vision_tower": "lora", "projector": "full", "language_model": "lora", part: mode}
    model = tiny_llava()
    summaries = {s.part: s for s in apply_stage(model, TuneSection(**modes))}  # type: ignore[arg-type]
    plain = {s.part: s for s in apply_stage(tiny_llava(), TuneSection(**{**modes, part: "frozen"}))}  # type: ignore[arg-type]
    assert "nf4" in summaries[part].held_in  # type: ignore[index]
    assert summaries[part].parameters - summaries[part].trained == plain[part].parameters  # type: ignore[index]
    ids = torch.tensor([[1, 5, 5, 5, 5, 11, 12, 13]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model.logits(model(ids, pixel_values=pixels)).log_softmax(-1)[0, 4:, 20].sum().backward()
    dead = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert dead == []
    check_reached(model)
