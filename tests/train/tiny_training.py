"""Tiny models and synthetic conversations, so that learning is tested without files or tokenizers."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from llava.data.packing import Tree, grow_trees
from llava.model.config import LlavaConfig
from llava.model.llava import Llava
from llava.prompt.processor import IGNORE_LABEL, Encoded

IMAGE_ID = 5
VOCABULARY = 64
PATCHES = 4  # an 8 px picture in patches of 4


def build_tiny_llava(seed: int = 0, *, layers: int = 2, dropout: float = 0.0) -> Llava:
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 256,
            "attention_dropout": dropout,
            "tie_word_embeddings": False,
        },
        image_token_id=IMAGE_ID,
    )
    return Llava.from_config(config)


def make_conversation(rng: np.random.Generator, *, picture: int | None, answer: int = 2, question: int = 3) -> Encoded:
    """`<bos> picture question answer`; the answer is the picture's number, so that it can be learnt."""
    head = [1] + ([IMAGE_ID] * PATCHES if picture is not None else [])
    asked = rng.integers(10, 20, question).tolist()
    answered = [20 + (picture or 0)] * (answer - 1) + [2]
    ids = np.array([*head, *asked, *answered], dtype=np.int64)
    labels = np.full(len(ids), IGNORE_LABEL, dtype=np.int64)
    labels[-answer:] = ids[-answer:]
    if picture is None:
        return Encoded(ids, labels)
    pixels = np.full((1, 3, 8, 8), picture / 4 - 1, dtype=np.float32)
    pixels[0, :, picture % 8] += 1
    return Encoded(ids, labels, pixels, ((8, 8),), (1,), (PATCHES,))


def make_mixed_conversations(seed: int = 0) -> list[list[Encoded]]:
    """Groups: three pictures with one to four conversations of several lengths, and two conversations without."""
    rng = np.random.default_rng(seed)
    groups = [
        [
            make_conversation(rng, picture=picture, answer=int(rng.integers(1, 5)), question=int(rng.integers(1, 6)))
            for _ in range(count)
        ]
        for picture, count in ((0, 1), (3, 4), (6, 2))
    ]
    return [*groups, [make_conversation(rng, picture=None)], [make_conversation(rng, picture=None, question=6)]]


def grow(groups: list[list[Encoded]], *, max_tokens: int = 256) -> list[Tree]:
    return [tree for group in groups for tree in grow_trees(group, image_token_id=IMAGE_ID, max_tokens=max_tokens)]


def separately(groups: list[list[Encoded]]) -> list[Tree]:
    """The same conversations, each a sequence of its own."""
    return [
        tree for group in groups for one in group for tree in grow_trees([one], image_token_id=IMAGE_ID, max_tokens=1)
    ]


def write_tiny_bases(folder: Path) -> None:
    """A language model and a vision tower as folders, as anybody would download them."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = Path(__file__).parent.parent / "golden" / "prompt" / "tokenizers" / "vicuna-tiny-v1.5"
    shutil.copytree(tokenizer, folder / "language_model")
    language = LlamaConfig(
        vocab_size=480,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(language).save_pretrained(folder / "language_model")
    tower = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    CLIPVisionModel(tower).save_pretrained(folder / "vision_tower")
    pictures = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
        "do_center_crop": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
    }
    (folder / "vision_tower" / "preprocessor_config.json").write_text(json.dumps(pictures))
