from __future__ import annotations

import re
from typing import get_args

import pytest

from llava.checkpoint.known_models import KNOWN_MODELS, SOURCES, KnownModel
from llava.checkpoint.load import FORMATS
from llava.model.config import ImageMode
from llava.prompt.templates import TEMPLATES
from llava.train.recipe import load_recipe, shipped_recipes


@pytest.mark.parametrize("model", KNOWN_MODELS, ids=lambda model: model.name)
def test_a_row_names_what_exists_here(model: KnownModel) -> None:
    assert model.template in TEMPLATES
    assert model.image_mode in get_args(ImageMode)
    assert model.layout in FORMATS
    assert model.source in SOURCES
    assert re.fullmatch(r"[\d.]+B", model.size)
    assert model.size.lower().replace("3.8b", "mini") in f"{model.name} {model.language_model}".lower()
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.name) or not model.hub
    said = re.findall(r"--template (\S+)", model.needs)
    assert said in ([], [model.template])
    assert set(re.findall(r"--[\w-]+", model.needs)) <= {"--template", "--base"}


def test_no_model_is_named_twice_and_every_source_has_some() -> None:
    names = [model.name for model in KNOWN_MODELS]
    assert len(names) == len(set(names))
    assert {model.source for model in KNOWN_MODELS} == set(SOURCES)


def test_tiles_are_what_makes_1_6() -> None:
    for model in KNOWN_MODELS:
        assert (model.image_mode == "anyres") == (model.version in ("1.6", "OneVision")), model


def test_models_that_recipes_start_from_are_known() -> None:
    paths = {load_recipe(name).model.path or "" for name in shipped_recipes()}
    published = {path for path in paths if path.startswith("liuhaotian/") and "pretrain" not in path}
    assert published
    assert published <= {model.name for model in KNOWN_MODELS}
