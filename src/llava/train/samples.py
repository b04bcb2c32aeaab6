"""Answers of the model as it stands, to fixed pictures and questions, through the same engine as chat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava.inference.engine import Engine, Request
from llava.inference.sampling import SamplingParams
from llava.model.llava import Llava
from llava.prompt.conversation import Conversation, Image, Message, Text
from llava.prompt.processor import Processor
from llava.train.progress import Sample


def answer_samples(
    model: Llava, processor: Processor, *, step: int, images: Sequence[Path], questions: Sequence[str]
) -> list[Sample]:
    """Greedy answers to every question about every picture. Leaves the model in the mode in which it found it."""
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
        completions = Engine(model).generate(requests)
    finally:
        for module, training in modes.items():
            module.training = training
    return [
        Sample(step, image, question, processor.decode(completion.token_ids).strip())
        for (image, question), completion in zip(asked, completions, strict=True)
    ]
