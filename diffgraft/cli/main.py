"""The command line. Heavy imports are inside of commands, so that ``--help`` is fast."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from diffgraft.cli import drawing, evaluating, files, pictures, preparing, sharing, studio
from diffgraft.cli.completion import method_words, recipe_words
from diffgraft.cli.console import say, shown_progress, warn
from diffgraft.cli.options import COMPONENTS, PREDICTION, PROGRESS, ZERO_SNR
from diffgraft.cli.renamed import Command
from diffgraft.terminal import printable

app = typer.Typer(
    name="diffgraft",
    help="Teach a frozen diffusion model something new with a few pictures and a few megabytes.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        from diffgraft import __version__

        say(f"diffgraft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before a command."""


def _check_recipe_first(command: str, recipe: str, settings: list[str]) -> None:
    """Raise DiffgraftError if the first word is a setting, because the recipe is missing or comes later."""
    from diffgraft.cli.console import key_values
    from diffgraft.errors import DiffgraftError

    if recipe.startswith("-"):  # an option of another tool: the error suggests the setting
        key_values([recipe, *settings])
    if "=" not in recipe or Path(recipe).is_file():
        return

    names = [word for word in settings if "=" not in word and not word.startswith("-")]
    others = [word for word in (recipe, *settings) if word not in names[:1]]
    fixed = " ".join([command, *(names[:1] or ["subject"]), *others])
    raise DiffgraftError(f"The recipe comes first: diffgraft {fixed} (`diffgraft recipes` lists them).")


RECIPE = typer.Argument(help="Name of a recipe (see `diffgraft recipes`), or a YAML file.", autocompletion=recipe_words)
_SETTINGS = {"ignore_unknown_options": True}
"""Unknown options are parsed as settings, so that errors can suggest the setting's name"""


@app.command(cls=Command, context_settings=_SETTINGS)
def train(
    recipe: Annotated[str, RECIPE] = "",
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings that override the recipe: key=value, nested keys with dots.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder; settings override its recipe.")
    ] = None,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="With --resume: continue although settings that affect steps differ."),
    ] = False,
    progress: Annotated[str, PROGRESS] = "auto",
) -> None:
    """Train an adapter.

    For example: diffgraft train subject images=my_dog/ subject=dog steps=300

    `diffgraft recipes NAME` lists all keys of a recipe, and `diffgraft methods NAME` a method's options.…
    """
    from diffgraft.cli.console import key_values
    from diffgraft.errors import DiffgraftError

    words = [word for word in (recipe, *(settings or [])) if word]
    if resume is None and not recipe:
        raise DiffgraftError("Name a recipe: `diffgraft recipes` lists them; or --resume the folder of a run.")
    if resume is None:
        _check_recipe_first("train", recipe, settings or [])
    elif recipe and not recipe.startswith("-") and "=" not in recipe:
        raise DiffgraftError(
            f"--resume takes no recipe, as the run in {resume} has one: leave {recipe!r} out of the command."
        )
    if allow_changes and resume is None:
        raise DiffgraftError("--allow-changes is for a resumed run: add --resume and the folder of the run.")
    given = key_values(words if resume is not None else words[1:])
    if "resume" in given:
        raise DiffgraftError(f"Resuming is an option, not a setting: --resume {given['resume']}")

    from diffgraft.trainers.run.train import train as run_training

    try:
        with shown_progress(progress):
            if resume is None and os.environ.get("RANK", "0") == "0":
                from diffgraft.trainers.planning.plan import plan_run
                from diffgraft.trainers.recipe.renamed import with_current_keys

                for line in plan_run(recipe, dict(given)).lines():
                    say(line)
                given = with_current_keys(given, warn=False)  # the plan has warned of former names
            run = run_training(recipe, resume=resume, allow_changes=allow_changes, **given)
    except KeyboardInterrupt as stop:
        if not stop.args:
            raise DiffgraftError("Interrupted before anything was written.") from None
        if (Path(str(stop)) / "adapter.safetensors").exists():
            raise DiffgraftError(
                f"Interrupted after the last step: the adapter in {stop} is whole, but pictures of it are missing. "
                f"Draw them with: diffgraft train --resume {stop}"
            ) from None
        raise DiffgraftError(f"Interrupted. Continue with: diffgraft train --resume {stop}") from None
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if run.was_finished:
        say(f"The run was finished already, after {run.steps} steps. Pass a larger steps= to continue it.")
    else:
        say(f"Trained {run.steps} steps.")
    say(f"The adapter: {run.adapter_file}")
    pictures = [file for file in (run.before_after, run.folder / "loss.png") if file.exists()]
    say(f"Look at {' and '.join(map(str, pictures))}")


@app.command(context_settings=_SETTINGS)
def plan(
    recipe: Annotated[str, RECIPE],
    settings: Annotated[list[str] | None, typer.Argument(help="Settings as for `train`: key=value.")] = None,
) -> None:
    """Predict a run without training: pictures, captions, sizes, steps, memory, time, and pitfalls.

    For example: diffgraft plan sd15-subject base=path/to/stable-diffusion-v1-5 images=my_dog/ subject=dog
    """
    _check_recipe_first("plan", recipe, settings or [])

    from diffgraft.cli.console import key_values
    from diffgraft.trainers.planning.plan import plan_run

    for line in plan_run(recipe, dict(key_values(settings or []))).lines():
        say(line)


