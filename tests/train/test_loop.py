"""The loop: accumulation is exact, the guards speak, and a tiny model learns."""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from llava.data.batch import Batch
from llava.data.loader import GlobalStep, Layout, lay_out
from llava.errors import TrainingError
from llava.model.llava import Llava
from llava.train.loop import Trainer
from llava.train.sections import OptimSection, TuneSection
from llava.train.stages import apply_stage
from tests.train.tiny_training import IMAGE_ID, grow, make_conversation, make_mixed_conversations


def make_step(number: int = 0, *, micro_batch_tokens: int = 10_000, seed: int = 0) -> GlobalStep:
    layout = Layout(24, 24, micro_batch_tokens, IMAGE_ID, 0)
    batches = tuple(lay_out(grow(make_mixed_conversations(seed)), layout))
    return GlobalStep(number, 0.0, (0, 1, 2), batches, 0)


def make_trainer(model: Llava, *, tune: TuneSection | None = None, **changes: object) -> Trainer:
    apply_stage(model, tune or TuneSection(language_model="full"))
    optim = OptimSection(learning_rate=3e-3, warmup_share=0.0, schedule="constant")
    settings = {"optim": optim, "total_steps": 100, "dtype": torch.float32, **changes}
    return Trainer(model, **settings)  # type: ignore[arg-type]


def train_the_projector(model: Llava, step: GlobalStep) -> dict[str, torch.Tensor]:
    make_trainer(model, tune=TuneSection()).step(step)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_micro_batches_give_the_gradient_of_one_batch(tiny_llava: Callable[..., Llava]) -> None:
    collected = []
    for size in (10_000, 60, 1):
        model = tiny_llava().double()
        step = make_step(micro_batch_tokens=size)
        trainer = make_trainer(model, dtype=torch.float64)
        trainer._accumulate(step.micro_batches, step.num_answer_tokens)
        collected.append(
            (len(step.micro_batches), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (one, whole), (some, cut), (many, single) = collected
    assert one == 1 < some < many
    for name, gradient in whole.items():
        torch.testing.assert_close(
            cut[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
        torch.testing.assert_close(
            single[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_loss_is_the_mean_over_the_whole_steps_answer_tokens(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    step = make_step(micro_batch_tokens=1)
    trainer = make_trainer(model)
    with torch.no_grad():
        total = sum(float(trainer.summed_loss(batch)) for batch in step.micro_batches)
    assert trainer.step(step).loss == pytest.approx(total / step.num_answer_tokens, rel=1e-6)


def test_the_gradient_is_that_of_the_mean_over_the_whole_steps_answer_tokens(
    tiny_llava: Callable[..., Llava],
) -> None:
    model = tiny_llava().double()
    step = make_step(micro_batch_tokens=60)
    trainer = make_trainer(model, dtype=torch.float64)
    total = torch.stack([trainer.summed_loss(batch) for batch in step.micro_batches]).sum()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mean = torch.autograd.grad(total / step.num_answer_tokens, list(trained.values()), allow_unused=True)
    trainer._accumulate(step.micro_batches, step.num_answer_tokens)
    for (name, parameter), wanted in zip(trained.items(), mean, strict=True):
        if wanted is None:
            assert parameter.grad is None, name
            continue
        # norms round to float32 inside, before or after the division
        assert float((parameter.grad - wanted).norm()) <= 1e-6 * float(wanted.norm()), name


def test_a_tiny_model_learns_to_read_its_picture(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    rng = np.random.default_rng(0)
    groups = [[make_conversation(rng, picture=picture) for _ in range(3)] for picture in range(4)]
    batches = tuple(lay_out(grow(groups), Layout(64, 64, 10_000, IMAGE_ID, 0)))
    trainer = make_trainer(model)
    losses = [trainer.step(GlobalStep(n, 0.0, (), batches, 0)).loss for n in range(60)]
    assert losses[0] > 3
    assert losses[-1] < 0.3


def test_a_frozen_part_keeps_its_weights(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = train_the_projector(model, make_step())
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"multi_modal_projector"}


def test_a_non_finite_gradient_leaves_the_weights_alone_and_is_reported(
    tiny_llava: Callable[..., Llava], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llava()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(model, max_bad_steps=3)
    step = make_step()
    pixels = step.micro_batches[0].pixel_values
    assert pixels is not None
    poisoned = replace(step.micro_batches[0], pixel_values=torch.full_like(pixels, float("nan")))
    bad = replace(step, micro_batches=(poisoned,))
    with caplog.at_level(logging.WARNING):
        record = trainer.step(bad)
    assert record.skipped
    assert "the weights were left alone" in caplog.text
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    trainer.step(bad)
    with pytest.raises(TrainingError, match="not finite for 3 steps in a row"):
        trainer.step(bad)


def test_good_steps_forgive_bad_ones(tiny_llava: Callable[..., Llava]) -> None:
    trainer = make_trainer(tiny_llava(), max_bad_steps=2)
    step = make_step()
    pixels = step.micro_batches[0].pixel_values
    assert pixels is not None
    bad = replace(step, micro_batches=(replace(step.micro_batches[0], pixel_values=pixels * float("inf")),))
    for _ in range(3):
        assert trainer.step(bad).skipped
        assert not trainer.step(step).skipped


def test_a_part_that_is_cut_off_from_the_loss_is_named(
    tiny_llava: Callable[..., Llava], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llava()
    whole = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda *a, **k: [f.detach() for f in whole(*a, **k)])
    with pytest.raises(TrainingError, match=r"trained tensors got no gradient: multi_modal_projector.linear_1.weight"):
        make_trainer(model).step(make_step())


def test_a_step_whose_answers_are_all_masked_changes_nothing(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = make_step()
    empty = torch.zeros(0, dtype=torch.long)

    def silent(batch: Batch) -> Batch:
        return replace(batch, predictors=empty, targets=empty)

    record = make_trainer(model).step(replace(step, micro_batches=tuple(map(silent, step.micro_batches))))
    assert record.skipped
    assert record.loss == 0.0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_bfloat16_autocast_keeps_weights_and_gradients_in_float32(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    record = make_trainer(model, dtype=torch.bfloat16).step(make_step())
    exact = make_trainer(tiny_llava()).step(make_step())
    assert record.loss == pytest.approx(exact.loss, rel=2e-2)  # bfloat16 has 8 bits
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_dropout_draws_anew_for_each_step_and_process_and_the_same_for_a_seed(
    tiny_llava: Callable[..., Llava], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(*, step: int = 0, process: int = 0, seed: int = 0) -> float:
        model = tiny_llava()
        lora = {"rank": 4, "dropout": 0.5}
        tune = TuneSection.model_validate({"language_model": "lora", "language_model_lora": lora})
        trainer = make_trainer(model, tune=tune, seed=seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # new ones are zero, so that nothing could be seen of what is dropped before them
                torch.nn.init.constant_(parameter, 0.05)
        monkeypatch.setattr("llava.train.loop.process_number", lambda: process)
        return trainer.step(make_step(step)).loss

    assert loss() == loss()
    assert len({loss(), loss(step=1), loss(process=1), loss(seed=1)}) == 4
