"""Trees in the language models of many families: what is found out about each, and that it is true."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llava.model.language import attention_implementation, run_language_model
from llava.model.tree_attention import TreeLayout
from llava.model.tree_support import TreeSupport, enable_tree_attention, find_tree_support

SMALL = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {},
    "phi3": {"num_key_value_heads": 2},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "granite": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "starcoder2": {"num_key_value_heads": 2, "sliding_window": 5},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
        "first_k_dense_replace": 2,
    },
}
PREFIX, LENGTHS = 7, (4, 6, 5)


def build(family: str, changes: dict[str, Any]) -> nn.Module:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SMALL, **IDS, **changes})
    chosen = attention_implementation(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=chosen)
    if family != "mixtral":  # its experts refuse float64
        model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def gradients(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_gives_what_separate_sequences_give(family: str) -> None:
    """Hidden states and the gradient of every weight, float64, through the layout and through transformers' module."""
    model = build(family, FAMILIES[family])
    dtype, tolerance = next(model.parameters()).dtype, 1e-5 if family == "mixtral" else 1e-6
    inputs = torch.randn(1, PREFIX + sum(LENGTHS), 32, dtype=dtype, generator=torch.Generator().manual_seed(1))
    alone = []
    cursor = PREFIX
    for length in LENGTHS:
        row = torch.cat([inputs[:, :PREFIX], inputs[:, cursor : cursor + length]], 1)
        alone.append(run_language_model(model, row)[:, PREFIX:])
        cursor += length
    expected = torch.cat(alone, 1)
    wanted = gradients(model, expected)
    assert enable_tree_attention(model)
    branches = [0] * PREFIX + [n for n, length in enumerate(LENGTHS, 1) for _ in range(length)]
    positions = [*range(PREFIX), *(PREFIX + i for length in LENGTHS for i in range(length))]
    layout = TreeLayout.from_ids(np.zeros((1, len(branches)), dtype=np.int64), np.array([branches]))
    made = run_language_model(model, inputs, position_ids=torch.tensor([positions]), tree_layout=layout)[:, PREFIX:]
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    got = gradients(model, made)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # not 1e-12: most families' norms round to float32 inside, some experts compute in it
        assert float((got[name] - gradient).norm()) <= tolerance * float(gradient.norm()) + 1e-9, name


@pytest.mark.parametrize(
    ("family", "changes", "way"),
    [
        ("llama", {"attention_dropout": 0.1}, "mask"),
        ("stablelm", {"num_key_value_heads": 4}, "mask"),  # hands nothing on to its attention
        ("gpt2", {}, "mask"),  # attention dropout is 0.1 unless switched off
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 8}, "mask"),  # soft-capped scores, eager only
        ("mpt", {}, "rows"),  # ALiBi counts columns
        ("bloom", {}, "none"),  # takes no mask of four dimensions
    ],
)
def test_a_family_that_cannot_is_given_the_next_best_way_and_says_so(
    family: str, changes: dict[str, Any], way: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(family, {**changes, "initializer_range": 0.02 + len(family) / 1e6})  # a configuration not tried yet
    with caplog.at_level(logging.INFO, logger="llava.model.tree_support"):
        support = find_tree_support(model)
    assert support.way == way
    assert support.trees is (way == "mask")
    assert caplog.messages and caplog.messages[0].startswith(f"{family}: ")
    assert not enable_tree_attention(model)


def test_trying_a_family_draws_no_random_numbers_of_the_run() -> None:
    model = build("llama", {"initializer_range": 0.0212})
    state = torch.get_rng_state()
    find_tree_support(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_eager_attention_is_never_replaced() -> None:
    model = build("llama", {})
    model.config._attn_implementation = "eager"
    assert find_tree_support(model) == TreeSupport("mask", last_block=True)
    assert not enable_tree_attention(model)
