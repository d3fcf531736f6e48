"""Commands on finished adapters: replay, card, push."""

from pathlib import Path
from typing import Annotated

import typer

from diffgraft.cli.console import say, shown_progress
from diffgraft.cli.options import PROGRESS

SOURCE = typer.Argument(metavar="RUN|ADAPTER", help="The folder of a run, or an adapter file.")
PICTURE = typer.Option(
    help="Picture for the card, whose prompt is read from its file; again for more. [default: a run's newest samples]"
)
BASE_MODEL = typer.Option(help="Hub id of the base, OWNER/NAME. [default: that of the recipe]")


def replay(
    adapter: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="An adapter file that diffgraft has trained.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings as for `train`, images=FOLDER among them.")
    ] = None,
    progress: Annotated[str, PROGRESS] = "auto",
) -> None:
    """Train again by the recipe in an adapter's header.

    With the same pictures, base, versions and machine, the new file has the same bytes.

    For example: diffgraft replay dog.safetensors images=my_dog/
    """
    from diffgraft.cli.console import key_values

    given = key_values(settings or [])

    from diffgraft.trainers.run.folder import adapter_file
    from diffgraft.trainers.run.replay import replay as train_again

    with shown_progress(progress):
        run = train_again(adapter, **given)
    say(f"The adapter: {run.adapter_file}")
    known = adapter_file(adapter)
    if known.read_bytes() == run.adapter_file.read_bytes():
        say(f"It has the same bytes as {known}.")
    else:
        say(f"It differs from {known}: diffgraft diff {known} {run.adapter_file} tells where.")


def card(
    source: Annotated[Path, SOURCE],
    picture: Annotated[list[Path] | None, PICTURE] = None,
    base_model: Annotated[str, BASE_MODEL] = "",
    title: Annotated[str, typer.Option(help="Title. [default: the name of the run or the file]")] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the card. [default: that of the adapter]")
    ] = None,
) -> None:
    """Write the model card of an adapter, README.md, as the Hugging Face hub shows it.

    For example: diffgraft card runs/dog
    """
    from diffgraft.model_card import card as write_card

    say(write_card(source, pictures=picture or (), base_model=base_model, title=title, output=output or ""))


def push(
    source: Annotated[Path, SOURCE],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hugging Face hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public. [default: private]")] = False,
    picture: Annotated[list[Path] | None, PICTURE] = None,
    base_model: Annotated[str, BASE_MODEL] = "",
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload adapter",
    progress: Annotated[str, PROGRESS] = "auto",
) -> None:
    """Upload an adapter with its card and pictures to the Hugging Face hub, privately by default.

    The token is that of `hf auth login`, or in HF_TOKEN. README.md beside the adapter is the card if it exists.

    For example: diffgraft push runs/dog me/dog-lora
    """
    from diffgraft.hub_upload import push as upload

    with shown_progress(progress):
        say(upload(source, name, public=public, pictures=picture or (), base_model=base_model, message=message))
