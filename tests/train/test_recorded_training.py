"""What the original's own training gave for the same weights, pictures and words: loss, gradients, four steps.

Recorded on CPU in float32 (tests/golden/training); the way from the JSON file to the step is all ours: reading,
decoding, templates, labels, layout, loss. The weights are tests/golden/checkpoints.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llava.checkpoint.load import Loaded, load
from llava.data.encoding import GroupEncoder
from llava.data.loader import Layout, Loader, StepPlan
from llava.data.sources import ConversationSet, read_conversations
from llava.errors import ContextLengthError
from llava.prompt.processor import IGNORE_LABEL
from llava.train.loop import Trainer
from llava.train.sections import OptimSection, TuneSection
from llava.train.stages import apply_stage
from tests.train.original_names import original_name

GOLDEN = Path(__file__).parent.parent / "golden"
RECORDED = ("v1_5", "v1_linear_startend")
BATCHES = [
    (name, batch)
    for name in RECORDED
    for batch, what in json.loads((GOLDEN / "training" / f"expected_{name}.json").read_text())["batches"].items()
    if "indices" in what
]


@cache
def recorded(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((GOLDEN / "training" / f"expected_{name}.json").read_text())
    return read


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "training" / f"expected_{name}.safetensors")


def open_model(name: str, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    monkeypatch.chdir(GOLDEN / "checkpoints" / "bases")  # config.json names the tower by a relative folder
    facts = recorded(name)
    template = {"v1": "vicuna_v1"}.get(facts["conv"], facts["conv"])
    return load(GOLDEN / "checkpoints" / facts["checkpoint"], device="cpu", dtype="float32", template=template)


def open_conversations(folder: Path, indices: Sequence[int]) -> ConversationSet:
    data = json.loads((GOLDEN / "training" / "finetune.json").read_text())
    (folder / "batch.json").write_text(json.dumps([data[i] for i in indices]))
    images = GOLDEN / "checkpoints" / "bases" / "images"
    return ConversationSet([read_conversations(folder / "batch.json", image_root=images)])


def make_loader(loaded: Loaded, conversations: ConversationSet, *, micro_batch_tokens: int = 100_000) -> Loader:
    number = len(conversations)
    plan = StepPlan([(i,) for i in range(number)], number, seed=0, epochs=4.0, order="file")
    encode = GroupEncoder(conversations, loaded.processor, max_tokens=2048)
    layout = Layout(2048, 2048, micro_batch_tokens, loaded.processor.image_token_id, 0)
    return Loader(plan, encode, layout=layout)


def make_trainer(loaded: Loaded) -> Trainer:
    apply_stage(loaded.model, TuneSection(language_model="full"))
    optim = OptimSection(learning_rate=2e-3, warmup_share=0.0, schedule="constant", weight_decay=0.0)
    return Trainer(loaded.model, optim=optim, total_steps=4, dtype=torch.float32)


@pytest.mark.parametrize("micro_batch_tokens", [100_000, 1])
@pytest.mark.parametrize(("name", "batch"), BATCHES)
def test_loss_and_gradients_equal_the_originals(
    name: str, batch: str, micro_batch_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = recorded(name)["batches"][batch]
    loaded = open_model(name, monkeypatch)
    conversations = open_conversations(tmp_path, facts["indices"])
    step = make_loader(loaded, conversations, micro_batch_tokens=micro_batch_tokens).make(0)
    assert step.num_answer_tokens == facts["num_supervised_tokens"]
    summed = make_trainer(loaded)._accumulate(step.micro_batches, step.num_answer_tokens)
    assert summed / step.num_answer_tokens == pytest.approx(facts["loss"], rel=1e-6)
    linear = loaded.model.config.projector == "linear"
    gradients = {
        original_name(n, linear=linear): p.grad for n, p in loaded.model.named_parameters() if p.grad is not None
    }
    untouched = {n for n, norm in facts["grad_norms"].items() if n not in gradients and norm == 0}
    assert gradients.keys() | untouched == facts["grad_norms"].keys()
    for key, gradient in gradients.items():
        assert float(gradient.norm()) == pytest.approx(facts["grad_norms"][key], rel=1e-5, abs=1e-9), key
        if (whole := tensors(name).get(f"{batch}.grad.{key}")) is not None:
            torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RECORDED)
def test_four_steps_of_adamw_equal_the_originals(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = recorded(name)["batches"]
    loaded = open_model(name, monkeypatch)
    trainer = make_trainer(loaded)
    loader = make_loader(loaded, open_conversations(tmp_path, facts["mixed4"]["indices"]))
    records = [trainer.step(loader.make(number)) for number in range(4)]
    wanted = facts["mixed4_adamw_lr2e-3_clip1.0_4steps"]
    assert [r.loss for r in records] == pytest.approx(wanted["losses"], rel=1e-6)
    assert [r.grad_norm for r in records] == pytest.approx(wanted["grad_norm_before_clip"], rel=1e-6)


@pytest.mark.parametrize(("name", "batch"), BATCHES)
def test_labels_with_their_pictures_equal_the_originals(
    name: str, batch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = open_model(name, monkeypatch)
    conversations = open_conversations(tmp_path, recorded(name)["batches"][batch]["indices"])
    for row, conversation in zip(tensors(name)[f"{batch}.merged_labels"], conversations, strict=True):
        labels = loaded.processor.encode(conversation).labels
        np.testing.assert_array_equal(labels, row[: len(labels)].numpy())
        assert (row[len(labels) :] == IGNORE_LABEL).all()


@pytest.mark.parametrize("name", RECORDED)
def test_rows_cut_at_the_limit_give_the_originals_loss_and_never_its_nan(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = recorded(name)["batches"]
    loaded = open_model(name, monkeypatch)
    conversations = open_conversations(tmp_path, facts["mixed4"]["indices"])
    summed, answer_tokens, refused = 0.0, 0, 0
    trainer = make_trainer(loaded)
    for conversation in conversations:
        # Cut at 100, no answer is left in any of them: the original's loss is NaN, here each is refused.
        with pytest.raises(ContextLengthError, match="no answer is left"):
            loaded.processor.encode(conversation, max_length=100, overflow="truncate")
        try:
            encoded = loaded.processor.encode(conversation, max_length=150, overflow="truncate")
        except ContextLengthError:
            refused += 1
            continue
        step = Loader(
            StepPlan([(0,)], 1, seed=0),
            lambda group, encoded=encoded: [encoded],
            layout=Layout(2048, 2048, 2048, loaded.processor.image_token_id, 0),
        ).make(0)
        summed += trainer._accumulate(step.micro_batches, 1)
        answer_tokens += step.num_answer_tokens
    assert answer_tokens
    assert summed / answer_tokens == pytest.approx(facts["mixed4_truncated_to_150"]["loss"], rel=1e-6)
