"""The loss against brute force over separate sequences, in float64: layout must not matter."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import llava.train.loss as loss_module
from llava.data.batch import Batch, build_batch
from llava.data.loader import Layout, lay_out
from llava.data.packing import Tree, grow_trees
from llava.model.llava import Llava
from llava.model.tree_support import Way
from llava.prompt.processor import IGNORE_LABEL, Encoded
from llava.train.loop import Trainer
from llava.train.loss import answer_loss
from llava.train.sections import OptimSection
from llava.train.step_loss import StepLoss
from tests.train.tiny_training import IMAGE_ID, grow, make_conversation, make_mixed_conversations, separately


def make_trainer(model: Llava, dtype: torch.dtype = torch.float64) -> Trainer:
    return Trainer(model, optim=OptimSection(learning_rate=1e-3), total_steps=10, dtype=dtype)


def brute_force(model: Llava, conversations: list[Encoded]) -> Tensor:
    """Every conversation alone, no packing, no mask: the next token's cross-entropy at supervised places."""
    total = torch.zeros((), dtype=torch.float64)
    for one in conversations:
        pixels = torch.from_numpy(one.pixel_values).double() if len(one.pixel_values) else None
        hidden = model(torch.from_numpy(one.input_ids)[None], pixel_values=pixels)
        scores = model.logits(hidden)[0, :-1]
        labels = torch.from_numpy(one.labels)[1:]
        total = total + functional.cross_entropy(scores, labels, reduction="sum", ignore_index=IGNORE_LABEL)
    return total


def summed_loss(model: Llava, trees: list[Tree], *, row_tokens: int = 64, micro_batch_tokens: int = 256) -> Tensor:
    layout = Layout(row_tokens, row_tokens, micro_batch_tokens, IMAGE_ID, 0)
    trainer = make_trainer(model)
    return sum((trainer.summed_loss(batch) for batch in lay_out(trees, layout)), torch.zeros((), dtype=torch.float64))


