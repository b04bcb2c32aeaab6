"""Reading recipes: YAML with line numbers, `extends:` once, overrides, shipped names, and errors that say where.

    recipe = load_recipe("quickstart-align", ["optim.learning_rate=1e-3"])

A recipe may say `extends: other.yaml` once; the other one may not extend again, so two files tell the whole story. What
may stand in a recipe is in train/sections.py. Not covered: whether the files that a recipe names exist
(train/prepare.py looks before the run starts).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from llava.errors import RecipeError, name_nearest
from llava.train.sections import Recipe


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, or a shipped one by its name, with `section.key=value` overrides applied.

    Raises RecipeError naming file, line, value and the nearest key.
    """
    path = find_recipe(name)
    tree = _read_tree(path)
    tree = _extend(tree, path)
    for override in overrides:
        _override(tree, override)
    return check_recipe(tree.values, where=tree.where, source=str(name))


def check_recipe(
    values: Mapping[str, Any], *, where: Mapping[Path_, str] | None = None, source: str = "recipe"
) -> Recipe:
    """Values (as from YAML) to a Recipe. `where` maps a key's path to the "file:line" that set it."""
    try:
        return Recipe.model_validate(_numbers_where_wanted(values))
    except ValidationError as error:
        raise RecipeError(_explain(error, where or {}, source)) from None


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    folder = Path(str(resources.files("llava") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """The file that `name` means: a path, or the name of a shipped recipe."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(f"{path}: no such recipe file")
        return path
    shipped = shipped_recipes()
    if str(name) not in shipped:
        raise RecipeError(f"{name}: no recipe file and no shipped recipe; {name_nearest(str(name), shipped)}")
    return shipped[str(name)]


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "A recipe whose values this one changes."}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


# --- reading ---------------------------------------------------------------------------------------------------

Path_ = tuple[str, ...]
# What a recipe may come to when its aliases are written out: thousands of data files are well within.
_DEEPEST, _MOST_VALUES = 20, 100_000


@dataclass
class _Tree:
    """Values with the place that set each of them."""

    values: dict[str, Any]
    where: dict[Path_, str] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 2e-5 is a number (YAML 1.1 wants 2.0e-5) and on/off/yes/no stay words."""


_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$")
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in pairs if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _read_tree(path: Path) -> _Tree:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    tree = _Tree({})
    try:
        tree.values = _parse(text, lambda node: _note_recipe(node, path, tree.where))
    except _ParseError as error:
        raise RecipeError(f"{path}{error.line}: not YAML: {error}") from error
    return tree


class _ParseError(Exception):
    """What is wrong with a text, and ":line" where that is known."""

    def __init__(self, problem: str, *, line: str = "") -> None:
        super().__init__(problem)
        self.line = line


def _parse(text: str, look: Callable[[yaml.Node | None], object]) -> Any:
    """The value of one YAML document; `look` sees it before anything is built from it. Raises _ParseError."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            look(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise _ParseError(problem, line=line) from error
    except RecursionError:
        raise _ParseError("nested too deeply") from None
    except ValueError as error:  # what looks like a date and is none, a number of thousands of digits
        raise _ParseError(str(error)) from error


def _note_recipe(node: yaml.Node | None, path: Path, where: dict[Path_, str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}: a recipe is a mapping with the sections {', '.join(Recipe.model_fields)}")
    _note_lines(node, (), path, where)


def _note_lines(node: yaml.Node | None, prefix: Path_, path: Path, where: dict[Path_, str]) -> None:
    """Record the line of every key, and refuse a key that stands twice (YAML itself keeps the last in silence).

    Aliases are followed, so a few lines may stand for billions of values, or for themselves: both are refused here.
    """
    if node is None:
        return
    if len(prefix) > _DEEPEST or len(where) > _MOST_VALUES:
        what = f"nested deeper than {_DEEPEST}" if len(prefix) > _DEEPEST else f"more than {_MOST_VALUES:,} values"
        raise RecipeError(f"{path}:{node.start_mark.line + 1}: {what}; a recipe needs no such thing")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            where[(*prefix, str(index))] = f"{path}:{item.start_mark.line + 1}"
            _note_lines(item, (*prefix, str(index)), path, where)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*prefix, str(key.value))
        line = f"{path}:{key.start_mark.line + 1}"
        if here in where:
            raise RecipeError(f"{line}: {'.'.join(here)} is set twice (first at {where[here]})")
        where[here] = line
        _note_lines(value, here, path, where)


def _extend(tree: _Tree, path: Path) -> _Tree:
    """Lay the tree over the recipe that it extends, if it does."""
    if "extends" not in tree.values:
        return tree
    name = tree.values.pop("extends")
    line = tree.where[("extends",)]
    if not isinstance(name, str):
        raise RecipeError(f"{line}: extends: {name!r} is not the name of a recipe")
    beside = path.parent / name
    parent_path = beside if beside.is_file() else find_recipe(name)
    parent = _read_tree(parent_path)
    if "extends" in parent.values:
        raise RecipeError(
            f"{line}: {parent_path} extends another recipe itself; extend once only, so that two files tell the whole"
        )
    return _Tree(_merge(parent.values, tree.values), {**parent.where, **tree.where})


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _override(tree: _Tree, text: str) -> None:
    """Apply one `section.key=value`; the value is read as YAML."""
    name, equals, raw = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise RecipeError(f"{text!r}: an override is section.key=value, for example optim.learning_rate=1e-3")
    try:
        value = _parse(raw, lambda node: _note_lines(node, (), Path(name), {}))
    except _ParseError as error:
        raise RecipeError(f"{text!r}: the value is not YAML ({error}); put quotes around it") from error
    values = tree.values
    for key in keys[:-1]:
        child = values.get(key)
        if not isinstance(child, dict):
            child = {}
            values[key] = child
        values = child
    values[keys[-1]] = value
    tree.where[keys] = f"override {text!r}"


# --- explaining ------------------------------------------------------------------------------------------------


def _numbers_where_wanted(values: Any) -> Any:
    """YAML mappings with string keys only; other keys (numbers, null) become text, to be refused by name."""
    if isinstance(values, Mapping):
        return {
            str(key) if isinstance(key, Hashable) else repr(key): _numbers_where_wanted(v) for key, v in values.items()
        }
    return values


def _explain(error: ValidationError, where: Mapping[Path_, str], source: str) -> str:
    """One line for the first problem, with the count of the others."""
    problems = error.errors(include_url=False)
    # An unknown key often explains a missing one, so it comes first.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    path = tuple(str(part) for part in first["loc"])
    place = _place(path, where, source)
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        text = f"{place}: unknown key {name}; {name_nearest(path[-1], _known_keys(path[:-1]))}"
    elif first["type"] == "missing":
        text = f"{place}: {name} is missing" + _describe(path)
    elif first["type"] == "value_error":
        text = f"{place}: {name or 'recipe'}: {first['ctx']['error']}"
    else:
        text = f"{place}: {name}: {first['input']!r}: {_lower_first(first['msg'])}"
    if first["type"] == "list_type" and isinstance(first["input"], str):
        text += f"; write [{first['input']}]"
    others = len(problems) - 1
    return text + (f" (and {others} more)" if others else "")


def _place(path: Path_, where: Mapping[Path_, str], source: str) -> str:
    """The place that set the key, or the nearest section above it."""
    for length in range(len(path), 0, -1):
        if path[:length] in where:
            return where[path[:length]]
    return source


def _known_keys(path: Path_) -> Iterable[str]:
    section: type[BaseModel] = Recipe
    for part in path:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ()
        section = annotation
    return section.model_fields


def _describe(path: Path_) -> str:
    section: type[BaseModel] = Recipe
    for part in path[:-1]:
        annotation = section.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ""
        section = annotation
    description = section.model_fields[path[-1]].description if path[-1] in section.model_fields else None
    return f" ({description})" if description else ""


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
