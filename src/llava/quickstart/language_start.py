"""The quickstart's language model before its first step: sizes, spread of the weights, and a circuit that copies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from llava.quickstart.tokenizer_building import MODEL_MAX_LENGTH, SPACE, list_numbers


@dataclass(frozen=True)
class LanguageSettings:
    """What decides the language model. Steps, not seconds, so that the result is a function of the seed."""

    hidden_size: int = 192
    intermediate_size: int = 384
    num_layers: int = 6
    num_heads: int = 6
    copy_steps_easy: int = 60  # 56 tokens, up to 20 long
    copy_steps_hard: int = 140  # every token of the world, up to 32 long
    look_up_steps_each: int = 120  # records of random tokens with up to 3, 4, 5 and 6 fields, and questions on them
    question_steps: int = 6_300  # what the first round's schedule is made for
    first_round_steps: int = 4_820  # where the second round takes over
    second_round_steps: int = 2_500  # most turns go to the kinds that are learnt last
    batch_rows: int = 8
    row_tokens: int = 288
    random_learning_rate: float = 2e-3
    learning_rate: float = 1.2e-3
    second_learning_rate: float = 8e-4
    warmup_steps: int = 50
    flat_share: float = 0.55  # of the question steps before the cosine begins
    averaging: float = 0.997  # the weights kept are a moving average

    @property
    def random_steps(self) -> int:
        """Steps on random tokens, before the first question about a scene."""
        return self.copy_steps_easy + self.copy_steps_hard + 4 * self.look_up_steps_each


def build_language_model(settings: LanguageSettings, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A fresh LlamaForCausalLM from torch's generator.

    Output rows start as the input rows, so that copying is near from the start, and numbers start in order: each shares
    slow waves with its neighbours.
    """
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=MODEL_MAX_LENGTH,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id("</s>"),
        pad_token_id=None,
        tie_word_embeddings=False,
        # on a CPU plain attention's backward is three times faster than the fused kernel's at these sizes
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    rows = torch.randn(config.vocab_size, settings.hidden_size) * 0.02
    waves = torch.linalg.qr(torch.randn(settings.hidden_size, 12))[0].T * 0.01 * math.sqrt(settings.hidden_size / 6)
    for number in list_numbers():
        angles = 2 * math.pi * float(number) * torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
        wave = torch.cat([angles.sin(), angles.cos()]) @ waves
        for token in (number, SPACE + number):
            rows[tokenizer.token_to_id(token)] += wave
    shared = F.normalize(torch.randn(settings.hidden_size), dim=0)
    rows = F.normalize(rows - torch.outer(rows @ shared, shared)) * 0.5 * math.sqrt(settings.hidden_size)
    with torch.no_grad():
        model.lm_head.weight.copy_(0.04 * rows)
        model.model.embed_tokens.weight.copy_(rows + 0.25 * math.sqrt(settings.hidden_size) * shared)
        for head, distance in enumerate((1, 1, 2, 3)):
            _start_copying(model, shared, head=head, distance=distance)
    return model


def _start_copying(model: LlamaForCausalLM, shared: Tensor, *, head: int, distance: int) -> None:
    """Start one head of each of the first two layers as the circuit that copies: find what followed this token before.

    First layer: look at the token `distance` before and write down which it was. Its query and key come from a
    direction that all embeddings share, and differ by as many steps of the rotary embedding. Second layer: look where
    this token was written down so, on the slow frequencies that hardly turn with distance, and bring the token that
    stands there. Random tokens then sharpen in seconds what they would need very long to find.
    """
    first, second = (model.model.layers[layer].self_attn for layer in (0, 1))
    size, half = first.head_dim, first.head_dim // 2
    rows = slice(head * size, (head + 1) * size)
    angles = distance * model.model.rotary_emb.inv_freq[:half].float()
    query = torch.zeros(size)
    query[:4] = 1.15  # the fastest frequencies: the others hardly tell near places apart
    key = torch.cat([query[:half] * angles.cos(), query[:half] * angles.sin()])
    first.q_proj.weight[rows] += torch.outer(query, shared)
    first.k_proj.weight[rows] += torch.outer(key, shared)
    drawn = torch.cat([shared[:, None], torch.randn(shared.numel(), 3 * size)], dim=1)
    frames = torch.linalg.qr(drawn)[0].T[1:]  # orthonormal rows in D, none along the shared direction
    read, written, brought = (frames[part * size : (part + 1) * size] for part in range(3))
    slow = (torch.arange(size) % half >= half // 2).float()[:, None]
    first.v_proj.weight[rows] = read
    first.o_proj.weight[:, rows] = 0.8 * written.T
    second.q_proj.weight[rows] = 3.0 * slow * read
    second.k_proj.weight[rows] = slow * written
    second.v_proj.weight[rows] = brought
    second.o_proj.weight[:, rows] = 0.8 * brought.T
