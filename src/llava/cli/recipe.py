"""`llava recipe list|show|schema`: what can be trained, and what every key means."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="List, show and explain training recipes.")


@app.command("list")
def list_recipes() -> None:
    """Name the recipes that come with llava, family by family."""
    from llava.train.catalogue import by_family

    families = list(by_family())
    width = max(len(entry.name) for _, entries in families for entry in entries)
    for number, (heading, entries) in enumerate(families):
        typer.echo(("\n" if number else "") + heading)
        for entry in entries:
            typer.echo(f"  {entry.name:<{width}}  {entry.recipe.description}")
    typer.echo("\nNext: llava recipe show NAME, then llava train NAME data.files=[mine.json] --out runs/mine")


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE")] = None,
    resolved: Annotated[bool, typer.Option(help="Every key with its value, instead of the file as written.")] = False,
) -> None:
    """Print a recipe: as written, with its comments, or resolved."""
    from llava.train.recipe import find_recipe, load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if resolved or overrides:
        typer.echo(loaded.as_yaml(), nl=False)
    else:
        typer.echo(find_recipe(recipe).read_text(encoding="utf-8"), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for an editor's completion and checks."""
    import json

    from llava.train.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))
