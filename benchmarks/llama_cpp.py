"""A whole reply about a picture beside llama.cpp, on equal weights: what each part of it takes, answers compared.

    pip install xllamacpp gguf
    python benchmarks/llama_cpp.py [--record] [--layers 12 --width 768] [--threads 1]

A LLaVA with random weights (SigLIP-like tower, 576 patches, 6 layers of 256; a Llama of the given shape) is written as
GGUF in F32, F16 and Q8_0 and opened by both programs, one thread each. One question, greedy, 64 tokens. Ours computes
in float32 and, where the processor has it, in bfloat16; the answers are compared at float32. All in turn, wall time,
the best of the repeats: a quiet machine is wanted. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xllamacpp
from PIL import Image as PilImage

import llava
from llava.checkpoint.convert import convert
from llava.checkpoint.huggingface import save
from llava.distributed import cpu_has_bfloat16
from llava.inference.answer import Assistant
from llava.inference.engine import Engine
from llava.inference.requests import EngineLimits
from llava.inference.sampling import SamplingParams
from llava.model.config import LlavaConfig
from llava.model.llava import Llava
from llava.prompt.chat_template import render_text
from llava.prompt.conversation import Conversation, Image, Message, Text
from llava.prompt.images import ImageSettings
from llava.prompt.processor import Processor
from llava.prompt.templates import get_template
from llava.prompt.tokenizer import load_tokenizer
from llava.quickstart.tokenizer_building import save_tokenizer

SIDE, PATCH, NEW_TOKENS = 336, 14, 64


def make_model(folder: Path, *, layers: int, width: int) -> None:
    """A LLaVA with random weights, wide enough for clear margins, saved in the folder."""
    save_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    (image_id,) = tokenizer.add_special_tokens(["<image>"])
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": False,
    }
    language = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width * 8 // 3 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "vocab_size": -(-tokenizer.vocab_size // 64) * 64,
    }
    config = LlavaConfig(
        vision_config=tower,
        text_config=language,
        image_token_id=image_id,
        image_mode="pad",
        vision_feature_select="cls_patch",
        template="llava_hf",
    )
    torch.manual_seed(0)
    model = Llava.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 if "embed_tokens" in name else 1.2 * parameter[0].numel() ** -0.5)
    settings = ImageSettings(mode="pad", size=SIDE, mean=(0.5,) * 3, std=(0.5,) * 3)
    processor = Processor(
        tokenizer, get_template("llava_hf"), image_settings=settings, image_token_id=image_id, context_length=2048
    )
    save(model, processor, folder / "model")


class LlamaCpp:
    """llama.cpp's own server in this process, one thread."""

    def __init__(self, folder: Path, threads: int) -> None:
        mmproj = next(folder.glob("mmproj-*.gguf"))
        language_model = next(path for path in folder.glob("*.gguf") if path != mmproj)
        params = xllamacpp.CommonParams()
        params.model.path, params.mmproj.path = str(language_model), str(mmproj)
        params.n_ctx, params.n_parallel, params.verbosity = 2048, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup = params.fit_params = False
        self.server = xllamacpp.Server(params)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(
            urllib.request.Request(self.server.listening_address + path, data), timeout=600
        ) as reply:
            return json.load(reply)

    def reply(self, prompt: str, picture: bytes) -> dict[str, Any]:
        marker = self.post("/props")["media_marker"]
        body = {
            "prompt": {
                "prompt_string": prompt.replace("<image>", marker),
                "multimodal_data": [base64.b64encode(picture).decode()],
            },
            "n_predict": NEW_TOKENS,
            "temperature": 0,
            "samplers": ["temperature"],
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        started = time.perf_counter()
        out = self.post("/completion", body)
        seconds = time.perf_counter() - started
        return {
            "reply_ms": seconds * 1e3,
            "decode_ms_per_token": out["timings"]["predicted_per_token_ms"],
            "tokens": out["tokens"],
        }


class Ours:
    """Our engine, which keeps nothing from one reply to the next."""

    def __init__(self, folder: Path, dtype: str) -> None:
        loaded = llava.load(folder, dtype=dtype)
        limits = EngineLimits(max_prefix_bytes=0, max_feature_bytes=0)
        loaded.model.eval()
        self.assistant = Assistant(loaded.model, loaded.processor, engine=Engine(loaded.model, limits=limits))

    def reply(self, conversation: Conversation) -> dict[str, Any]:
        started = time.perf_counter()
        encoded = self.assistant.processor.encode(conversation, open_turn=True)
        answer = iter(self.assistant.engine.submit(encoded, SamplingParams(max_new_tokens=NEW_TOKENS)))
        tokens = [next(answer)]
        first = time.perf_counter()
        tokens += answer
        ended = time.perf_counter()
        return {
            "reply_ms": (ended - started) * 1e3,
            "decode_ms_per_token": (ended - first) * 1e3 / (NEW_TOKENS - 1),
            "tokens": tokens,
        }


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "reply_ms": min(run["reply_ms"] for run in runs),
        "decode_ms_per_token": min(run["decode_ms_per_token"] for run in runs),
    }


def same_start(first: list[int], second: list[int]) -> int:
    """How many first tokens agree."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append the figures to results.csv")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    random = np.random.default_rng(0)
    buffer = io.BytesIO()
    PilImage.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(buffer, "PNG")
    conversation = Conversation((Message("user", (Image(buffer.getvalue()), Text("what is in the picture?"))),))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, layers=arguments.layers, width=arguments.width)
        answerers: dict[str, Any] = {"ours f32": Ours(folder / "model", "float32")}
        if cpu_has_bfloat16():
            answerers["ours bf16"] = Ours(folder / "model", "bfloat16")
        for number_format in ("f32", "f16", "q8_0"):
            convert(folder / "model", folder / number_format, to="gguf", number_format=number_format)
            answerers[f"llama.cpp {number_format}"] = LlamaCpp(folder / number_format, arguments.threads)
        processor = answerers["ours f32"].assistant.processor
        prompt = render_text(processor.template.render(conversation, open_turn=True))
        runs: dict[str, list[dict[str, Any]]] = {who: [] for who in answerers}
        for _ in range(arguments.repeats):
            for who, answerer in answerers.items():
                asked = (conversation,) if who.startswith("ours") else (prompt, buffer.getvalue())
                runs[who].append(answerer.reply(*asked))
        results: dict[str, Any] = {who: best(found) for who, found in runs.items()}
        agree = same_start(runs["ours f32"][0]["tokens"], runs["llama.cpp f32"][0]["tokens"])
        results["first tokens equal, f32"] = f"{agree} of {NEW_TOKENS}"
    print(json.dumps(results))
    if arguments.record:
        from record import record

        case = f"{arguments.layers}x{arguments.width}, {arguments.threads} thread"
        record("llama_cpp", case, "first tokens equal at float32, of 64", agree)
        for who, found in results.items():
            if isinstance(found, dict):
                for metric, value in found.items():
                    record("llama_cpp", f"{case}, {who}", metric, value)


if __name__ == "__main__":
    main()
