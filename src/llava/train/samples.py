"""Answers of the model as it stands, to fixed pictures and questions, through the same engine as chat.

They go to `samples.jsonl`, and to `samples.html`: each picture with its answers over the steps, whole in one file.
"""

from __future__ import annotations

import base64
import html
import io
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from llava.checkpoint.quantised import would_lose_its_gradient
from llava.errors import ImageError
from llava.inference.engine import Engine
from llava.inference.requests import Request
from llava.inference.sampling import SamplingParams
from llava.model.added_rows import write_added_rows
from llava.model.llava import Llava
from llava.prompt.conversation import Conversation, Image, Message, Text
from llava.prompt.decoding import decode_image
from llava.prompt.processor import Processor
from llava.train.progress import Sample

_log = logging.getLogger(__name__)

_SHOWN_PIXELS = 320


def why_not_now(model: Llava) -> str | None:
    """Why this model must not be asked while it trains; None when it may.

    A forward pass without gradients over 4-bit weights on a CPU repacks them for answering, and from then on
    bitsandbytes' backward pass gives adapters no gradient, without an error. Layers packed for training never do that.
    """
    if model.device.type == "cpu" and any(would_lose_its_gradient(module) for module in model.modules()):
        return "asking a model with 4-bit weights on a CPU would end its learning; no sample answers are made"
    return None


def answer_samples(
    model: Llava,
    processor: Processor,
    *,
    step: int,
    images: Sequence[Path],
    questions: Sequence[str],
    compute: torch.dtype = torch.float32,
) -> list[Sample]:
    """Greedy answers to every question about every picture. Leaves the model in the mode in which it found it.

    compute: the format of matrix products in training; weights that do not move may be held in it.
    """
    write_added_rows(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        asked = [(image, question) for image in images for question in questions]
        requests = [
            Request(
                processor.encode(
                    Conversation((Message("user", (Image(image), Text(question))),), origin=str(image)), open_turn=True
                ),
                SamplingParams(max_new_tokens=64, temperature=0.0, stop_token_ids=processor.stop_token_ids),
            )
            for image, question in asked
        ]
        with torch.autocast(model.device.type, compute) if compute != torch.float32 else nullcontext():
            completions = Engine(model).generate(requests)
    finally:
        for module, training in modes.items():
            module.training = training
    return [
        Sample(step, image, question, processor.decode(completion.token_ids).strip())
        for (image, question), completion in zip(asked, completions, strict=True)
    ]


def write_sample_page(path: Path, lines: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """The answers in lines of samples.jsonl as a page, newest first. A full disk is a warning."""
    page = _PAGE.format(title=html.escape(title), body="".join(_section(*item) for item in _by_picture(lines).items()))
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        _log.warning("%s: not written: %s", path, error.strerror)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: sample answers</title>
<style>
 body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }}
 section {{ display: flex; gap: 1.5rem; flex-wrap: wrap; margin: 2rem 0; align-items: flex-start }}
 img {{ max-width: 20rem; border: 1px solid #ddd }}
 table {{ border-collapse: collapse; flex: 1; min-width: 20rem }}
 caption {{ text-align: left; font-weight: 600; padding-bottom: .4rem }}
 td {{ border-top: 1px solid #e4e4e4; padding: .35rem .7rem .35rem 0; vertical-align: top; white-space: pre-wrap;
      overflow-wrap: anywhere }}
 td:first-child {{ color: #666; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
 @media (prefers-color-scheme: dark) {{ body {{ background: #161616; color: #ddd }} td, img {{ border-color: #333 }} }}
</style>
<h1>{title}</h1>
<p>Answers of the model as it stood, newest first. Step 0 is before training.</p>
{body}
</html>
"""

_Answers = dict[str, list[tuple[int, str]]]  # question -> (step, answer)


def _by_picture(lines: Sequence[Mapping[str, Any]]) -> dict[str, _Answers]:
    pictures: dict[str, _Answers] = {}
    for line in lines:
        questions = pictures.setdefault(str(line["image"]), {})
        questions.setdefault(str(line["question"]), []).append((int(line["step"]), str(line["answer"])))
    return pictures


def _section(picture: str, questions: _Answers) -> str:
    tables = []
    for question, answers in questions.items():
        rows = "".join(f"<tr><td>{step:,}</td><td>{html.escape(text)}</td></tr>" for step, text in reversed(answers))
        tables.append(f"<table><caption>{html.escape(question)}</caption>{rows}</table>")
    name = html.escape(Path(picture).name, quote=True)
    return f'<section><img src="{_data_uri(Path(picture))}" alt="{name}" title="{name}">{"".join(tables)}</section>\n'


def _data_uri(path: Path) -> str:
    """The picture, small, as text that stands in the page itself; nothing when it is gone."""
    try:
        image = decode_image(path)
    except ImageError:
        return ""
    image.thumbnail((_SHOWN_PIXELS, _SHOWN_PIXELS))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
