"""Rows of added tokens learn what the whole matrix would teach them, and nothing else of it moves."""

import pytest
import torch

from llava.model.added_rows import added_rows, attach_added_rows, write_added_rows
from llava.model.llava import Llava
from tests.model.test_llava import tiny_model

IDS = [91, 40]


def frozen_model(*, tied: bool = False) -> Llava:
    model = tiny_model().double()
    if tied:
        model.language_model.lm_head.weight = model.embed_tokens.weight
    model.requires_grad_(False)
    return model


def loss(model: Llava) -> torch.Tensor:
    ids = torch.tensor([[1, 91, 7, 40, 8], [3, 4, 40, 5, 6]])
    return model.logits(model(ids)).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean()


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_rows_get_the_gradients_that_they_get_in_the_whole_matrix(tied: bool) -> None:
    whole = frozen_model(tied=tied)
    whole.embed_tokens.weight.requires_grad_(True)
    whole.lm_head.weight.requires_grad_(True)  # type: ignore[union-attr]
    loss(whole).backward()
    model = frozen_model(tied=tied)
    names = attach_added_rows(model, IDS)
    assert len(names) == (1 if tied else 2)
    for _, _, rows in added_rows(model):
        rows.data = rows.data.double()
    torch.testing.assert_close(loss(model), loss(whole))
    loss(model).backward()
    for name, ids, rows in added_rows(model):
        wanted = whole.get_parameter(name).grad
        assert wanted is not None
        torch.testing.assert_close(rows.grad, wanted[ids])
    assert all(p.grad is None for name, p in model.named_parameters() if not name.endswith("added_rows"))


def test_rows_are_reached_by_text_that_has_none_of_the_tokens() -> None:
    model = frozen_model()
    attach_added_rows(model, IDS)
    model.logits(model(torch.tensor([[1, 2, 3]]))).sum().backward()
    assert all(rows.grad is not None for _, _, rows in added_rows(model))


def test_only_the_rows_move_under_weight_decay_and_they_can_be_written_back() -> None:
    model = frozen_model()
    attach_added_rows(model, IDS)
    before = model.embed_tokens.weight.clone()
    rows = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(rows, lr=0.1, weight_decay=0.5)
    loss(model).backward()
    optimizer.step()
    answered = model(torch.tensor([[1, 91, 40]]))
    write_added_rows(model)
    moved = (model.embed_tokens.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == sorted(IDS)
    torch.testing.assert_close(model(torch.tensor([[1, 91, 40]])), answered)


def test_a_matrix_that_learns_anyway_gets_no_rows() -> None:
    model = frozen_model()
    model.embed_tokens.weight.requires_grad_(True)
    assert attach_added_rows(model, IDS) == ["language_model.lm_head.added_rows"]
    assert attach_added_rows(frozen_model(), []) == []
