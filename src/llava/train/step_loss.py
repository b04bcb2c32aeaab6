"""One forward pass from a batch to its summed loss: what several processes wrap.

DistributedDataParallel and FSDP2 act when the module that they wrap is called, so everything that a step uses of the
model lies in this one call. With several processes each of them has to use the same parameters in every call, or one
waits for another for ever: a batch without pictures then takes the tower and the projector along at a weight of zero.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from llava.data.batch import Batch, build_batch
from llava.data.packing import Branch, Tree
from llava.model.last_block import last_block_only_at
from llava.model.llava import Llava
from llava.model.tree_support import Way, enable_tree_attention, find_tree_support
from llava.prompt.processor import IGNORE_LABEL
from llava.train.loss import answer_loss
from llava.train.picture_features import PictureFeatures

_BLANK_TOKENS = 8


class StepLoss(nn.Module):
    """The model with its loss. dtype: what matrix products are computed in, under autocast; with_all_parts: use every
    part of the model in every call, pictures or not."""

    def __init__(self, model: Llava, *, dtype: torch.dtype, with_all_parts: bool = False) -> None:
        super().__init__()
        self.model = model
        self.with_all_parts = with_all_parts
        self.pictures = PictureFeatures(model)
        self._dtype = dtype
        # the fastest way that is exact for this family; a test may set another
        support = find_tree_support(model.language_model)
        self.way: Way = support.way
        self.picks_positions = support.last_block
        enable_tree_attention(model.language_model)

    def forward(self, batch: Batch, scale: float = 1.0) -> Tensor:
        """`scale` times the summed cross-entropy of a batch's answer tokens; the batch lies on the step's device."""
        with self._autocast(batch.input_ids.device.type):
            embeddings = self._embed(batch)
            with last_block_only_at(self.model.language_model, batch.read if self._picks(batch) else None):
                hidden = self.model.decode(
                    embeddings,
                    position_ids=batch.position_ids,
                    attention_mask=self._mask(batch),
                    tree_layout=batch.layout if self.way == "layout" else None,
                )
            return answer_loss(hidden, self.model, predictors=batch.predictors, targets=batch.targets, scale=scale)

    def _picks(self, batch: Batch) -> bool:
        """Whether the last block is computed where it is read only; a batch that nobody reads uses all of its weights,
        as other processes do."""
        return self.picks_positions and len(batch.read) > 0

    def _mask(self, batch: Batch) -> Tensor | None:
        if self.way == "layout":
            return None
        return batch.padding_mask() if self.way == "none" else batch.attention_mask()

    def _embed(self, batch: Batch) -> Tensor:
        """The batch's embeddings, (B, T, D)."""
        model = self.model
        if batch.pixel_values is None:
            embeddings = model.embed(batch.input_ids)
            # Added here and not to the loss: the backward pass then takes the same way through a frozen language
            # model as it does on a process that has pictures.
            return embeddings + model.touch_vision() if self.with_all_parts else embeddings
        features = torch.cat(self.pictures.of(batch))
        if self.with_all_parts and model.image_newline is not None:
            features = features + 0 * model.image_newline.sum()  # not every way of merging tiles uses it
        return model.embed(batch.input_ids, features)

    def _autocast(self, device_type: str) -> AbstractContextManager[object]:
        if self._dtype in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(device_type, dtype=self._dtype)


def make_blank_batch(*, image_token_id: int) -> Batch:
    """A batch of one short text without an answer: its loss is 0, and so is every gradient."""
    ids = np.full(_BLANK_TOKENS, 1 if image_token_id == 0 else 0, dtype=np.int64)
    branch = Branch(ids, np.full(_BLANK_TOKENS, IGNORE_LABEL, dtype=np.int64))
    tree = Tree(ids[:0], (branch,), np.zeros((0, 3, 1, 1), dtype=np.float32), (), ())
    return build_batch([[tree]], pad_token_id=int(ids[0]))
