from __future__ import annotations

import pytest
import torch

from llava.checkpoint.load import build
from llava.model.llava import Llava
from llava.quickstart.bases import shipped_bases
from llava.train.sections import TuneSection
from llava.train.selection import plan_storage


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_a_frozen_tower_held_in_half_precision_changes_nothing_of_the_projectors_start(compute: torch.dtype) -> None:
    bases = shipped_bases()

    def hold(model: Llava) -> dict[str, object]:
        return dict(plan_storage(model, TuneSection(projector="full"), compute))

    whole = build(bases.language_model, bases.vision_tower, dtype="float32", device="cpu")
    held = build(bases.language_model, bases.vision_tower, dtype="float32", device="cpu", storage=hold)  # type: ignore[arg-type]
    starts = zip(
        whole.model.multi_modal_projector.parameters(), held.model.multi_modal_projector.parameters(), strict=True
    )
    assert all(torch.equal(first, second) for first, second in starts)
    formats = {p.dtype for name, p in held.model.vision_tower.named_parameters() if name.endswith("q_proj.weight")}
    assert formats == {compute}
