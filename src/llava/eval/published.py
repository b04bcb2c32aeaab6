"""Published figures of LLaVA-1.5 and 1.6, from the original's model zoo, by the name of a task here."""

from __future__ import annotations

_FIRST = ("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "seed",
          "llava_bench", "mmvet")  # fmt: skip
_SECOND = ("mmmu", "mathvista", "vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench",
           "mmbench_cn", "seed", "llava_bench", "mmvet")  # fmt: skip
# MME: perception. ScienceQA: questions with a picture. SEED: 1.5 all rows, 1.6 pictures only.
_ROWS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "LLaVA-1.5-7B": (_FIRST, (78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 58.3, 58.6, 65.4, 31.1)),
    "LLaVA-1.5-13B": (_FIRST, (80.0, 63.3, 53.6, 71.6, 61.3, 85.9, 1531.3, 67.7, 63.6, 61.6, 72.5, 36.1)),
    "LLaVA-1.5-7B-LoRA": (_FIRST, (79.1, 63.0, 47.8, 68.4, 58.2, 86.4, 1476.9, 66.1, 58.9, 60.1, 67.9, 30.2)),
    "LLaVA-1.5-13B-LoRA": (_FIRST, (80.0, 63.3, 58.9, 71.2, 60.2, 86.7, 1541.7, 68.5, 61.5, 61.3, 69.5, 38.3)),
    "LLaVA-1.6-Vicuna-7B": (
        _SECOND,
        (35.8, 34.6, 81.8, 64.2, 57.6, 70.1, 64.9, 86.5, 1519, 67.4, 60.6, 70.2, 81.6, 43.9),
    ),
    "LLaVA-1.6-Vicuna-13B": (
        _SECOND,
        (36.2, 35.3, 82.8, 65.4, 60.5, 73.6, 67.1, 86.2, 1575, 70.0, 64.4, 71.9, 87.3, 48.4),
    ),
    "LLaVA-1.6-Mistral-7B": (
        _SECOND,
        (35.3, 37.7, 82.2, 64.8, 60.0, 72.8, 65.7, 86.7, 1498, 68.7, 61.2, 72.2, 83.2, 47.3),
    ),
    "LLaVA-1.6-Hermes-Yi-34B": (
        _SECOND,
        (51.1, 46.5, 83.7, 67.1, 63.8, 81.8, 69.5, 87.7, 1631, 79.3, 79.0, 75.9, 89.6, 57.4),
    ),
}


def published(task: str) -> dict[str, float]:
    """Model -> figure; none for a benchmark that the zoo has not."""
    return {model: figures[names.index(task)] for model, (names, figures) in _ROWS.items() if task in names}