def gradients(model: Llava, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("row_tokens", [1, 24, 64, 200])
@pytest.mark.parametrize("micro_batch_tokens", [1, 100, 10_000])
def test_any_layout_gives_the_loss_of_separate_sequences(
    tiny_llava: Callable[..., Llava], row_tokens: int, micro_batch_tokens: int
) -> None:
    model = tiny_llava().double()
    groups = make_mixed_conversations()
    expected = brute_force(model, [one for group in groups for one in group])
    trees = grow(groups, max_tokens=max(row_tokens, 30))
    made = summed_loss(model, trees, row_tokens=row_tokens, micro_batch_tokens=micro_batch_tokens)
    assert made.item() == pytest.approx(expected.item(), rel=1e-12)


def test_trees_give_the_gradients_of_separate_sequences(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava().double()
    groups = make_mixed_conversations()
    expected = gradients(model, brute_force(model, [one for group in groups for one in group]))
    for trees in (grow(groups), separately(groups)):
        made = gradients(model, summed_loss(model, trees))
        assert made.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(
                made[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_attention_by_trees_and_by_mask_give_the_same_gradients(tiny_llava: Callable[..., Llava]) -> None:
    made = []
    ways: tuple[Way, ...] = ("layout", "mask")
    for way in ways:
        model = tiny_llava().double()
        step_loss = StepLoss(model, dtype=torch.float64)
        assert step_loss.way == "layout"
        step_loss.way = way
        batch = build_batch([grow(make_mixed_conversations())], pad_token_id=0)
        made.append(gradients(model, step_loss(batch)))
    for name, gradient in made[0].items():
        torch.testing.assert_close(made[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_a_family_that_takes_no_mask_trains_one_conversation_a_row(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava().double()
    groups = make_mixed_conversations()
    expected = gradients(model, brute_force(model, [one for group in groups for one in group]))
    step_loss = StepLoss(model, dtype=torch.float64)
    step_loss.way = "none"
    rows = lay_out(separately(groups), Layout(256, 1, 256, IMAGE_ID, 0))
    made = gradients(model, torch.stack([step_loss(batch) for batch in rows]).sum())
    for name, gradient in expected.items():
        torch.testing.assert_close(made[name], gradient, rtol=1e-5, atol=1e-7)


def test_captions_of_one_picture_may_begin_with_their_answer(tiny_llava: Callable[..., Llava]) -> None:
    """Template `plain`: the first answer token follows the picture, so the prefix's last token predicts it."""
    model = tiny_llava().double()
    rng = np.random.default_rng(0)
    captions = [make_conversation(rng, picture=2, question=0, answer=n) for n in (2, 4)]
    captions[1].input_ids[5:] += 7
    captions[1].labels[5:] += 7
    trees = grow([captions])
    assert len(trees) == 1
    expected = gradients(model, brute_force(model, captions))
    made = gradients(model, summed_loss(model, trees))
    for name, gradient in expected.items():
        torch.testing.assert_close(
            made[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_an_all_ones_mask_would_give_another_loss(tiny_llava: Callable[..., Llava]) -> None:
    """The trap that the explicit mask avoids is there: this test fails if the mask stops mattering."""
    model = tiny_llava().double()
    batch = build_batch([grow(make_mixed_conversations())], pad_token_id=0)
    arguments = {"pixel_values": batch.pixel_values}
    causal = torch.ones(1, 1, *(2 * [batch.input_ids.shape[1]]), dtype=torch.bool).tril()
    apart = model(batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention_mask(), **arguments)
    together = model(batch.input_ids, position_ids=batch.position_ids, attention_mask=causal, **arguments)
    assert (apart - together).abs().max() > 1e-3


def full_logits_loss(model: Llava, batch: Batch, *, scale: float) -> Tensor:
    """Scores of every token, as a usual trainer has them."""
    step_loss = StepLoss(model, dtype=torch.float32)
    hidden = model.decode(step_loss._embed(batch), position_ids=batch.position_ids, tree_layout=batch.layout)
    scores = model.logits(hidden).flatten(0, 1)
    wanted = torch.full((len(scores),), IGNORE_LABEL)
    wanted[batch.predictors] = batch.targets
    return functional.cross_entropy(scores.float(), wanted, reduction="sum", ignore_index=IGNORE_LABEL) * scale


@pytest.mark.parametrize("head_learns", [False, True])
def test_gradients_are_those_of_full_logits_to_the_bit(tiny_llava: Callable[..., Llava], head_learns: bool) -> None:
    """One prediction a position, so that no sum has its terms in another order."""
    model = tiny_llava()
    model.language_model.requires_grad_(head_learns)
    batch = build_batch([separately(make_mixed_conversations())], pad_token_id=0)
    scale = 1 / batch.num_answer_tokens
    full = full_logits_loss(model, batch, scale=scale)
    expected = gradients(model, full)
    loss = StepLoss(model, dtype=torch.float32)(batch, scale)
    made = gradients(model, loss)
    assert loss.item() == pytest.approx(full.item(), rel=1e-6)
    assert made.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(made[name], gradient), name


@pytest.mark.parametrize("tied", [False, True])
def test_chunks_of_the_output_layer_change_neither_loss_nor_gradient(
    tiny_llava: Callable[..., Llava], monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    model = tiny_llava().double()
    if tied:
        model.language_model.lm_head.weight = model.embed_tokens.weight
    trees = grow(make_mixed_conversations())
    whole_loss = summed_loss(model, trees)
    whole = gradients(model, whole_loss)
    monkeypatch.setattr(loss_module.answer_loss, "__kwdefaults__", {"scale": 1.0, "chunk_bytes": 3 * 4 * 64})
    cut_loss = summed_loss(model, trees)
    cut = gradients(model, cut_loss)
    assert cut_loss.item() == pytest.approx(whole_loss.item(), rel=1e-12)
    assert cut.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-9, atol=1e-12)


def test_chunks_under_autocast_train_the_same_parameters(tiny_llava: Callable[..., Llava]) -> None:
    """Autocast keeps one copy of the output layer's weight for all chunks; every chunk's gradient goes through it."""
    model = tiny_llava()
    hidden = torch.randn(1, 40, 32, requires_grad=True)
    arguments = {"predictors": torch.arange(30), "targets": torch.arange(30) % 9}
    made = []
    for chunk_bytes in (1 << 20, 4 * 64 * 4):
        model.zero_grad()
        hidden.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer_loss(hidden, model, chunk_bytes=chunk_bytes, **arguments).backward()
        made.append((hidden.grad.clone(), model.lm_head.weight.grad.clone()))
    for one, other in zip(*made, strict=True):
        assert one.any()
        assert float((one - other).norm()) < 2e-2 * float(one.norm())  # bfloat16 sums of chunks


def test_the_loss_layer_holds_a_chunk_of_scores_and_not_all(tiny_llava: Callable[..., Llava]) -> None:
    """Bytes of the largest tensor that the layer makes, against the scores of every position."""
    model = tiny_llava()
    hidden = torch.randn(1, 3000, 32, requires_grad=True)
    answers = torch.arange(0, 3000, 5)
    with LargestTensor() as watch:
        answer_loss(hidden, model, predictors=answers, targets=answers % 64, chunk_bytes=4 * 64 * 20).backward()
    assert watch.numbers <= hidden.numel()  # the gradient of `hidden` itself
    assert watch.numbers < 3000 * 64


class LargestTensor(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple) else (made,):
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return made


def test_without_gradients_the_loss_is_the_same(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    batch = build_batch([grow(make_mixed_conversations())], pad_token_id=0)
    step_loss = StepLoss(model, dtype=torch.float32)
    with torch.no_grad():
        quiet = step_loss(batch)
    assert not quiet.requires_grad
    assert quiet.item() == pytest.approx(step_loss(batch).item(), rel=1e-6)


def test_a_batch_without_answers_costs_nothing(tiny_llava: Callable[..., Llava]) -> None:
    model = tiny_llava()
    one = make_conversation(np.random.default_rng(0), picture=1)
    silent = Encoded(
        one.input_ids, np.full_like(one.labels, IGNORE_LABEL), one.pixel_values, one.image_sizes, one.tiles_per_image
    )
    trees = grow_trees([silent], image_token_id=IMAGE_ID, max_tokens=64)
    assert make_trainer(model, torch.float32).summed_loss(build_batch([trees], pad_token_id=0)).item() == 0.0
