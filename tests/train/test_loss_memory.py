"""Peak memory of the output layer with its loss at 7B shapes, traced on tensors without values."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from llava.train.loss import answer_loss
from llava.train.memory_trace import MemoryTrace

WIDTH, VOCABULARY = 4096, 32000


def peak_bytes(tokens: int, answers: int, *, head_learns: bool, full: bool) -> int:
    """The most that is alive at once beyond weights, hidden states and the gradients that have to be there."""
    with FakeTensorMode():
        head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(head_learns)
        hidden = torch.empty(1, tokens, WIDTH, requires_grad=True)
        places = torch.zeros(answers, dtype=torch.long)
        language_model = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCABULARY))
        model: Any = SimpleNamespace(
            logits=head, lm_head=head, embed_tokens=nn.Embedding(1, 1), language_model=language_model
        )
        with MemoryTrace(head) as trace:
            if full:
                labels = torch.zeros(tokens, dtype=torch.long)
                loss: Tensor = functional.cross_entropy(head(hidden).flatten(0, 1).float(), labels)
            else:
                loss = answer_loss(hidden, model, predictors=places, targets=places)
            wanted = [hidden, head.weight] if head_learns else [hidden]
            gradients = torch.autograd.grad(loss, wanted)
        assert len(gradients) == len(wanted)
        own = 4 * (hidden.numel() + (head.weight.numel() if head_learns else 0))
        return trace.peak().total - own


@pytest.mark.parametrize(("answers_share", "head_learns"), [(20 / 598, False), (140 / 850, True)])
@pytest.mark.parametrize("tokens", [8192, 16384])
def test_the_loss_layer_takes_a_fifteenth_of_what_full_logits_take(
    tokens: int, answers_share: float, head_learns: bool
) -> None:
    """Stage 1 with captions and stage 2 with conversations, at the default micro-batch and at half of it."""
    answers = int(tokens * answers_share)
    # full logits have their peak before any gradient of the layer's weight is there
    full = peak_bytes(tokens, answers, head_learns=False, full=True)
    ours = peak_bytes(tokens, answers, head_learns=head_learns, full=False)
    assert full > 15 * ours, f"{full / 2**20:.0f} MiB and {ours / 2**20:.0f} MiB"
