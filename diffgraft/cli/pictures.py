"""Commands on pictures: grid."""

from pathlib import Path
from typing import Annotated

import typer

from diffgraft.cli.console import say


def grid(
    picture: Annotated[list[Path], typer.Argument(help="Pictures, in order.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new picture.")],
    columns: Annotated[int, typer.Option(min=0, help="Pictures in a row; 0: all.")] = 0,
) -> None:
    """Lay out pictures in one image, in cells of the first picture's size.

    For example: diffgraft grid pictures/*.png -o sheet.png --columns 4
    """
    from diffgraft.api import grid as sheet
    from diffgraft.errors import DiffgraftError
    from diffgraft.files import check_new
    from diffgraft.generation.plots import save_image

    check_new(output)
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise DiffgraftError(f"Invalid name {output}: must end in .png, .jpg or .webp.")
    each = columns or len(picture)
    starts = range(0, len(picture), each)
    rows = {f"{start + 1} to {min(start + each, len(picture))}": picture[start : start + each] for start in starts}
    say(save_image(sheet(rows if len(rows) > 1 else picture), output))


COMMANDS = (grid,)
