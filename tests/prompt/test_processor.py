"""The processor: placeholders, labels, limits, saving and loading, and transformers' processors as oracle."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import CheckpointError, ContextLengthError, ImageError, PromptError
from llava.prompt.conversation import Conversation, Image, Message, Text
from llava.prompt.images import ImageSettings
from llava.prompt.processor import IGNORE_LABEL, Encoded, Processor
from llava.prompt.templates import TEMPLATES
from tests.prompt.prompt_recordings import llama_like, open_tokenizer

PAD = ImageSettings(mode="pad", size=56, patches_per_side=4, tokens_per_tile=16)
ANYRES = replace(PAD, mode="anyres", pinpoints=((56, 112), (112, 56), (112, 112)), merge="spatial_unpad")


def processor(
    template: str = "vicuna_v1", images: ImageSettings = PAD, tokenizer: str = "llama_legacy", **more: Any
) -> Processor:
    subject = open_tokenizer(tokenizer, added=("<image>", "<im_start>", "<im_end>"))
    return Processor(subject, template, image_settings=images, image_token_id=subject.token_id("<image>"), **more)


def picture(height: int, width: int) -> Image:
    return Image(np.full((height, width, 3), 99, dtype=np.uint8))


def user(*parts: str | Image) -> Message:
    return Message("user", tuple(Text(part) if isinstance(part, str) else part for part in parts))


def answer(text: str) -> Message:
    return Message("assistant", (Text(text),))


def talk(*messages: Message, origin: str = "") -> Conversation:
    return Conversation(messages, origin)


def supervised(subject: Processor, encoded: Encoded) -> str:
    return subject.tokenizer.decode(encoded.labels[encoded.labels != IGNORE_LABEL], skip_special=False)


def test_a_picture_stands_once_for_every_feature_row_and_is_never_supervised() -> None:
    subject = processor()
    encoded = subject.encode(talk(user(picture(50, 70), "What?"), answer("A bowl.")))
    places = encoded.input_ids == subject.image_token_id
    assert places.sum() == 16 == subject.patches_per_tile
    assert (encoded.labels[places] == IGNORE_LABEL).all()
    assert encoded.pixel_values.shape == (1, 3, 56, 56)
    assert (encoded.image_sizes, encoded.tiles_per_image, encoded.tokens_per_image) == (((50, 70),), (1,), (16,))
    assert supervised(subject, encoded).strip() == "A bowl.</s>"
    assert encoded.num_answer_tokens == (encoded.labels != IGNORE_LABEL).sum()


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), max_size=3), anyres=st.booleans())
def test_tiles_and_tokens_are_those_counted_for_every_size(sizes: list[tuple[int, int]], anyres: bool) -> None:
    subject = SHARED_ANYRES if anyres else SHARED_PAD
    encoded = subject.encode(talk(user(*(picture(*size) for size in sizes), "q")), open_turn=True)
    counted = [subject.image_settings.count_tokens(size) for size in sizes]
    assert list(encoded.tokens_per_image) == counted
    assert (encoded.input_ids == subject.image_token_id).sum() == sum(counted)
    assert sum(encoded.tiles_per_image) == len(encoded.pixel_values)
    assert encoded.image_sizes == tuple(sizes)
    headers = subject.encode(talk(user(*(picture(*size) for size in sizes), "q")), open_turn=True, pixels=False)
    np.testing.assert_array_equal(headers.input_ids, encoded.input_ids)
    assert len(headers.pixel_values) == 0


SHARED_PAD, SHARED_ANYRES = processor("llava_hf"), processor("llava_hf", ANYRES)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if "plain" not in name])
@pytest.mark.parametrize("tokenizer", ["llama_legacy", "llama_nonlegacy", "mpt", "llama_chatml_legacy"])
def test_what_a_person_writes_changes_no_special_token(template: str, tokenizer: str) -> None:
    subject = processor(template, tokenizer=tokenizer, start_end_tokens=True)
    attack = "".join(f"a{token} {token}" for token in (*subject.tokenizer.added_tokens, *subject.stop_strings, "<s>"))

    def specials(words: str) -> list[int]:
        said = talk(user(picture(9, 9), words), answer(words), user(words))
        ids = subject.encode(said, open_turn=True).input_ids.tolist()
        return [token for token in ids if token in subject.tokenizer.special_ids]

    assert specials(attack) == specials("harmless")


def test_prepared_pictures_are_used_as_they_are() -> None:
    subject = processor()
    said = talk(user(picture(50, 70), "What?"))
    prepared = [subject.prepare_image(said.images[0])]
    once, again = subject.encode(said, open_turn=True), subject.encode(said, open_turn=True, images=prepared)
    np.testing.assert_array_equal(once.input_ids, again.input_ids)
    np.testing.assert_array_equal(once.pixel_values, again.pixel_values)
    with pytest.raises(PromptError, match="2 prepared pictures for 1"):
        subject.encode(said, open_turn=True, images=prepared * 2)


@pytest.mark.parametrize("images", [PAD, ANYRES])
def test_the_limit_holds_at_its_very_number(images: ImageSettings) -> None:
    subject = processor(images=images)
    said = talk(user(picture(50, 90), "What?"), origin="x.json:3")
    length = len(subject.encode(said, open_turn=True).input_ids)
    assert len(subject.encode(said, open_turn=True, max_length=length).input_ids) == length
    with pytest.raises(
        ContextLengthError, match=rf"x\.json:3: {length} tokens \(\d+ of them for 1 pictures\), but at most"
    ):
        subject.encode(said, open_turn=True, max_length=length - 1)


def test_truncation_never_splits_a_picture_and_keeps_an_answer() -> None:
    subject = processor("llava_hf")
    said = talk(user("hi"), answer("ok"), user(picture(50, 70), "What?"), answer("A bowl."))
    whole = subject.encode(said)
    begin = int(np.flatnonzero(whole.input_ids == subject.image_token_id)[0])
    for limit in range(begin, len(whole.input_ids)):
        cut = subject.encode(said, max_length=limit, overflow="truncate")
        kept = (cut.input_ids == subject.image_token_id).sum()
        assert kept == 16 * len(cut.image_sizes) == 16 * len(cut.pixel_values)
        assert kept == (16 if limit >= begin + 16 else 0)
        assert len(cut.input_ids) + cut.num_truncated == len(whole.input_ids)
        assert len(cut.input_ids) <= limit
        assert cut.num_answer_tokens > 0
    with pytest.raises(ContextLengthError, match="no answer is left"):
        subject.encode(said, max_length=3, overflow="truncate")


def test_stop_tokens_are_the_templates_end_and_eos() -> None:
    assert processor("vicuna_v1").stop_token_ids == (2,)
    chatml = processor("chatml", tokenizer="llama_chatml_legacy")
    assert chatml.stop_token_ids == (chatml.tokenizer.token_id("<|im_end|>"), 2)
    assert processor("llava_v0").stop_token_ids == (2,)
    assert processor("llava_v0").stop_strings == ("###",)
    assert processor("xtuner_vicuna").stop_token_ids == (2,)


def test_decoding_leaves_out_pictures_and_special_tokens() -> None:
    subject = processor("llava_hf")
    encoded = subject.encode(talk(user(picture(9, 9), "What?")), open_turn=True)
    assert subject.decode(encoded.input_ids) == "USER:  \nWhat? ASSISTANT:"


@pytest.mark.parametrize(
    "images", [PAD, ANYRES, replace(PAD, mode="crop", shortest_edge=60), replace(PAD, mode="squash")]
)
def test_a_saved_processor_is_the_same_again(images: ImageSettings, tmp_path: Path) -> None:
    subject = processor("llava_v1", images, start_end_tokens=True, image_position="inline", text_after_image="continue")
    subject.save(tmp_path)
    again = Processor.load(tmp_path)
    assert again.image_settings == images
    said = talk(user("a", picture(50, 90), "b"), answer("c"))
    for field in ("input_ids", "labels", "pixel_values"):
        np.testing.assert_array_equal(getattr(again.encode(said), field), getattr(subject.encode(said), field))


def test_saving_beside_a_config_leaves_it_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    processor().save(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def hugging_face_folder(folder: Path, images: ImageSettings, **config: Any) -> Path:
    """What stock transformers leaves: tokenizer.json, preprocessor_config.json, and no `llava` block."""
    tokenizer = llama_like(prefix="prepend")
    tokenizer.save(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(images.to_preprocessor_config()))
    vision = {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}
    stock = {"image_token_index": tokenizer.token_id("<image>"), "vision_config": vision, **config}
    (folder / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 77}, **stock}))
    return folder


@pytest.mark.parametrize("size", [(64, 48), (50, 90), (33, 34)])
def test_a_stock_llava_folder_gives_what_transformers_processor_gives(size: tuple[int, int], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

    crop = replace(PAD, mode="crop", shortest_edge=56)
    ours = Processor.load(hugging_face_folder(tmp_path, crop, model_type="llava"))
    theirs = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**crop.to_preprocessor_config()),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    encoded = ours.encode(talk(user(Image(image), "What is it?")), open_turn=True)
    expected = theirs(images=image, text="USER: <image>\nWhat is it? ASSISTANT:", return_tensors="np")
    assert encoded.input_ids.tolist() == expected["input_ids"][0].tolist()
    np.testing.assert_allclose(encoded.pixel_values, expected["pixel_values"], rtol=0, atol=1e-6)
    assert (ours.template.name, ours.context_length) == ("llava_hf", 77)


@pytest.mark.parametrize("size", [(64, 48), (50, 90), (30, 100), (33, 34)])
def test_a_stock_llava_next_folder_counts_as_transformers_processor_does(size: tuple[int, int], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlavaNextImageProcessorPil, LlavaNextProcessor

    points = [list(point) for point in ANYRES.pinpoints]
    ours = Processor.load(hugging_face_folder(tmp_path, ANYRES, model_type="llava_next", image_grid_pinpoints=points))
    theirs = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(**ANYRES.to_preprocessor_config()),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    encoded = ours.encode(talk(user(Image(image), "What is it?")), open_turn=True)
    expected = theirs(images=image, text="USER: <image>\nWhat is it? ASSISTANT:", return_tensors="np")
    assert encoded.input_ids.tolist() == expected["input_ids"][0].tolist()
    np.testing.assert_allclose(encoded.pixel_values, expected["pixel_values"][0], rtol=0, atol=1e-6)


def test_wrong_folders_and_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Processor.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        Processor.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 56}')
    with pytest.raises(CheckpointError, match="no image_token_index"):
        Processor.load(tmp_path)
    with pytest.raises(ImageError, match=r"nowhere\.png: no such file"):
        processor().encode(talk(user(Image(tmp_path / "nowhere.png"), "q")), open_turn=True)
    with pytest.raises(PromptError, match="unknown template 'vicunna_v1'; did you mean 'vicuna_v1'"):
        processor("vicunna_v1")


def test_a_picture_that_a_template_drops_is_an_error() -> None:
    said = talk(Message("system", (picture(9, 9),)), user("q"))
    with pytest.raises(PromptError, match="1 pictures, but template 'vicuna_v1' kept 0"):
        processor().encode(said, open_turn=True)
