"""Making a whole model of adapters and their base, and looking whether it answers as they did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.checkpoint.convert import Begin, ConvertReport, convert
from llava.checkpoint.load import load, open_checkpoint
from llava.checkpoint.opened import Opened
from llava.errors import CheckpointError
from llava.model.llava import Llava

# What rounding the merged weights may move a score by, as a share of the largest score.
ALLOWED = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
NUM_WORDS = 32


@dataclass(frozen=True)
class MergeReport:
    """What merging did. difference: the largest of any score, before and after; same_choices: positions with the same
    best token, of num_positions."""

    written: ConvertReport
    difference: float
    largest_score: float
    same_choices: int
    num_positions: int

    def __str__(self) -> str:
        return (
            f"{self.written}\n  scores of a picture and {NUM_WORDS} words, base and adapters against the merged model: "
            f"at most {self.difference:.2g} apart (of up to {self.largest_score:.3g}), the same best token at "
            f"{self.same_choices} of {self.num_positions} positions"
        )


def merge(
    source: str | Path,
    target: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    begin: Begin | None = None,
) -> MergeReport:
    """Write base and adapters of a folder as one model in Hugging Face's layout, re-open it and compare its scores.

    Sums are made in float32. dtype: what they are written in; the base's own format when None. base, vision_tower: as
    in `load`; device: where scores are compared. Raises CheckpointError when `source` holds no adapter, or when the
    merged model's scores are further from the adapters' than rounding explains: nothing is left at `target` then.
    """
    beside = open_checkpoint(source, base=base, vision_tower=vision_tower, merge_lora=False)
    if beside.adapter is None:
        raise CheckpointError(f"{source}: holds no adapter beside a base; `llava convert` writes whole models anew")
    chosen = dtype or _format_of(beside)
    before = _scores(source, device=device, base=base, vision_tower=vision_tower, merge_lora=False)
    report = convert(source, target, to="hf", base=base, vision_tower=vision_tower, dtype=chosen, begin=begin)
    after = _scores(target, device=device)[..., : before.shape[-1]]
    difference, largest = float((before - after).abs().max()), float(before.abs().max())
    allowed = ALLOWED[getattr(torch, chosen)] * largest
    if not difference <= allowed:
        _remove(Path(target), report)
        raise CheckpointError(
            f"{target}: the merged model's scores are {difference:.3g} from those of base and adapters, more than "
            f"rounding to {chosen} explains ({allowed:.3g}); merge with --dtype float32, and report it if that fails"
        )
    same = int((before.argmax(-1) == after.argmax(-1)).sum())
    return MergeReport(report, difference, largest, same, before[..., 0].numel())


def _format_of(opened: Opened) -> str:
    """The number format that most of a model's numbers have in its files."""
    counts: Counter[torch.dtype] = Counter()
    for source in opened.tensors.values():
        counts[source.dtype] += prod(source.shape)
    return str(counts.most_common(1)[0][0]).removeprefix("torch.")


@torch.no_grad()
def _scores(path: str | Path, *, device: str | None, **options: Any) -> Tensor:
    """The scores (1, T, V) of a drawn picture and drawn words, in float32, on the CPU."""
    model: Llava = load(path, device=device, dtype="float32", **options).model
    config = model.config
    generator = torch.Generator().manual_seed(0)
    picture = torch.full((config.features_per_tile,), config.image_token_id)
    words = torch.randint(0, min(config.vocab_size, config.image_token_id), (NUM_WORDS,), generator=generator)
    pixels = torch.randn(1, 3, config.image_size, config.image_size, generator=generator).to(model.device)
    features = model.encode_tiles(pixels).flatten(0, 1)
    ids = torch.cat([picture, words])[None].to(model.device)
    return model.logits(model(ids, image_features=features)).float().cpu()


def _remove(folder: Path, report: ConvertReport) -> None:
    import shutil

    assert report.target == folder, "only what was written here just now is removed"
    shutil.rmtree(folder, ignore_errors=True)
