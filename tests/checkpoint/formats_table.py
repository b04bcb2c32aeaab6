"""The README's table of checkpoint formats, from what happens when each is opened and converted.

`python -m tests.checkpoint.formats_table` measures it again and writes it into README.md; a test holds the two equal.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.checkpoint.convert import convert
from llava.checkpoint.load import open_checkpoint
from llava.checkpoint.opened import check_tensors, empty_model
from llava.errors import LlavaError
from tests.checkpoint import test_mmpretrain, test_paddle, test_xtuner
from tests.checkpoint.test_huggingface import VISION, stock_model

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "checkpoints"
BASES = GOLDEN / "bases"
BEGIN, END = "<!-- formats-table: python -m tests.checkpoint.formats_table -->", "<!-- /formats-table -->"
TARGETS = ("hf", "original", "xtuner", "gguf")


@dataclass(frozen=True)
class Row:
    """A format: `make` writes a tiny checkpoint of it (or names one) and gives its path; options are convert's."""

    name: str
    make: Callable[[Path], Path]
    options: dict[str, Any] = field(default_factory=dict)


def golden(path: str) -> Callable[[Path], Path]:
    return lambda scratch: GOLDEN / path


def stock(kind: str) -> Callable[[Path], Path]:
    """A folder of transformers' own writing, with the tokenizer and picture settings of the fixtures."""

    def make(scratch: Path) -> Path:
        import shutil

        stock_onevision(scratch) if kind == "llava_onevision" else stock_model(kind).save_pretrained(scratch)
        for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(BASES / "vicuna-tiny-v1.5" / name, scratch)
        shutil.copy(BASES / "openai" / "clip-tiny-patch14-56" / "preprocessor_config.json", scratch)
        return scratch

    return make


def stock_onevision(folder: Path) -> None:
    import transformers

    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.Qwen2Config(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
        ),
        image_token_index=500,
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
        vision_aspect_ratio="anyres_max_4",
    )
    transformers.LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)


ROWS = (
    Row("Hugging Face `llava`", stock("llava")),
    Row("Hugging Face `llava_next`", stock("llava_next")),
    Row("Hugging Face `llava_onevision`, pictures", stock("llava_onevision")),
    Row("original v0", golden("b_v0/llava-tiny-v0")),
    Row("original v1, linear projector", golden("b_v1_linear_startend/llava-v1-tiny")),
    Row("original v1.5", golden("a_v1_5_full/llava-v1.5-tiny")),
    Row("original v1.6, tiles", golden("c_v1_6_anyres/llava-v1.6-vicuna-tiny")),
    Row("original on MPT", golden("g_mpt/llava-mpt-tiny")),
    Row(
        "original, projector only, on its base",
        golden("d_projector_only/llava-tiny-v1.5-pretrain"),
        {"base": BASES / "vicuna-tiny-v1.5"},
    ),
    Row(
        "original, unmerged LoRA, on its base",
        golden("e_lora/llava-v1.5-tiny-lora"),
        {"base": BASES / "vicuna-tiny-v1.5"},
    ),
    Row("original, delta, on its base", golden("f_delta/delta_llava-tiny-v0"), {"base": BASES / "llama-tiny"}),
    Row(
        "XTuner, on its base and tower",
        lambda scratch: test_xtuner.write_parts(scratch, template="vicuna"),
        {"base": BASES / "vicuna-tiny-v1.5"},
    ),
    Row(
        "MMPretrain `.pth`, on the repository it came from",
        lambda scratch: test_mmpretrain.write(scratch, test_mmpretrain.language_state()),
        {"base": GOLDEN / "a_v1_5_full" / "llava-v1.5-tiny"},
    ),
    Row(
        "PaddleMIX `.pdparams`",
        lambda scratch: test_paddle.write_folder(scratch / "model", test_paddle.paddle_arrays()),
    ),
)


def measure() -> str:
    """The table in Markdown; a refusal is a numbered note with the first sentence of its error."""
    notes: list[str] = []
    lines = ["| format | opens | " + " | ".join(f"`--to {target}`" for target in TARGETS) + " |"]
    lines.append("|---|---|" + "---|" * len(TARGETS))
    here = Path.cwd()
    os.chdir(BASES)  # the fixtures name their tower by a relative path
    try:
        for row in ROWS:
            with tempfile.TemporaryDirectory() as name:
                scratch = Path(name) / "source"
                scratch.mkdir()
                path = row.make(scratch)
                cells = [_attempt(lambda path=path, row=row: _opens(path, row), notes)]
                for target in TARGETS:
                    out = Path(name) / target
                    cells.append(
                        _attempt(
                            lambda path=path, out=out, target=target, row=row: convert(
                                path, out, to=target, **row.options
                            ),
                            notes,
                        )
                    )
            lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    finally:
        os.chdir(here)
    if notes:
        lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, start=1))]
    return "\n".join(lines)


def _opens(path: Path, row: Row) -> None:
    opened = open_checkpoint(path, **row.options)
    check_tensors(opened, empty_model(opened.config))


def _attempt(what: Callable[[], Any], notes: list[str]) -> str:
    try:
        what()
    except LlavaError as error:
        note = str(error)
        if note not in notes:
            notes.append(note)
        return f"no ({notes.index(note) + 1})"
    return "yes"


def in_readme() -> str:
    """The table that README.md holds."""
    text = (ROOT / "README.md").read_text("utf-8")
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text("utf-8")
    if BEGIN not in text:
        text = text.replace("<!-- formats-table -->", f"{BEGIN}\n{END}")
    before, _, rest = text.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{measure()}\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
