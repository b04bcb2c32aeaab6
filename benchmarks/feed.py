"""How fast one core feeds training, and which devices that would starve.

    python benchmarks/feed.py [--cores 16] [--record]

Per core and in processor time (best of three): a 640 x 480 JPEG decoded, padded to a square, resized to 336 pixels and
normalised, held against PIL's own steps done one by one (equal bytes, 5e-7 after normalising); a conversation of some
390 tokens tokenised and labelled; a step laid out as trees and written to tensors. Then pictures and rows a second from
`--cores`, and what a device may need: LLaVA-1.5-7B takes 15 (stage 2) to 44 rows a second (stage 1, eight A100s), a
0.5B language model some 400, a pass that only fills the feature cache some 1,500. `starves_at` is the rate above which
the device would wait.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import io
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import PIL.Image

from encode import best_of_three
from llava.data.loader import Layout, lay_out
from llava.data.packing import grow_trees
from llava.prompt.conversation import Conversation, Image, Message, Text
from llava.prompt.images import ImageSettings, decode_image, preprocess
from llava.prompt.processor import Processor
from llava.prompt.tokenizer import load_tokenizer

PICTURES, TALKS, PER_PICTURE = 12, 24, 4
NEEDS = {"7B stage 2, one H200": 15.0, "7B stage 1, one H200": 38.0, "0.5B stage 1": 400.0, "filling the cache": 1500.0}


def make_jpegs() -> list[bytes]:
    """Pictures with detail at every scale, as photographs have."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(PICTURES):
        picture = np.zeros((480, 640, 3), dtype=np.float64)
        for side in (3, 12, 48, 192):
            noise = rng.integers(0, 256, (side, side * 4 // 3, 3), dtype=np.uint8)
            grown = PIL.Image.fromarray(noise).resize((640, 480), PIL.Image.Resampling.BICUBIC)
            picture += np.asarray(grown, dtype=np.float64) / 4
        stream = io.BytesIO()
        PIL.Image.fromarray(picture.astype(np.uint8)).save(stream, "JPEG", quality=90)
        made.append(stream.getvalue())
    return made


def reference(jpeg: bytes, settings: ImageSettings) -> np.ndarray:
    """The same pixels by PIL's own steps: open, paste on the mean colour, bicubic, scale, normalise."""
    picture = PIL.Image.open(io.BytesIO(jpeg)).convert("RGB")
    side = max(picture.size)
    square = PIL.Image.new("RGB", (side, side), settings.background)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    small = square.resize((settings.size, settings.size), PIL.Image.Resampling.BICUBIC)
    values = np.asarray(small).astype(np.float32) * np.float32(1 / 255)
    values = (values - np.array(settings.mean, np.float32)) / np.array(settings.std, np.float32)
    return values.transpose(2, 0, 1)


def measure(cores: int) -> dict[str, object]:
    settings = ImageSettings()
    jpegs = make_jpegs()
    made = [preprocess(decode_image(jpeg), settings)[0] for jpeg in jpegs]
    off = max(float(np.abs(one - reference(jpeg, settings)).max()) for one, jpeg in zip(made, jpegs, strict=True))
    picture_seconds = best_of_three(lambda: [preprocess(decode_image(jpeg), settings) for jpeg in jpegs]) / PICTURES
    folder = Path(str(files("llava.quickstart") / "assets" / "language_model"))
    tokenizer = load_tokenizer(folder)
    (image_token_id,) = tokenizer.add_special_tokens(["<image>"])
    processor = Processor(tokenizer, "llava_hf", image_settings=settings, image_token_id=image_token_id)
    image = Image(np.zeros((480, 640, 3), dtype=np.uint8))
    prepared = [processor.prepare_image(image)]
    words = "What colour is the large shape to the left of the small green one, and how many others are there?"
    talks = [
        Conversation(
            (
                Message("user", (image, Text(f"{number}. {words} {words}"))),
                Message("assistant", (Text(f"{words} {words} {words}"),)),
            )
        )
        for number in range(TALKS)
    ]

    def encode_all() -> list[object]:
        tokenizer._remembered.clear()
        return [processor.encode(talk, images=prepared) for talk in talks]

    text_seconds = best_of_three(encode_all) / TALKS
    encoded = [processor.encode(talk, images=prepared) for talk in talks]
    groups = [encoded[start : start + PER_PICTURE] for start in range(0, TALKS, PER_PICTURE)]
    layout = Layout(4096, 16384, 16384, image_token_id, 0)

    def lay() -> None:
        trees = [t for group in groups for t in grow_trees(group, image_token_id=image_token_id, max_tokens=4096)]
        list(lay_out(trees, layout))

    layout_seconds = best_of_three(lay) / TALKS
    row_seconds = picture_seconds + text_seconds + layout_seconds
    shared_seconds = picture_seconds / PER_PICTURE + text_seconds + layout_seconds
    figures: dict[str, object] = {
        "largest_pixel_difference": off,
        "pictures_per_second_per_core": 1 / picture_seconds,
        "milliseconds_per_picture": 1e3 * picture_seconds,
        "tokens_per_conversation": float(np.mean([len(one.input_ids) - 576 for one in encoded])),
        "milliseconds_per_conversation": 1e3 * text_seconds,
        "milliseconds_laying_out_a_conversation": 1e3 * layout_seconds,
        f"starves_at_rows_per_second_{cores}_cores": cores / row_seconds,
        f"starves_at_rows_per_second_{cores}_cores_{PER_PICTURE}_a_picture": cores / shared_seconds,
    }
    for name, rate in NEEDS.items():
        figures[f"cores_for_{name}"] = rate * row_seconds
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=16)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    figures = measure(options.cores)
    print(json.dumps({"benchmark": "feed", **figures}))
    if options.record:
        from record import record

        for metric, value in figures.items():
            record("feed", "640x480 JPEG to 336, one core", metric, float(str(value)))


if __name__ == "__main__":
    main()
