"""What does a short conversation cost on its way to tensors, and an ordinary photograph?

    python benchmarks/encode.py [--record]

Conversations of about 20 tokens on one prepared picture, all different, through the processor of the shipped tiny
model's tokenizer (process time, so that other programs on the machine count little; best of three). Beside it the same
text through the `tokenizers` library alone: the ratio is what rendering, spans, labels and placeholders add.
And one 1024 x 768 JPEG decoded and preprocessed to 336 pixels. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import PIL.Image
import tokenizers

from llava.prompt.conversation import Conversation, Image, Message, Text
from llava.prompt.images import ImageSettings, decode_image, preprocess
from llava.prompt.processor import Processor
from llava.prompt.tokenizer import load_tokenizer

COUNT = 4000


def best_of_three(work: Callable[[], object]) -> float:
    """Process seconds of the fastest of three runs."""
    times = []
    for _ in range(3):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    keep = parser.parse_args().record
    folder = Path(str(files("llava.quickstart") / "assets" / "language_model"))
    tokenizer = load_tokenizer(folder)
    (image_token_id,) = tokenizer.add_special_tokens(["<image>"])
    settings = ImageSettings(mode="squash", size=64, patches_per_side=8, tokens_per_tile=64)
    processor = Processor(tokenizer, "llava_hf", image_settings=settings, image_token_id=image_token_id)
    picture = Image(np.zeros((64, 64, 3), dtype=np.uint8))
    prepared = [processor.prepare_image(picture)]
    talks = [
        Conversation(
            (
                Message("user", (picture, Text(f"What colour is the shape at {n / COUNT:.4f}?"))),
                Message("assistant", (Text("It is a red circle."),)),
            )
        )
        for n in range(COUNT)
    ]
    texts = [f"USER: <image>\n{talk.messages[0].text} ASSISTANT: It is a red circle.</s>" for talk in talks]
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode_all() -> None:
        tokenizer._remembered.clear()
        for talk in talks:
            processor.encode(talk, images=prepared)

    ours = best_of_three(encode_all)
    theirs = best_of_three(lambda: [library.encode(text) for text in texts])
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).resize((1024, 768), PIL.Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    photograph = best_of_three(
        lambda: [preprocess(decode_image(stream.getvalue()), ImageSettings()) for _ in range(10)]
    )
    figures = {
        "milliseconds_per_conversation": round(ours / COUNT * 1000, 4),
        "ratio_to_tokenizers_alone": round(ours / theirs, 2),
        "milliseconds_per_photograph_1024x768": round(photograph / 10 * 1000, 2),
    }
    print(json.dumps(figures))
    if keep:
        from record import record

        for metric, value in figures.items():
            record("encode", "llava_hf, tiny tokenizer", metric, value)


if __name__ == "__main__":
    main()