@app.command()
def merge(
    adapter: Annotated[
        list[str], typer.Argument(help="FILE, FILE:0.8, or by part and block: FILE:unet=0.8,text_encoder=0.5,OUT04=0.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Path of the new checkpoint: a single file if it ends in .safetensors, else a folder.",
        ),
    ],
    into: Annotated[
        str, typer.Option(help="The base: `tiny`, a diffusers folder, a .safetensors checkpoint, or a hub id.")
    ] = "tiny",
    precision: Annotated[
        str,
        typer.Option(help="Dtype of the checkpoint: float32, float16 or bfloat16. [default: as in the base's files]"),
    ] = "",
    predicts: Annotated[str | None, PREDICTION] = None,
    zero_snr: Annotated[bool | None, ZERO_SNR] = None,
    components: Annotated[str | None, COMPONENTS] = None,
    device: Annotated[str, files.DEVICE] = "cpu",
) -> None:
    """Write a checkpoint: a base with adapters merged into its weights.

    For example: diffgraft merge runs/dog/adapter.safetensors:0.8 --into path/to/base -o dog-checkpoint
    """
    from diffgraft.cli.console import parse_strengths

    adapters = parse_strengths(adapter)

    from diffgraft.bases import load_base
    from diffgraft.bases.loading import load_options
    from diffgraft.devices import device_of, dtype_of
    from diffgraft.files import check_new
    from diffgraft.generation.merge_checkpoint import merge_checkpoint

    check_new(output)
    place = device_of(device)
    dtype = dtype_of(precision, place) if precision else None
    base = load_base(into, dtype, **load_options(predicts, zero_snr, components))
    say(merge_checkpoint(base.to(place), adapters, output))


for step in preparing.COMMANDS:
    app.command(cls=Command, rich_help_panel="Before training")(step)
app.command(context_settings=_SETTINGS)(sharing.replay)
for each in (*drawing.COMMANDS, *evaluating.COMMANDS, *pictures.COMMANDS):
    app.command()(each)
app.command()(studio.studio)
for command in files.COMMANDS:
    app.command(cls=Command, rich_help_panel="Adapter files")(command)


for share in (sharing.card, sharing.push):
    app.command(rich_help_panel="Adapter files")(share)


@app.command(rich_help_panel="What there is")
def methods(
    name: Annotated[
        str,
        typer.Argument(help="Show this method: the layers it adapts, and its options.", autocompletion=method_words),
    ] = "",
) -> None:
    """List the adapter methods, or the options of one."""
    if not name:
        from diffgraft.adapters.listing import method_summaries

        for known, summary in method_summaries().items():
            say(f"{known:20} {summary}")
        return

    from diffgraft.adapters.registry import get_method

    method = get_method(name)
    say(f"{method.name}: {method.summary}")
    options = method.read_options({})
    lacking = method.unsupported_under(options)
    if "layers" not in lacking:
        say(f"layers={method.layers_under(options)}")
    for reason in dict.fromkeys(lacking.values()):
        keys = ", ".join(key for key, why in lacking.items() if why == reason)
        say(f"without {keys}: {reason}")
    for key, field in method.options.model_fields.items():
        default = field.get_default(call_default_factory=True)
        say(f"options.{key}={'' if default is None else default}")
        say(f"    {' '.join((field.description or '').split())}")


@app.command(rich_help_panel="What there is")
def recipes(
    name: Annotated[
        str,
        typer.Argument(help="Show this recipe: all of its keys, with values and meaning.", autocompletion=recipe_words),
    ] = "",
) -> None:
    """List the recipes, or the keys of one."""
    from diffgraft.trainers.recipe.files import described_keys, recipe_names

    if name:
        for key, value, meaning in described_keys(name):
            say(f"{key}={value}")
            say(f"    {meaning}")
        return
    for known, summary in recipe_names().items():
        say(f"{known:16} {summary}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files of the demo.")] = Path(
        "diffgraft-demo"
    ),
) -> None:
    """Train on five pictures of a made-up subject, and draw it in three settings."""
    from diffgraft.demo.demo import run_demo
    from diffgraft.errors import DiffgraftError

    try:
        for line in run_demo(output):
            say(line)
    except KeyboardInterrupt:
        raise DiffgraftError("Interrupted. Another `diffgraft demo` starts afresh, in a folder of its own.") from None


def main() -> None:
    """Run the command line; a DiffgraftError is shown as one line, without a traceback."""
    from diffgraft.errors import DiffgraftError, wrap_system_errors

    warnings.showwarning = lambda message, *_, **__: warn(message)
    try:
        wrap_system_errors(app)()
    except DiffgraftError as error:
        typer.secho(f"error: {printable(error)}", fg="red", err=True)
    sys.exit(1)
