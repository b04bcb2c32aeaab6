"""Hugging Face layout: what stock transformers writes opens here, what is written here opens in stock transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.checkpoint import huggingface
from llava.checkpoint.load import open_checkpoint
from llava.checkpoint.opened import check_tensors, empty_model, materialise
from llava.errors import CheckpointError
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
    "vocab_size": 100,
}


class NoProcessor:
    """A processor that writes nothing: these tests look at weights and config."""

    stop_token_ids = (2,)

    def save(self, folder: Path) -> None:
        pass

    def block(self) -> dict[str, Any]:
        return {}


def stock_model(kind: str = "llava", tower: str = "clip", language: str = "llama", **text: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    vision = transformers.CONFIG_MAPPING[f"{tower}_vision_model"](**VISION)
    words = transformers.CONFIG_MAPPING[language](**{**TEXT, **text})
    shared = {"vision_config": vision, "text_config": words, "image_token_index": IMAGE, "image_seq_length": 16}
    select = "default" if tower == "clip" else "full"
    if kind == "llava":
        config = transformers.LlavaConfig(**shared, vision_feature_select_strategy=select)
        return transformers.LlavaForConditionalGeneration(config).eval()
    points = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    config = transformers.LlavaNextConfig(**shared, vision_feature_select_strategy=select, image_grid_pinpoints=points)
    return transformers.LlavaNextForConditionalGeneration(config).eval()


def open_here(folder: Path) -> Llava:
    return materialise(open_checkpoint(folder), device=torch.device("cpu"), dtype=torch.float32)[0]


def same_logits(ours: Llava, stock: Any) -> float:
    row = torch.cat([torch.arange(3, 9), torch.full((16,), IMAGE), torch.arange(20, 30)])[None]
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = stock(input_ids=row, pixel_values=pixels).logits
        return float((ours.logits(ours(row, pixel_values=pixels)) - expected).abs().max())


@pytest.mark.parametrize(
    ("tower", "language", "text"),
    [
        ("clip", "llama", {}),
        ("clip", "mistral", {"num_key_value_heads": 2}),
        ("siglip", "qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("clip", "phi3", {"pad_token_id": 0}),
    ],
)
def test_a_stock_folder_opens_here_with_the_same_logits(
    tower: str, language: str, text: dict[str, Any], tmp_path: Path
) -> None:
    stock = stock_model(tower=tower, language=language, **text)
    stock.save_pretrained(tmp_path)
    assert same_logits(open_here(tmp_path), stock) < 1e-5


@pytest.mark.parametrize("spelling", ["classic", "in memory"])
def test_every_spelling_of_the_keys_opens(spelling: str, tmp_path: Path) -> None:
    stock = stock_model()
    stock.save_pretrained(tmp_path)
    if spelling == "classic":
        written = load_file(tmp_path / "model.safetensors")
        state = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in written.items()}
    else:
        state = stock.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert same_logits(open_here(tmp_path), stock) < 1e-5


@pytest.mark.parametrize(
    ("kind", "tower", "language", "text"),
    [
        ("llava", "clip", "llama", {}),
        ("llava", "siglip", "qwen2", {"tie_word_embeddings": True}),
        ("llava_next", "clip", "mistral", {"num_key_value_heads": 2}),
    ],
)
def test_a_folder_saved_here_opens_in_stock_transformers_with_nothing_missing(
    kind: str, tower: str, language: str, text: dict[str, Any], tmp_path: Path
) -> None:
    stock = stock_model(kind, tower, language, **text)
    stock.save_pretrained(tmp_path / "stock")
    ours = open_here(tmp_path / "stock")
    huggingface.save(ours, NoProcessor(), tmp_path / "ours")  # type: ignore[arg-type]
    again, info = type(stock).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    for name, value in stock.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert open_here(tmp_path / "ours").config == ours.config
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert any(name.startswith("vision_tower.vision_model.encoder.") for name in written)


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu", "mlp3x_gelu", "identity"])
def test_every_projector_comes_back_as_it_was_saved(projector: str, tmp_path: Path) -> None:
    stock_model().save_pretrained(tmp_path / "stock")
    config = open_here(tmp_path / "stock").config
    if projector == "identity":
        config = config.with_changes(text_config={**config.text_config, "hidden_size": 32})
    torch.manual_seed(1)
    model = Llava.from_config(config.with_changes(projector=projector)).eval()
    huggingface.save(model, NoProcessor(), tmp_path / "ours")  # type: ignore[arg-type]
    again = open_here(tmp_path / "ours")
    assert again.config == model.config
    assert {n: p.sum().item() for n, p in again.named_parameters()} == {
        n: p.sum().item() for n, p in model.named_parameters()
    }
    if projector != "mlp3x_gelu":  # a stock class has exactly two layers
        import transformers

        stock = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
        assert same_logits(model, stock) < 1e-5


def test_an_image_token_without_a_row_gets_one_on_the_way_out(tmp_path: Path) -> None:
    import transformers

    stock_model().save_pretrained(tmp_path / "stock")
    model = open_here(tmp_path / "stock")
    model.config = model.config.with_changes(image_token_id=100)
    huggingface.save(model, NoProcessor(), tmp_path / "ours")  # type: ignore[arg-type]
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    row = torch.cat([torch.arange(3, 9), torch.full((16,), 100), torch.arange(20, 30)])[None]
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        theirs = stock(input_ids=row, pixel_values=pixels).logits
        ours = model.logits(model(row, pixel_values=pixels))
    assert theirs.shape[-1] == 128
    assert (theirs[..., :100] - ours).abs().max() < 1e-5
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))


def test_each_damaged_key_is_an_error_that_names_key_file_and_shape(tmp_path: Path) -> None:
    stock_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    empty = empty_model(open_checkpoint(tmp_path).config)
    for name in sorted(state):
        shape = str(list(state[name].shape))
        for damage in ("dropped", "renamed", "reshaped"):
            damaged = dict(state)
            value = damaged.pop(name)
            if damage == "renamed":
                damaged[name + "_old"] = value
            if damage == "reshaped":
                damaged[name] = value.new_zeros((*value.shape, 2))
            save_file(damaged, path)
            with pytest.raises(CheckpointError) as caught:
                check_tensors(open_checkpoint(tmp_path), empty)
            message = str(caught.value)
            assert "model.safetensors" in message and shape in message, (damage, message)
            assert name in message, (damage, name, message)
    save_file(state, path)
    open_here(tmp_path)


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    stock_model().save_pretrained(tmp_path / "stock")
    model = open_here(tmp_path / "stock")

    class Failing(NoProcessor):
        def save(self, folder: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        huggingface.save(model, Failing(), tmp_path / "ours")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


def test_saving_over_a_folder_keeps_its_other_files_and_drops_old_shards(tmp_path: Path) -> None:
    stock_model().save_pretrained(tmp_path / "stock")
    model = open_here(tmp_path / "stock")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"old")
    huggingface.save(model, NoProcessor(), folder)  # type: ignore[arg-type]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "generation_config.json", "metrics.jsonl", "model.safetensors"]


def test_shards_and_index_are_written_and_read(tmp_path: Path) -> None:
    stock = stock_model()
    stock.save_pretrained(tmp_path / "stock")
    model = open_here(tmp_path / "stock")
    huggingface.save(model, NoProcessor(), tmp_path / "ours", max_shard_bytes=60_000)  # type: ignore[arg-type]
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3
    assert same_logits(open_here(tmp_path / "ours"), stock) < 1e-5


def test_a_model_type_that_needs_remote_code_is_refused(tmp_path: Path) -> None:
    stock_model().save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    data["text_config"] = {"model_type": "my_llm", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="never run"):
        open_here(tmp_path)


@pytest.mark.parametrize("size", [(64, 64), (40, 150), (300, 300)])
def test_llava_onevision_opens_for_pictures_with_the_same_logits(size: tuple[int, int], tmp_path: Path) -> None:
    import transformers

    from llava.prompt.images import ImageSettings

    torch.manual_seed(0)
    points = [[56 * rows, 56 * cols] for rows in range(1, 4) for cols in range(1, 4)]
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.Qwen2Config(**TEXT, num_key_value_heads=2),
        image_token_index=IMAGE,
        image_grid_pinpoints=points,
        vision_aspect_ratio="anyres_max_4",
    )
    stock = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    stock.save_pretrained(tmp_path)
    ours = open_here(tmp_path)
    counter = ImageSettings(
        mode="anyres",
        size=56,
        pinpoints=ours.config.image_grid_pinpoints,
        patches_per_side=4,
        tokens_per_tile=16,
        merge="spatial_unpad",
        max_tiles=ours.config.anyres_max,
    )
    tiles = counter.count_tiles(size)
    row = torch.cat([torch.arange(3, 9), torch.full((counter.count_tokens(size),), IMAGE), torch.arange(20, 30)])[None]
    pixels = torch.randn(tiles, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = stock(input_ids=row, pixel_values=pixels[None], image_sizes=torch.tensor([size])).logits
        found = ours.logits(ours(row, pixel_values=pixels, image_sizes=[size], tiles_per_image=[tiles]))
    assert (found - theirs).abs().max() < 1e-5
    huggingface.save(ours, NoProcessor(), tmp_path / "again")  # type: ignore[arg-type]
    again, info = type(stock).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    with torch.no_grad():
        expected = again.eval()(input_ids=row, pixel_values=pixels[None], image_sizes=torch.tensor([size])).logits
    assert (expected - theirs).abs().max() < 1e-5
