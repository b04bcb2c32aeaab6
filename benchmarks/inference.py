"""Answering, side by side with transformers' `generate()` and with ourselves without reuse; answers compared.

    python benchmarks/inference.py [--record] [--only questions turns decode streams]

decode: one answer of 128 tokens after 80, Llama models of 2 to 6 layers, 192 to 256 wide.
questions: 18 short questions about one picture of 576 patches; `generate()` one by one, the engine all at once.
turns: a chat about a picture, answers of 100 tokens; the time to the first token of turns 2 to 6, with what was said
before kept, against reading it again.
streams: 16 answers at once against one, tokens a second.
Greedy, float32, one thread; both sides in turn (A/B/A/B), each figure the best of the repeats in process time, so that
other programs on the machine count little. Prints one JSON line.
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

from llava.inference.engine import Engine
from llava.inference.requests import EngineLimits, Request
from llava.inference.sampling import SamplingParams
from llava.prompt.processor import Encoded

SHAPES = {"2x192": (2, 192, 6), "4x192": (4, 192, 6), "6x192 grouped": (6, 192, 2), "4x256": (4, 256, 8)}
PROMPT_TOKENS, NEW_TOKENS = 80, 128
PICTURE_TOKENS, QUESTIONS, QUESTION_TOKENS, ANSWER_TOKENS = 611, 18, 14, 2
TURNS, TURN_TOKENS = 6, 100
STREAMS, STREAM_PROMPT, STREAM_TOKENS = 16, 24, 96
# A model whose weights fit the processor's cache has little to gain: one stream reads them as fast as it computes.
STREAM_SHAPES = {"4x256, 14 MB": (4, 256, 8), "8x768, 220 MB": (8, 768, 24)}


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


Measured = dict[str, Any]


def compare(theirs: Callable[[], Any], ours: Callable[[], Any], *, repeats: int) -> Measured:
    """Best process time of each in ms, in turn, their ratio, and whether the answers are the same."""
    equal = theirs() == ours()
    best = [float("inf"), float("inf")]
    for _ in range(repeats):
        for i, run in enumerate((theirs, ours)):
            start = time.process_time()
            run()
            best[i] = min(best[i], time.process_time() - start)
    return {"equal": equal, "other_ms": best[0] * 1e3, "ours_ms": best[1] * 1e3, "ratio": best[0] / best[1]}


def without_reuse(model: Any) -> Engine:
    """An engine that reads every prompt anew, so that no repeat is answered from an earlier one."""
    return Engine(TextOnly(model), limits=EngineLimits(max_prefix_bytes=0))


def measure_decode(repeats: int) -> dict[str, Measured]:
    random = np.random.default_rng(0)
    results = {}
    for name, shape in SHAPES.items():
        model = build(*shape)
        engine = without_reuse(model)
        prompts = [random.integers(3, 960, PROMPT_TOKENS)]
        result = compare(
            lambda m=model, p=prompts: ask_transformers(m, p, NEW_TOKENS),
            lambda e=engine, p=prompts: ask_engine(e, p, NEW_TOKENS),
            repeats=repeats,
        )
        result["ours_ms_per_token"] = result["ours_ms"] / NEW_TOKENS
        results[f"decode {name}"] = result
    return results


def measure_questions(repeats: int) -> dict[str, Measured]:
    random = np.random.default_rng(0)
    model = build(6, 512, 16)
    engine = without_reuse(model)
    picture = random.integers(3, 960, PICTURE_TOKENS)
    prompts = [np.concatenate([picture, random.integers(3, 960, QUESTION_TOKENS)]) for _ in range(QUESTIONS)]
    result = compare(
        lambda: ask_transformers(model, prompts, ANSWER_TOKENS),
        lambda: ask_engine(engine, prompts, ANSWER_TOKENS),
        repeats=max(2, repeats // 3),
    )
    return {"18 questions on one picture, 6x512": result}


def measure_turns(repeats: int) -> dict[str, Measured]:
    """The same chat, turn by turn, by an engine that keeps and one that does not."""
    model = build(6, 512, 16)
    best: dict[tuple[str, int], float] = {}
    said: dict[str, list[list[int]]] = {}
    for _ in range(max(2, repeats // 3)):
        for who, keep in (("other", 0), ("ours", 2**30)):
            random = np.random.default_rng(0)
            engine = Engine(TextOnly(model), limits=EngineLimits(max_prefix_bytes=keep))
            talk = random.integers(3, 960, PICTURE_TOKENS)
            said[who] = []
            for turn in range(TURNS):
                talk = np.concatenate([talk, random.integers(3, 960, QUESTION_TOKENS)])
                start = time.process_time()
                generation = engine.submit(
                    Encoded(talk, np.full_like(talk, -100)), SamplingParams(max_new_tokens=TURN_TOKENS)
                )
                answer = iter(generation)
                next(answer)
                seconds = time.process_time() - start
                best[who, turn] = min(best.get((who, turn), seconds), seconds)
                said[who].append([generation.token_ids[0], *answer])
                talk = np.concatenate([talk, np.array(said[who][-1])])
    return {
        f"first token of turn {turn + 1}, 6x512": {
            "equal": said["other"][turn] == said["ours"][turn],
            "other_ms": best["other", turn] * 1e3,
            "ours_ms": best["ours", turn] * 1e3,
            "ratio": best["other", turn] / best["ours", turn],
        }
        for turn in range(1, TURNS)
    }


def measure_streams(repeats: int) -> dict[str, Measured]:
    """Tokens a second of many answers at once over those of one after the other."""
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 960, STREAM_PROMPT) for _ in range(STREAMS)]
    results = {}
    for name, shape in STREAM_SHAPES.items():
        engine = without_reuse(build(*shape))
        results[f"16 streams at once over one, {name}"] = compare(
            lambda e=engine: [ask_engine(e, [prompt], STREAM_TOKENS)[0] for prompt in prompts],
            lambda e=engine: ask_engine(e, prompts, STREAM_TOKENS),
            repeats=max(2, repeats // 3),
        )
    return results


MEASURES: dict[str, Callable[[int], dict[str, Measured]]] = {
    "decode": measure_decode,
    "questions": measure_questions,
    "turns": measure_turns,
    "streams": measure_streams,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append the ratios to results.csv")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Measured] = {}
    for name in arguments.only:
        results |= MEASURES[name](arguments.repeats)
    print(json.dumps({c: {k: v if k == "equal" else round(v, 3) for k, v in r.items()} for c, r in results.items()}))
    if arguments.record:
        from record import record

        for case, result in results.items():
            record("inference", case, "ratio", result["ratio"])
            record("inference", case, "tokens equal", float(result["equal"]))
            record("inference", case, "ours, ms", result["ours_ms"])


if __name__ == "__main__":
    main()
