"""Both decoders against transformers' own `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llava.inference.decoder import PlainDecoder
from llava.inference.engine import Engine
from llava.inference.lean import LeanDecoder, choose_decoder
from llava.inference.requests import Request
from llava.inference.sampling import SamplingParams
from tests.inference.models import Seeing, prompt, random_ids, tiny_llama, tiny_mistral, tiny_qwen2

MODELS: dict[str, Any] = {
    "llama": lambda: tiny_llama(),
    "llama without groups": lambda: tiny_llama(num_key_value_heads=4),
    "llama with biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
    "llama with a wide head": lambda: tiny_llama(head_dim=16),
    "llama with tied embeddings": lambda: tiny_llama(tie_word_embeddings=True),
    "llama 3's rotation": lambda: tiny_llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
    "mistral": lambda: tiny_mistral(sliding_window=None),
    "qwen2": lambda: tiny_qwen2(),
}
WINDOWED: dict[str, Any] = {
    "mistral with a window": lambda: tiny_mistral(sliding_window=8),
    "llama with changing frequencies": lambda: tiny_llama(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}
    ),
}


def generate_with_transformers(language_model: Any, ids: Any, *, new_tokens: int) -> list[int]:
    output = language_model.generate(
        torch.tensor(ids)[None], max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_the_lean_decoder_gives_the_tokens_of_transformers(name: str) -> None:
    language_model = MODELS[name]()
    engine = Engine(Seeing(language_model))
    assert isinstance(engine.decoder, LeanDecoder)
    for seed, length in enumerate((1, 7, 30)):
        ids = random_ids(length, seed=seed)
        expected = generate_with_transformers(language_model, ids, new_tokens=40)
        assert list(engine.submit(prompt(ids), SamplingParams(max_new_tokens=40))) == expected


@pytest.mark.parametrize("name", [*MODELS, *WINDOWED])
def test_the_plain_decoder_gives_the_tokens_of_transformers(name: str) -> None:
    language_model = (MODELS | WINDOWED)[name]()
    model = Seeing(language_model)
    engine = Engine(model, decoder=PlainDecoder(model))
    ids = random_ids(20, seed=3)
    expected = generate_with_transformers(language_model, ids, new_tokens=30)
    assert list(engine.submit(prompt(ids), SamplingParams(max_new_tokens=30))) == expected


@pytest.mark.parametrize("name", WINDOWED)
def test_models_that_the_lean_step_does_not_compute_fall_back(name: str) -> None:
    assert isinstance(choose_decoder(Seeing(WINDOWED[name]())), PlainDecoder)


@pytest.mark.parametrize("decoder", [LeanDecoder, PlainDecoder])
def test_prompts_that_share_a_beginning_are_answered_as_if_alone(decoder: Any) -> None:
    model = Seeing(tiny_llama())
    engine = Engine(model, decoder=decoder(model))
    questions = [
        Request(prompt(random_ids(n, seed=n), picture=0.3), SamplingParams(max_new_tokens=4 + n)) for n in range(1, 9)
    ]
    questions.append(Request(prompt(random_ids(5, seed=5), picture=0.9), SamplingParams(max_new_tokens=9)))
    alone = [list(engine.submit(question.encoded, question.params)) for question in questions]
    together = [list(completion.token_ids) for completion in engine.generate(questions)]
    assert together == alone
    assert alone[4] != alone[8], "the picture must matter for this test to mean anything"


def test_a_group_too_wide_for_one_row_is_split_and_answered_the_same() -> None:
    model = Seeing(tiny_llama(max_position_embeddings=1200))
    engine = Engine(model)
    shared = random_ids(40, seed=0)
    requests = [
        Request(prompt([*shared, *random_ids(3, seed=n)]), SamplingParams(max_new_tokens=500, stop_token_ids=(7, 9)))
        for n in range(5)
    ]
    alone = [list(engine.submit(request.encoded, request.params)) for request in requests]
    assert [list(completion.token_ids) for completion in engine.generate(requests)] == alone


def test_bfloat16_stays_near_float32() -> None:
    language_model = tiny_llama()
    model = Seeing(language_model.to(torch.bfloat16))
    decoder = LeanDecoder(model)
    engine = Engine(model, decoder=decoder)
    assert len(list(engine.submit(prompt(random_ids(9, seed=1)), SamplingParams(max_new_tokens=20)))) == 20


def test_layers_that_are_not_plain_linear_are_called_as_they_are() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    language_model = tiny_llama()
    for layer in language_model.model.layers:
        for part, names in ((layer.self_attn, ("q_proj", "o_proj")), (layer.mlp, ("up_proj", "down_proj"))):
            for name in names:
                old = getattr(part, name)
                new = Doubled(old.in_features, old.out_features, bias=False)
                new.weight = old.weight
                setattr(part, name, new)
    ids = random_ids(12, seed=2)
    expected = generate_with_transformers(language_model, ids, new_tokens=20)
    assert list(Engine(Seeing(language_model)).submit(prompt(ids), SamplingParams(max_new_tokens=20))) == expected
