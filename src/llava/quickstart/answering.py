"""Open a trained quickstart model as an `Answerer`: the same processor and engine as `llava chat`, greedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from llava.checkpoint.load import load
from llava.inference.engine import Engine
from llava.inference.requests import Request
from llava.inference.sampling import SamplingParams
from llava.prompt import conversation as talk
from llava.quickstart.measure import Answerer

MAX_ANSWER_TOKENS = 96  # the longest detailed caption of four objects has about 50


def open_answerer(model: Path, *, on_done: Callable[[int], None] | None = None) -> Answerer:
    """An answerer over the model in a folder. on_done: called with the number of questions just answered."""
    loaded = load(model)
    engine = Engine(loaded.model)
    processor = loaded.processor
    params = SamplingParams(
        temperature=0.0, max_new_tokens=MAX_ANSWER_TOKENS, stop_token_ids=tuple(processor.stop_token_ids)
    )

    def answer(asked: Sequence[tuple[Image.Image, str]]) -> list[str]:
        # Questions about one picture stand next to each other, so the engine reads the picture once for all of them.
        by_picture = sorted(range(len(asked)), key=lambda index: id(asked[index][0]))
        requests = (Request(processor.encode(_conversation(*asked[i]), open_turn=True), params) for i in by_picture)
        answers = [""] * len(asked)
        for index, done in zip(by_picture, engine.generate(requests, on_done=on_done), strict=True):
            answers[index] = processor.decode([t for t in done.token_ids if t not in params.stop_token_ids]).strip()
        return answers

    return answer


def _conversation(picture: Image.Image, question: str) -> talk.Conversation:
    parts = (talk.Image(picture), talk.Text("\n" + question))
    return talk.Conversation((talk.Message("user", parts),))
