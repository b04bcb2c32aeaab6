"""A processor with a real tokenizer and pictures of four tokens, and records to feed it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from PIL import Image

from llava.prompt.images import ImageSettings
from llava.prompt.processor import Processor
from llava.prompt.tokenizer import load_tokenizer

TOKENIZER = Path(__file__).parent.parent / "golden" / "prompt" / "tokenizers" / "vicuna-tiny-v1.5"


def build_processor(template: str = "llava_hf") -> Processor:
    tokenizer = load_tokenizer(TOKENIZER)
    (image,) = tokenizer.add_special_tokens(["<image>"])
    picture = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    settings = ImageSettings.from_preprocessor_config({**picture, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    settings = replace(settings, mode="pad", patches_per_side=2, tokens_per_tile=4)
    return Processor(tokenizer, template, image_settings=settings, image_token_id=image)


def record(image: str | None = "good.png", *exchanges: tuple[str, str]) -> dict[str, object]:
    """A LLaVA record; one question and answer unless given."""
    turns: list[dict[str, str]] = []
    for number, (question, answer) in enumerate(exchanges or (("Colour?", "Red."),)):
        mark = "<image>\n" if image and not number else ""
        turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({"image": image} if image else {})}


def write_pictures(folder: Path) -> None:
    """good.png, other.png, and broken.png, whose header alone is a picture's."""
    Image.new("RGB", (20, 10), (200, 0, 0)).save(folder / "good.png")
    Image.new("RGB", (9, 12), (0, 200, 0)).save(folder / "other.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path
