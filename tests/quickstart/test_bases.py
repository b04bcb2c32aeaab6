"""The shipped bases open everywhere, fit their recipe, and the recipe makes the same ones twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

from llava.errors import CheckpointError
from llava.quickstart import bases as bases_module
from llava.quickstart.bases import (
    RebuildProgress,
    RebuildSettings,
    load_bases,
    open_bases,
    rebuild_bases,
    recipe_hash,
    shipped_bases,
    strip_source,
)
from llava.quickstart.gates import list_short_gates, measure_bases
from llava.quickstart.language_start import LanguageSettings
from llava.quickstart.tower_pretraining import TowerSettings

CPU = torch.device("cpu")
TINY = RebuildSettings(
    tower=TowerSettings(hidden_size=32, num_layers=1, num_heads=1, num_scenes=8, num_steps=2, batch_size=4),
    language=LanguageSettings(
        hidden_size=192,
        intermediate_size=32,
        num_layers=2,
        num_heads=6,
        copy_steps_easy=1,
        copy_steps_hard=1,
        look_up_steps_each=1,
        question_steps=2,
        first_round_steps=1,
        second_round_steps=1,
        batch_rows=2,
        row_tokens=160,
    ),
    num_gate_scenes=4,
)


def test_the_shipped_bases_were_made_by_the_recipe_as_it_stands() -> None:
    """After a change to the recipe, run `llava quickstart --rebuild-bases` and ship what it makes."""
    assert shipped_bases().facts["recipe_hash"] == recipe_hash()


def test_the_shipped_bases_fit_into_twelve_megabytes() -> None:
    folder = shipped_bases().vision_tower.parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 12_000_000


def test_the_card_says_what_the_shipped_bases_can_do_and_what_they_cannot() -> None:
    bases = shipped_bases()
    assert bases.facts["short"] == list_short_gates(bases.facts["gates"])
    assert not [line for line in bases.facts["short"] if line.startswith("vision_tower")]
    card = (bases.vision_tower.parent / "MODEL_CARD.md").read_text()
    assert all(line in card for line in bases.facts["short"])
    assert bases.facts["recipe_hash"] in card
    assert "not with CLIP's contrastive one" in card


def test_the_shipped_files_still_do_what_their_card_says() -> None:
    bases = shipped_bases()
    tower, head, language, tokenizer = load_bases(bases.vision_tower.parent, device=CPU)
    measured = measure_bases(tower, head, language, tokenizer, device=CPU, num_scenes=60)
    for part, marks in bases.facts["gates"].items():
        for kind, value in marks.items():
            # four standard errors of a share over at most 60 answers
            assert abs(measured[part][kind] - value) < 4 * (max(value * (1 - value), 0.02) / 50) ** 0.5, (part, kind)


def test_the_shipped_bases_open_in_stock_transformers() -> None:
    bases = shipped_bases()
    tower, tower_report = CLIPVisionModel.from_pretrained(bases.vision_tower, output_loading_info=True)
    language, language_report = LlamaForCausalLM.from_pretrained(bases.language_model, output_loading_info=True)
    for report in (tower_report, language_report):
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(bases.language_model)
    assert len(tokenizer) == language.config.vocab_size
    assert tower.config.image_size == 64
    processor = AutoImageProcessor.from_pretrained(bases.vision_tower, backend="pil")
    assert processor.crop_size["height"] == 64


def test_a_folder_without_bases_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no bases\.json.*--rebuild-bases"):
        open_bases(tmp_path)


def test_a_rebuild_makes_the_same_bases_twice(tmp_path: Path) -> None:
    seen: list[RebuildProgress] = []
    first = rebuild_bases(tmp_path / "first", settings=TINY, progress=seen.append)
    second = rebuild_bases(tmp_path / "second", settings=TINY)
    for name in ("vision_tower", "language_model"):
        weights = [load_file(getattr(bases, name) / "model.safetensors") for bases in (first, second)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert first.facts == second.facts
    assert first.facts["recipe_hash"] == recipe_hash(TINY)
    other = rebuild_bases(tmp_path / "second", settings=TINY, seed=1)
    assert other.facts["seed"] == 1
    changed, same = (load_file(bases.vision_tower / "model.safetensors") for bases in (other, first))
    assert any(not torch.equal(changed[key], same[key]) for key in changed)


def test_a_stopped_rebuild_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rebuild_bases(tmp_path / "whole", settings=TINY)

    class Stopped(Exception):
        pass

    saved = bases_module.save_language_state

    def stop_after_saving(state: object, path: Path) -> None:
        saved(state, path)  # type: ignore[arg-type]
        raise Stopped

    monkeypatch.setattr("llava.quickstart.language_pretraining.SAVE_EVERY", 7)
    monkeypatch.setattr(bases_module, "save_language_state", stop_after_saving)
    with pytest.raises(Stopped):
        rebuild_bases(tmp_path / "stopped", settings=TINY)
    assert not (tmp_path / "stopped" / "bases.json").exists()
    monkeypatch.setattr(bases_module, "save_language_state", saved)
    again = rebuild_bases(tmp_path / "stopped", settings=TINY)
    for name in ("vision_tower", "language_model"):
        one, other = (load_file(getattr(b, name) / "model.safetensors") for b in (whole, again))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_recipe_hash_moves_with_settings_and_code_but_not_with_comments() -> None:
    assert recipe_hash(TINY) != recipe_hash()
    assert recipe_hash(replace(RebuildSettings(), num_gate_scenes=7)) == recipe_hash()
    source = 'def f(a, b):\n    """Say."""\n    return a + b  # why\n'
    reworded = "def f(\n    a,\n    b,\n):\n    '''Say more,\n    at length.'''\n    # a reason\n    return a + b\n"
    assert strip_source(source) == strip_source(reworded) == "deff(a,b):returna+b"
    assert strip_source("x = 'text'\n") == "x='text'"
    assert strip_source(source.replace("+", "-")) != strip_source(source)


def test_bases_json_holds_what_a_reader_needs() -> None:
    facts = json.loads((shipped_bases().vision_tower.parent / "bases.json").read_text())
    assert facts["vision_feature_layer"] == -1
    assert {"torch", "transformers", "python"} <= facts["versions"].keys()
    assert facts["gates"].keys() >= {"vision_tower", "vision_tower_second_renderer", "language_model"}
