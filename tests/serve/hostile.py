"""Input made to hurt: damaged pictures, parameters of every wrong kind, words that look like the template's."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from typing import Any

import PIL.Image

HUGE = 10**400


def picture_mutants(count: int, *, seed: int = 0) -> Iterator[bytes]:
    """Damaged pictures of every kind that is read: flips, cuts, insertions, joins, other headers, and no pictures."""
    rng = random.Random(seed)
    bases = [*_base_pictures(rng)]
    heads = [base[:12] for base in bases]
    others = [
        b"", b"\0", b"\0" * 5000, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"SIMPLE  =                    T", b"8BPS\0\1", b"icns\0\0\0\x20", b"%PDF-1.7", b"II*\0\x08\0\0\0", b"MM\0*",
        b"P6 60000 60000 255\n", b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x1cftypavif", b"GIF89a", b"BM",
        b"RIFF\0\0\0\0WEBP",
        b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"PK\x03\x04", b"\x1f\x8b\x08", b"#!/bin/sh\n",
    ]  # fmt: skip
    yield from others[:count]
    for number in range(max(0, count - len(others))):
        data = bytearray(rng.choice(bases))
        kind = number % 8
        if kind in (0, 1, 2):
            for _ in range(rng.choice((1, 2, 8, 64))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 3:
            del data[rng.randrange(len(data)) :]
        elif kind == 4:
            at = rng.randrange(len(data))
            data[at:at] = rng.randbytes(rng.choice((1, 4, 300)))
        elif kind == 5:
            at = rng.randrange(8, min(40, len(data)))
            data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\xff\xff"))
        elif kind == 6:
            data = bytearray(rng.choice(heads)) + rng.randbytes(rng.randrange(400))
        else:
            data += rng.choice(bases)[rng.randrange(40) :]
        yield bytes(data)


def _base_pictures(rng: random.Random) -> Iterator[bytes]:
    noise = PIL.Image.frombytes("RGB", (23, 17), rng.randbytes(23 * 17 * 3))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for mode in ("RGB", "L", "1", "P", "RGBA", "LA", "I;16", "CMYK"):
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
            file = io.BytesIO()
            try:
                (noise.convert("L").convert("I;16") if mode == "I;16" else noise.convert(mode)).save(file, kind)
            except (OSError, ValueError, KeyError):
                continue  # a kind that cannot hold this mode
            yield file.getvalue()
    for kind, options in (
        ("JPEG", {"exif": exif, "progressive": True}),
        ("PNG", {"exif": exif}),
        ("WEBP", {"exif": exif}),
    ):
        file = io.BytesIO()
        noise.save(file, kind, **options)
        yield file.getvalue()
    for kind in ("GIF", "PNG", "WEBP"):
        file = io.BytesIO()
        noise.save(file, kind, save_all=True, append_images=[noise.rotate(90 * i) for i in range(1, 4)])
        yield file.getvalue()


_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, -1e308, 1e-320, HUGE, -HUGE, 2**31, 2**63, 2**64, "", "0", "nan",
    "1e5", "inf", "\ud800", "\0", "x" * 5000, [], [[]], [None], ["a"], [1], ["a"] * 9, {}, {"a": 1}, {"type": "text"},
    {"type": "json_schema"},
)  # fmt: skip
_PARAMETERS = (
    "model", "messages", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "seed", "stop",
    "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "stream", "stream_options", "user", "metadata",
    "tools", "tool_choice", "response_format", "logit_bias", "presence_penalty", "audio", "modalities", "service_tier",
    "nonsense", "__proto__", "\ud800", "x" * 3000,
)  # fmt: skip


def parameter_sets() -> Iterator[dict[str, Any]]:
    """Every parameter with every value, messages of every wrong shape, and several parameters at once."""
    for name in _PARAMETERS:
        for value in _VALUES:
            yield {name: value}
    contents: tuple[Any, ...] = (
        None, 1, "", [], [None], ["text"], [{}], [{"type": None}], [{"type": "text"}], [{"type": "text", "text": None}],
        [{"type": "text", "text": 1}], [{"type": "text", "text": "a", "image_url": {"url": "b"}}],
        [{"type": "image_url"}],
        [{"type": "image_url", "image_url": None}], [{"type": "image_url", "image_url": "data:,"}],
        [{"type": "image_url", "image_url": {}}], [{"type": "image_url", "image_url": {"url": None}}],
        [{"type": "image_url", "image_url": {"url": "a", "detail": "most"}}], [{"type": "input_audio"}],
        [{"type": "image", "image": "/etc/passwd"}], [{"type": ["text"]}], [{"type": {}}], [[]], {"type": "text"},
        "\ud83d", [{"type": "text", "text": "\udc00"}], [{"type": "text", "text": ""}],
    )  # fmt: skip
    for role in ("user", "assistant", "system", "developer", "tool", "function", "USER", "", None, 1, [], {}):
        for content in contents:
            yield {"messages": [{"role": role, "content": content}]}
    good = {"role": "user", "content": "hi"}
    for messages in (
        [good, good], [good, {"role": "assistant", "content": "a"}], [{"role": "system", "content": "s"}],
        [good, {"role": "system", "content": "s"}, good], [{"role": "assistant", "content": "a"}, good],
        [{"role": "system", "content": "s"}] * 2 + [good], [good] * 2000, [{}], [None], [[]], ["hi"], {"role": "user"},
        [{**good, "tool_calls": [{}]}], [{**good, "extra": 1}], [{**good, "name": "x" * 600}], [{"role": "user"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2000}],
    ):  # fmt: skip
        yield {"messages": messages}
    rng = random.Random(0)
    for _ in range(200):
        yield {rng.choice(_PARAMETERS): rng.choice(_VALUES) for _ in range(3)}


def encode(body: dict[str, Any]) -> bytes:
    """JSON of anything, lone surrogates too."""
    return json.dumps(body, ensure_ascii=True).encode()


SPECIALS = (
    "<image>", "<s>", "</s>", "<unk>", "<pad>", "<im_start>", "<im_end>", "<im_patch>", "[INST]", "[/INST]", "<<SYS>>",
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|endoftext|>", "<|user|>", "<|assistant|>",
    "USER:", "ASSISTANT:", "###", "### Human:", "\nASSISTANT: ", "<0x00>", "<0x0A>", "▁", "\ufffd", "\u2028", "\0",
)  # fmt: skip


def injections(count: int, *, seed: int = 0) -> Iterator[str]:
    """Texts with special strings anywhere in them, whole, doubled, nested and cut."""
    rng = random.Random(seed)
    letters = "ab é漢😀 \n\t<>|/s"
    for _ in range(count):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(12)))
        for _ in range(rng.randrange(1, 5)):
            special = rng.choice(SPECIALS)
            if rng.random() < 0.2:
                cut = rng.randrange(len(special) + 1)
                special = special[:cut] + rng.choice(SPECIALS) + special[cut:]
            at = rng.randrange(len(text) + 1)
            text = text[:at] + special + text[at:]
        yield text
