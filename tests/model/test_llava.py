"""The module against transformers' own LLaVA classes (the oracle), and its packed rows against separate ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llava.errors import PromptError
from llava.model.config import LlavaConfig
from llava.model.llava import Llava

IMAGE = 99
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def tiny_config(tower: str = "clip", language: str = "llama", **changes: Any) -> LlavaConfig:
    data = {
        "model_type": "llava",
        "vision_config": {"model_type": TOWERS[tower], **VISION},
        "text_config": {"model_type": language, **TEXT},
        "image_token_index": IMAGE,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
    }
    return LlavaConfig.from_dict(data).with_changes(**changes)


def tiny_model(seed: int = 0, **kwargs: Any) -> Llava:
    torch.manual_seed(seed)
    model = Llava.from_config(tiny_config(**kwargs))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def stock_copy(model: Llava) -> Any:
    """transformers' class with the same weights, through the names that it reads from disk."""
    from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    data = model.config.to_dict()
    config = AutoConfig.for_model(**{key: value for key, value in data.items() if key != "architectures"})
    tiled = data["model_type"] == "llava_next"
    stock = (LlavaNextForConditionalGeneration if tiled else LlavaForConditionalGeneration)(config)
    state = {}
    for name, value in model.state_dict().items():
        name = name.replace("language_model.lm_head", "lm_head")
        name = name.replace("language_model.model.", "model.language_model.")
        state[name if name.startswith(("lm_head", "model.")) else f"model.{name}"] = value
    stock.load_state_dict(state)
    return stock.eval()


def pictured_row(num_pictures: int, features: int, length: int, generator: torch.Generator) -> Tensor:
    """One row (T,): words, and after each few of them a picture's placeholders."""
    words = torch.randint(3, 90, (length,), generator=generator)
    pieces = []
    for index in range(num_pictures):
        pieces += [words[index : index + 1], torch.full((features,), IMAGE)]
    return torch.cat([*pieces, words[num_pictures:]])


