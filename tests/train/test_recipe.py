"""Recipes: read, extended, overridden, and refused with the line at fault."""

from itertools import pairwise
from pathlib import Path

import pytest

from llava.errors import RecipeError
from llava.train.recipe import check_recipe, load_recipe, recipe_schema, shipped_recipes
from llava.train.sections import Recipe

MINIMAL = """\
model:
  path: base
data:
  files: [mix.json]
optim:
  learning_rate: 2e-5
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_learning_rate_without_a_dot_is_a_number(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, MINIMAL)).optim.learning_rate == 2e-5


def test_an_override_is_read_as_yaml_and_wins(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, MINIMAL), ["optim.learning_rate=1e-3", "data.files=[a.json, b.json]", "run.out=runs/x"]
    )
    assert recipe.optim.learning_rate == 1e-3
    assert recipe.data.files == ["a.json", "b.json"]
    assert recipe.run.out == "runs/x"


def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "  epoch: 3\n")
    with pytest.raises(RecipeError, match=rf"{path}:7: unknown key optim.epoch; did you mean 'epochs'\?"):
        load_recipe(path)


def test_an_unknown_section_names_the_sections(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"mine.yaml:7: unknown key optimizer; did you mean 'optim'"):
        load_recipe(write(tmp_path, MINIMAL + "optimizer:\n  lr: 1\n"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "optim.learning_rate=fast",
            "override 'optim.learning_rate=fast': optim.learning_rate: 'fast': input should be",
        ),
        ("optim.learning_rate=-1.0", "greater than 0"),
        ("optim.epochs='3'", "optim.epochs: '3'"),
        ("run.keep=0", "run.keep: 0"),
        ("tune.projector=thawed", "tune.projector: 'thawed'"),
        ("data.files=mix.json", "data.files: 'mix.json': input should be a valid list; write [mix.json]"),
        ("optim.learning_rat=1", "did you mean 'learning_rate'"),
        ("optim", "an override is section.key=value"),
        ("=1", "an override is section.key=value"),
        ("run.out=[", "the value is not YAML"),
        ("run=3", "run: 3"),
        ("model.language_model=vicuna", "is a whole LLaVA"),
        ("tune.projector=frozen", "every part is frozen"),
    ],
)
def test_a_wrong_value_is_named_with_its_origin(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, MINIMAL), [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_value_says_what_it_is_for(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"mine.yaml:5: optim.learning_rate is missing \(Peak learning rate"):
        load_recipe(write(tmp_path, MINIMAL.replace("learning_rate: 2e-5", "epochs: 1.0")))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"mine.yaml:7: optim.learning_rate is set twice \(first at .*:6\)"):
        load_recipe(write(tmp_path, MINIMAL + "  learning_rate: 1e-3\n"))


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"mine.yaml:2: not YAML"):
        load_recipe(write(tmp_path, "model:\n\tpath: x\n"))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + below] * 9)}]\n" for below, name in pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: &a {path: *a}", "nested deeper than 20"),
        (BOMB, "more than 100,000 values"),
        ("model: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("model: {path: 'a\x01b'}", "not YAML: .*special characters are not allowed"),
        ("optim: {learning_rate: 2024-99-99}", "not YAML: month must be in"),
        (f"optim: {{learning_rate: {'1' * 5000}}}", "not YAML: .*limit"),
    ],
)
def test_yaml_that_explodes_or_that_python_cannot_hold_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=says):
        load_recipe(path)


@pytest.mark.parametrize("value", ["2024-99-99", "&a [*a]", "1" * 5000, "[" * 3000, "'a\x01'"])
def test_an_override_that_python_cannot_hold_is_one_line(tmp_path: Path, value: str) -> None:
    with pytest.raises(RecipeError, match=r"not YAML|nested"):
        load_recipe(write(tmp_path, MINIMAL), [f"optim.learning_rate={value}"])


def test_a_missing_file_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="did you mean 'quickstart-align'"):
        load_recipe("quickstart-alin")


def test_a_recipe_extends_another_once(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "  epochs: 2.0\n", "parent.yaml")
    child = write(tmp_path, "extends: parent.yaml\noptim:\n  epochs: 3.0\n", "child.yaml")
    recipe = load_recipe(child)
    assert (recipe.optim.epochs, recipe.optim.learning_rate) == (3.0, 2e-5)
    grandchild = write(tmp_path, "extends: child.yaml\n", "grandchild.yaml")
    with pytest.raises(RecipeError, match="extend once only"):
        load_recipe(grandchild)


def test_an_error_in_the_extended_recipe_names_that_file(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "  epoch: 2\n", "parent.yaml")
    with pytest.raises(RecipeError, match=r"parent.yaml:7"):
        load_recipe(write(tmp_path, "extends: parent.yaml\n", "child.yaml"))


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert load_recipe(write(tmp_path, recipe.as_yaml(), "again.yaml")) == recipe


def test_words_that_yaml_1_1_takes_for_booleans_stay_words(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, MINIMAL.replace("path: base", "path: on"))).model.path == "on"


def test_plain_values_make_a_recipe() -> None:
    recipe = check_recipe({"model": {"path": "x"}, "data": {"files": ["a"]}, "optim": {"learning_rate": 1}})
    assert isinstance(recipe, Recipe)
    assert recipe.optim.learning_rate == 1.0


def test_the_schema_refuses_unknown_keys_and_allows_extends() -> None:
    schema = recipe_schema()
    assert schema["additionalProperties"] is False
    assert "extends" in schema["properties"]
    assert set(schema["properties"]) >= {"model", "data", "tune", "optim", "run"}


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_parses_and_describes_itself(name: str) -> None:
    assert load_recipe(name).description
