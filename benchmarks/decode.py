"""Is our decode loop at least twice as fast as transformers' `generate()` on small models, with equal tokens?

    python benchmarks/decode.py [--record]

Both answer the same prompts, in turn (A/B/A/B), greedy, float32, one thread; each figure is the best of the repeats in
process time, so that other programs on the machine count little. Cases: Llama models of 2 to 6 layers, 192 to 256
wide, one answer of 128 tokens after 80 (a picture of 64 patches and a question); and 18 short questions about one
picture of 576 patches, each with an answer of two tokens, `generate()` one by one and the engine all at once.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava.inference.engine import Engine, Request
from llava.inference.sampling import SamplingParams
from llava.prompt.processor import Encoded

SHAPES = {"2x192": (2, 192, 6), "4x192": (4, 192, 6), "6x192 grouped": (6, 192, 2), "4x256": (4, 256, 8)}
PROMPT_TOKENS, NEW_TOKENS = 80, 128
PICTURE_TOKENS, QUESTIONS, QUESTION_TOKENS, ANSWER_TOKENS = 611, 18, 14, 2


class TextOnly:
    """A language model in the place of a LLaVA: the picture's tokens are words here."""

    def __init__(self, language_model: Any) -> None:
        self.language_model = language_model
        self.config = SimpleNamespace(image_token_id=-1)

    def embed(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        return self.language_model.get_input_embeddings()(input_ids)


def build(layers: int, width: int, key_value_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=960,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)  # with the usual small weights all logits are nearly equal
    return model


def ask_transformers(model: LlamaForCausalLM, prompts: list[np.ndarray], new_tokens: int) -> list[list[int]]:
    answers = []
    for ids in prompts:
        row = torch.tensor(ids)[None]
        mask = torch.ones_like(row)
        out = model.generate(
            row, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        answers.append(out[0, len(ids) :].tolist())
    return answers


def ask_engine(engine: Engine, prompts: list[np.ndarray], new_tokens: int) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=new_tokens)
    requests = [Request(Encoded(ids, np.full_like(ids, -100)), params) for ids in prompts]
    return [list(completion.token_ids) for completion in engine.generate(requests)]


def compare(
    theirs: Callable[[], list[list[int]]], ours: Callable[[], list[list[int]]], *, repeats: int
) -> dict[str, Any]:
    """Best process time of each, in turn, and whether the tokens are the same."""
    equal = theirs() == ours()
    best = [float("inf"), float("inf")]
    for _ in range(repeats):
        for i, run in enumerate((theirs, ours)):
            start = time.process_time()
            run()
            best[i] = min(best[i], time.process_time() - start)
    return {"equal": equal, "generate_ms": best[0] * 1e3, "engine_ms": best[1] * 1e3, "ratio": best[0] / best[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append the ratios to results.csv")
    parser.add_argument("--repeats", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    results: dict[str, dict[str, Any]] = {}
    for name, (layers, width, key_value_heads) in SHAPES.items():
        model = build(layers, width, key_value_heads)
        engine = Engine(TextOnly(model))
        prompts = [random.integers(3, 960, PROMPT_TOKENS)]
        result = compare(
            lambda m=model, p=prompts: ask_transformers(m, p, NEW_TOKENS),
            lambda e=engine, p=prompts: ask_engine(e, p, NEW_TOKENS),
            repeats=arguments.repeats,
        )
        for who in ("generate", "engine"):
            result[f"{who}_ms_per_token"] = result.pop(f"{who}_ms") / NEW_TOKENS
        results[f"decode {name}"] = result
    model = build(4, 256, 8)
    engine = Engine(TextOnly(model))
    picture = random.integers(3, 960, PICTURE_TOKENS)
    prompts = [np.concatenate([picture, random.integers(3, 960, QUESTION_TOKENS)]) for _ in range(QUESTIONS)]
    results["questions 4x256"] = compare(
        lambda: ask_transformers(model, prompts, ANSWER_TOKENS),
        lambda: ask_engine(engine, prompts, ANSWER_TOKENS),
        repeats=max(2, arguments.repeats // 3),
    )
    print(
        json.dumps({case: {k: v if k == "equal" else round(v, 3) for k, v in r.items()} for case, r in results.items()})
    )
    if arguments.record:
        from record import record

        for case, result in results.items():
            record("decode", case, "ratio over generate()", result["ratio"])
            record("decode", case, "tokens equal", float(result["equal"]))
            if "engine_ms_per_token" in result:
                record("decode", case, "engine ms per token", result["engine_ms_per_token"])


if __name__ == "__main__":
    main()
