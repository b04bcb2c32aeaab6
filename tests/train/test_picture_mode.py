"""Another image mode for an existing model: one tile to another cut of it, one tile to several."""

import json
from pathlib import Path

import PIL.Image
import pytest
import torch

from llava.checkpoint.huggingface import save
from llava.checkpoint.load import Loaded, build, load
from llava.errors import RecipeError
from llava.prompt.conversation import Conversation, Image, Message, Text
from llava.train.picture_mode import with_image_mode
from tests.train.tiny_training import write_tiny_bases

CANVASES = [[32, 16], [16, 32], [32, 32]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    write_tiny_bases(folder)
    return folder


def cropping(bases: Path) -> Loaded:
    return build(bases / "language_model", bases / "vision_tower", image_mode="crop", device="cpu", dtype="float32")


def features_of(loaded: Loaded, picture: PIL.Image.Image) -> tuple[int, torch.Tensor]:
    """How many placeholders the processor writes for a picture, and the features that the model makes of it."""
    asked = Conversation((Message("user", (Image(picture), Text("What?"))),))
    encoded = loaded.processor.encode(asked, open_turn=True)
    (features,) = loaded.model.encode_images(
        torch.from_numpy(encoded.pixel_values),
        image_sizes=encoded.image_sizes,
        tiles_per_image=encoded.tiles_per_image,
    )
    return int((encoded.input_ids == loaded.processor.image_token_id).sum()), features


def test_tiles_are_counted_encoded_and_saved(bases: Path, tmp_path: Path) -> None:
    before = cropping(bases)
    projector = before.model.multi_modal_projector.state_dict()
    tiled = with_image_mode(before, "anyres", pinpoints=CANVASES)
    picture = PIL.Image.new("RGB", (40, 20), (200, 10, 10))
    count, features = features_of(tiled, picture)
    assert count == len(features) > 4
    assert tiled.model.image_newline is not None
    assert all(
        torch.equal(value, projector[name]) for name, value in before.model.multi_modal_projector.state_dict().items()
    )
    save(tiled.model, tiled.processor, tmp_path / "saved")
    again = load(tmp_path / "saved", device="cpu", dtype="float32")
    assert again.model.config.image_grid_pinpoints == tuple(map(tuple, CANVASES))
    count_again, features_again = features_of(again, picture)
    assert count_again == count
    torch.testing.assert_close(features_again, features)


def test_a_cropping_model_can_pad_instead(bases: Path) -> None:
    padding = with_image_mode(cropping(bases), "pad")
    assert (padding.model.config.image_mode, padding.processor.image_settings.mode) == ("pad", "pad")
    assert padding.model.image_newline is None
    assert features_of(padding, PIL.Image.new("RGB", (40, 20)))[0] == 4


@pytest.mark.parametrize(
    ("mode", "pinpoints", "says"),
    [
        ("anyres", None, "needs model.image_grid_pinpoints"),
        ("anyres", [[32, 16], [20, 16]], r"\[20, 16\]: not whole tiles of the tower's 16 pixels"),
    ],
)
def test_canvases_that_do_not_fit_are_refused(
    bases: Path, mode: str, pinpoints: list[list[int]] | None, says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        with_image_mode(cropping(bases), mode, pinpoints=pinpoints)  # type: ignore[arg-type]


def test_a_model_of_tiles_stays_one(bases: Path, tmp_path: Path) -> None:
    tiled = with_image_mode(cropping(bases), "anyres", pinpoints=CANVASES)
    save(tiled.model, tiled.processor, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "llava_next"
    with pytest.raises(RecipeError, match="this model looks at tiles"):
        with_image_mode(tiled, "pad")