@pytest.mark.parametrize("language", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_logits_equal_transformers_own_llava(tower: str, language: str) -> None:
    model = tiny_model(tower=tower, language=language)
    stock = stock_copy(model)
    generator = torch.Generator().manual_seed(1)
    rows = torch.stack([pictured_row(2, 16, 11, generator) for _ in range(2)])  # (2, 43)
    pixels = torch.randn(4, 3, 56, 56, generator=generator)
    with torch.no_grad():
        ours = model.logits(model(rows, pixel_values=pixels))
        theirs = stock(input_ids=rows, pixel_values=pixels).logits
    assert (ours - theirs).abs().max() < 1e-5


def test_a_row_of_text_only_equals_transformers() -> None:
    model = tiny_model()
    rows = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert (model.logits(model(rows)) - stock_copy(model)(input_ids=rows).logits).abs().max() < 1e-5


def test_the_last_hidden_state_of_a_siglip_tower_is_taken_before_its_final_norm() -> None:
    model = tiny_model(tower="siglip", vision_feature_layer=-1)
    rows = pictured_row(1, 16, 5, torch.Generator().manual_seed(1))[None]
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        theirs = stock_copy(model)(input_ids=rows, pixel_values=pixels).logits
        assert (model.logits(model(rows, pixel_values=pixels)) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("layer", [0, 1, -1, (-3, -1)])
def test_any_layer_equals_the_hidden_states_of_the_tower(layer: int | tuple[int, ...]) -> None:
    from llava.model.vision import select_features

    tower = tiny_model().vision_tower
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        every = tower(pixels, output_hidden_states=True).hidden_states
        layers = (layer,) if isinstance(layer, int) else layer
        expected = torch.cat([every[index] for index in layers], dim=-1)[:, 1:]
        assert torch.equal(select_features(tower, pixels, layer=layer, skipped_tokens=1), expected)


POINTS = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
ANYRES: dict[str, Any] = {"image_mode": "anyres", "image_grid_pinpoints": POINTS, "merge_type": "spatial_unpad"}


@pytest.mark.parametrize("language", ["llama", "mistral", "qwen2"])
def test_tiled_pictures_of_several_sizes_equal_transformers_llava_next(language: str) -> None:
    from llava.prompt.images import ImageSettings

    model = tiny_model(language=language, **ANYRES)
    stock = stock_copy(model)
    counter = ImageSettings(
        mode="anyres", size=56, pinpoints=POINTS, patches_per_side=4, tokens_per_tile=16, merge="spatial_unpad"
    )
    generator = torch.Generator().manual_seed(4)
    sizes = [(64, 64), (50, 123), (123, 50), (300, 200), (17, 300)]
    counts = [counter.count_tiles(size) for size in sizes]
    pixels = torch.randn(sum(counts), 3, 56, 56, generator=generator)
    words = torch.randint(3, 90, (8,), generator=generator)
    pieces = [torch.cat([words, torch.full((counter.count_tokens(size),), IMAGE)]) for size in sizes]
    row = torch.cat([*pieces, words])[None]
    padded = torch.zeros(len(sizes), max(counts), 3, 56, 56)
    for index, tiles in enumerate(torch.split(pixels, counts)):
        padded[index, : len(tiles)] = tiles
    with torch.no_grad():
        ours = model.logits(model(row, pixel_values=pixels, image_sizes=sizes, tiles_per_image=counts))
        theirs = stock(input_ids=row, pixel_values=padded, image_sizes=torch.tensor(sizes)).logits
    assert (ours - theirs).abs().max() < 1e-5


def test_tiles_that_do_not_belong_to_the_size_are_refused() -> None:
    model = tiny_model(**ANYRES)
    with pytest.raises(PromptError, match=r"cut in 2 x 2 tiles, but 3 were passed"):
        model.encode_images(torch.zeros(4, 3, 56, 56), image_sizes=[(300, 300)], tiles_per_image=[4])
    with pytest.raises(PromptError, match="sums to 5"):
        model.encode_images(torch.zeros(4, 3, 56, 56), image_sizes=[(300, 300)], tiles_per_image=[5])


def packed_mask(trees: Tensor, branches: Tensor) -> Tensor:
    """(B, T) tree and branch numbers (0 the prefix, tree -1 padding) to the (B, 1, T, T) mask of the contract."""
    same_tree = trees[:, :, None] == trees[:, None, :]
    seen = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    length = trees.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    itself = torch.eye(length, dtype=torch.bool)
    return ((same_tree & seen & causal & (trees >= 0)[:, None, :]) | itself)[:, None]


@pytest.mark.parametrize("language", ["llama", "mistral", "qwen2"])
def test_packed_rows_equal_separate_rows_and_an_all_ones_mask_would_not(language: str) -> None:
    model = tiny_model(language=language)
    generator = torch.Generator().manual_seed(2)
    rows = [pictured_row(1, 16, length, generator) for length in (5, 9, 4)]
    pixels = torch.randn(3, 3, 56, 56, generator=generator)
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    trees = torch.cat([torch.full((len(row),), index) for index, row in enumerate(rows)])[None]
    mask = packed_mask(trees, torch.zeros_like(trees))
    with torch.no_grad():
        separate = [model(row[None], pixel_values=pixels[i : i + 1])[0] for i, row in enumerate(rows)]
        together = model(packed, pixel_values=pixels, position_ids=positions, attention_mask=mask)[0]
        assert (together - torch.cat(separate)).abs().max() < 1e-5
        # what an all-ones mask does in the language model: the samples see each other, and no error says so
        features = torch.cat(model.encode_images(pixels))
        leaked = model.decoder(
            inputs_embeds=model.embed(packed, features),
            position_ids=positions,
            attention_mask=torch.ones_like(packed),
        )[0][0]
    assert (leaked - torch.cat(separate)).abs().max() > 1e-2


@pytest.mark.parametrize("mask", [None, torch.ones(1, 6, dtype=torch.long)])
def test_restarted_positions_without_an_explicit_mask_are_refused(mask: Tensor | None) -> None:
    model = tiny_model()
    rows, positions = torch.arange(3, 9)[None], torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="packed"):
        model(rows, position_ids=positions, attention_mask=mask)


def test_left_padding_is_not_taken_for_packing() -> None:
    model = tiny_model()
    row = torch.arange(3, 9)
    padded = torch.cat([torch.zeros(3, dtype=torch.long), row])[None]
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        separate = model(row[None])[0]
        together = model(padded, position_ids=positions, attention_mask=mask)[0, 3:]
    assert (together - separate).abs().max() < 1e-5


def answer_loss(model: Llava, hidden: Tensor, labels: Tensor) -> Tensor:
    scores = model.logits(hidden[:-1])
    return torch.nn.functional.cross_entropy(scores, labels[1:], ignore_index=-100, reduction="sum")


def test_branches_on_a_shared_picture_equal_separate_rows_in_loss_and_gradients() -> None:
    model = tiny_model()
    generator = torch.Generator().manual_seed(3)
    prefix = pictured_row(1, 16, 3, generator)
    branches = [torch.randint(3, 90, (length,), generator=generator) for length in (6, 4, 7)]
    pixels = torch.randn(1, 3, 56, 56, generator=generator)

    def labels_of(branch: Tensor) -> Tensor:
        # a branch opens with its question, so its first token is never supervised
        return torch.cat([torch.full((2,), -100), branch[2:]])

    losses = []
    for branch in branches:
        row = torch.cat([prefix, branch])
        labels = torch.cat([torch.full_like(prefix, -100), labels_of(branch)])
        losses.append(answer_loss(model, model(row[None], pixel_values=pixels)[0], labels))
    separate = torch.stack(losses).sum()
    separate.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    row = torch.cat([prefix, *branches])[None]
    labels = torch.cat([torch.full_like(prefix, -100), *[labels_of(branch) for branch in branches]])
    positions = torch.cat(
        [torch.arange(len(prefix)), *[len(prefix) + torch.arange(len(branch)) for branch in branches]]
    )[None]
    numbers = torch.cat(
        [torch.zeros(len(prefix)), *[torch.full((len(b),), float(i)) for i, b in enumerate(branches, 1)]]
    )[None]
    mask = packed_mask(torch.zeros_like(row), numbers)
    hidden = model(row, pixel_values=pixels, position_ids=positions, attention_mask=mask)
    together = answer_loss(model, hidden[0], labels)
    together.backward()
    assert abs(together.item() - separate.item()) / separate.item() < 1e-5
    for name, value in expected.items():
        found = model.get_parameter(name).grad
        assert found is not None, name
        assert (found - value).norm() <= 1e-5 * max(value.norm().item(), 1e-3), name


def test_a_sliding_window_is_kept_under_an_explicit_mask() -> None:
    config = tiny_config(language="mistral")
    config = config.with_changes(text_config={**config.text_config, "sliding_window": 4})
    torch.manual_seed(0)
    model = Llava.from_config(config).eval()
    row = torch.randint(3, 90, (1, 12))
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        plain = model(row)
        masked = model(row, position_ids=torch.arange(12)[None], attention_mask=mask)
    assert (plain - masked).abs().max() < 1e-5


def test_the_placeholder_may_lie_outside_the_embedding() -> None:
    model = tiny_model(image_token_id=-200)
    inside = tiny_model()
    row = pictured_row(1, 16, 4, torch.Generator().manual_seed(1))[None]
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        outside = row.masked_fill(row == IMAGE, -200)
        assert torch.equal(model(outside, pixel_values=pixels), inside(row, pixel_values=pixels))


def test_placeholders_and_features_must_be_as_many() -> None:
    model = tiny_model()
    with pytest.raises(PromptError, match=r"15 image placeholders.*16 image features"):
        model(torch.full((1, 15), IMAGE), pixel_values=torch.zeros(1, 3, 56, 56))
    with pytest.raises(PromptError, match="15 image placeholders but no picture"):
        model(torch.full((1, 15), IMAGE))


def test_a_step_without_pictures_still_reaches_every_vision_parameter() -> None:
    model = tiny_model(merge_type="spatial_unpad", image_mode="anyres", image_grid_pinpoints=((56, 112),))
    hidden = model(torch.arange(3, 9)[None]) + model.touch_vision()
    hidden.sum().backward()
    reached = [name for name, p in model.named_parameters() if not name.startswith("language_model")]
    without = [n for n in reached if model.get_parameter(n).grad is None]
    # the block after the chosen layer and the tower's final norm are never used
    assert all(n.startswith(("vision_tower.encoder.layers.2", "vision_tower.post_layernorm")) for n in without)
    assert model.image_newline is not None and model.image_newline.grad is not None
    assert not model.image_newline.grad.any()


def test_a_frozen_tower_keeps_no_gradients() -> None:
    model = tiny_model()
    model.vision_tower.requires_grad_(False)
    features = model.encode_tiles(torch.zeros(1, 3, 56, 56))
    features.sum().backward()
    assert all(parameter.grad is None for parameter in model.vision_tower.parameters())
    assert model.multi_modal_projector.linear_1.weight.grad is not None
