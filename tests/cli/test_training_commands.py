"""`llava recipe`, `llava data`, `llava train`: what they print, and how they refuse."""

import json
from pathlib import Path

import pytest
from PIL import Image

from llava.cli.main import main


def write_data(folder: Path, answer: str = "Red.") -> Path:
    Image.new("RGB", (8, 8), (200, 0, 0)).save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": answer}]
    path = folder / "mix.json"
    path.write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": turns}]))
    return path


def test_recipe_list_names_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "list"]) == 0
    assert "quickstart-align" in capsys.readouterr().out


def test_recipe_show_prints_the_file_or_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", "quickstart-align"]) == 0
    assert "# Stage 1" in capsys.readouterr().out
    assert main(["recipe", "show", "quickstart-align", "optim.epochs=7.5"]) == 0
    assert "epochs: 7.5" in capsys.readouterr().out


def test_recipe_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "none.yaml"], "none.yaml: no such recipe file"),
        (["train", "quickstart-aling"], "did you mean 'quickstart-align'"),
        (["train", "quickstart-align", "optim.learning_rates=1"], "did you mean 'learning_rate'"),
        (["train", "quickstart-align", "optim.learning_rate=fast"], "'fast'"),
        (["train", "quickstart-align", "data.files=[none.json]"], "none.json: cannot be read"),
        (["train", "quickstart-align", "--check", "data.files=[none.json]"], "none.json: cannot be read"),
        (["data", "check", "none.json"], "none.json: cannot be read"),
        (["data", "check", "none.json", "--images", "/nowhere"], "/nowhere: no such folder"),
        (["recipe", "show", "nothing"], "no shipped recipe"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # the folder one stands in may hold a finished quickstart
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err
    assert printed.err.count("\n") == 1


def test_the_out_option_is_a_folder_name_whatever_it_looks_like() -> None:
    from llava.cli.train import _as_yaml
    from llava.train.recipe import load_recipe

    for name in ("2024", "runs/it's", "a: b"):
        assert load_recipe("quickstart-align", [f"run.out={_as_yaml(name)}"]).run.out == name
