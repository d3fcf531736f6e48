"""Commands before training: configurations of other tools."""

from pathlib import Path
from typing import Annotated

import typer


def import_config(
    file: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="A configuration of sd-scripts or OneTrainer, and its dataset_config or concepts, if they are apart.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The recipe. [default: the first file's name, in .yaml]")
    ] = None,
) -> None:
    """Make a recipe of a configuration of kohya's sd-scripts (TOML), its GUI or OneTrainer (JSON).

    Every key of it is told of: what was taken, what has no counterpart, and what only says the default.
    For example: diffgraft import-config config.toml dataset.toml -o dog.yaml
    """
    from diffgraft.trainers.imports import convert, write_recipe

    recipe = output or Path(f"{file[0].stem}.yaml")
    account = convert(file)
    write_recipe(account, recipe, " and ".join(one.name for one in file))
    for title, lines in account.report():
        typer.echo(f"{title}:")
        for line in lines:
            typer.echo(f"  {line}")
    typer.echo(f"Written: {recipe}. Train with: diffgraft train {recipe}")


COMMANDS = (import_config,)
