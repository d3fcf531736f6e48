"""Commands before training: configurations of other tools, captions, masks and aesthetic embeddings."""

from pathlib import Path
from typing import Annotated

import typer

from diffgraft.cli.console import say


def import_config(
    file: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Configuration of sd-scripts, OneTrainer, ai-toolkit or LECO, and its dataset_config, "
            "concepts or prompts if in separate files.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The recipe. [default: the first file's name, in .yaml]")
    ] = None,
) -> None:
    """Convert a configuration of sd-scripts (TOML), its GUI, OneTrainer (JSON), LECO or ai-toolkit (YAML) to a recipe.

    A report lists every key: those that were converted, those without a counterpart, and those with default values.
    For example: diffgraft import-config config.toml dataset.toml -o dog.yaml
    """
    from diffgraft.imports import convert_config, write_recipe

    recipe = output or Path(f"{file[0].stem}.yaml")
    report = convert_config(file)
    write_recipe(report, recipe, " and ".join(one.name for one in file))
    for title, lines in report.sections():
        say(f"{title}:")
        for line in lines:
            say(f"  {line}")
    say(f"Written: {recipe}. Train with: diffgraft train {recipe}")


IMAGES = typer.Argument(help="Folder of pictures, flat or in kohya's layout (10_sks dog/).")


def caption(
    images: Annotated[Path, IMAGES],
    model: Annotated[
        str,
        typer.Option(help="Hub id or folder of a captioning model. [default: Salesforce/blip-image-captioning-large]"),
    ] = "",
    prefix: Annotated[str, typer.Option(help='Text before each caption, such as "sks dog,".')] = "",
    question: Annotated[
        str, typer.Option(help="Question put to a chat model; for other models, the beginning of the caption.")
    ] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of a caption.")] = 60,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing captions.")] = False,
) -> None:
    """Write a caption beside each picture (NAME.txt), by a transformers model (BLIP, GIT, LLaVA and others).

    For example: diffgraft caption my_dog/ --prefix "sks dog,"
    """
    from diffgraft.data.captioner import DEFAULT, Captioner, caption_files, pictures_with_paths

    pictures_with_paths(images)  # errors of the folder are raised before a model is downloaded
    written, kept = caption_files(
        images, Captioner(model or DEFAULT, question, max_tokens), prefix, overwrite=overwrite
    )
    _say(len(written), kept, "captions")


def mask(
    images: Annotated[Path, IMAGES],
    prompt: Annotated[str, typer.Option(help='What to mask, such as "the dog".')],
    model: Annotated[
        str,
        typer.Option(help="Hub id or folder of a CLIPSeg or segmentation model. [default: CIDAS/clipseg-rd64-refined]"),
    ] = "",
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Minimum probability of the mask, for CLIPSeg.")] = 0.3,
    grow: Annotated[int, typer.Option(min=0, help="Pixels by which masks are enlarged.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing masks.")] = False,
) -> None:
    """Write a mask beside each picture (NAME_mask.png), white where the picture shows what the prompt names.

    For example: diffgraft mask my_dog/ --prompt "the dog", and then: diffgraft train subject … masks.use=true
    """
    from diffgraft.data.captioner import pictures_with_paths
    from diffgraft.data.masker import DEFAULT, mask_files, open_masker

    pictures_with_paths(images)
    written, kept = mask_files(images, open_masker(prompt, model or DEFAULT, threshold), grow, overwrite=overwrite)
    _say(len(written), kept, "masks")


def aesthetic(
    source: Annotated[Path, typer.Argument(help="Folder of pictures, or a file with an aesthetic embedding.")],
    clip: Annotated[str, typer.Option(help="CLIP that embeds pictures: a hub id, a folder, or `tiny`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New file: .safetensors to draw with, or .pt for webui's extension.")
    ],
    base: Annotated[
        str | None, typer.Option(help="Base to draw with, if its text encoder is not the CLIP's own, such as `tiny`.")
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="With --base: text file of captions, one a line, to fit a projection on.")
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps of Adam on the text encoder, for each prompt.")] = 5,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-4,
) -> None:
    """Make an aesthetic embedding of pictures, towards which prompts are tuned when they are drawn.

    For example: diffgraft aesthetic my_drawings/ --clip openai/clip-vit-large-patch14 -o mine.safetensors, and then:
    diffgraft generate "a castle" -a mine.safetensors --base stable-diffusion-v1-5/stable-diffusion-v1-5
    """
    from diffgraft.adapters.methods.aesthetic import AestheticOptions
    from diffgraft.bases import load_base
    from diffgraft.bases.clip import load_clip
    from diffgraft.data.aesthetic import aesthetic_adapter, check_files, projection_for, read_captions
    from diffgraft.files import check_new
    from diffgraft.strict import validated

    check_new(output)
    check_files(source, output)
    options = validated(AestheticOptions, {"steps": steps, "learning_rate": lr}, "aesthetic")
    texts = [] if captions is None else read_captions(captions)
    loaded = None if base is None else load_base(base)
    model, projection = load_clip(clip), None
    if output.suffix != ".pt":
        projection = projection_for(model, loaded, texts)
        if projection.cosine is not None:
            say(f"projection fitted: cosine {projection.cosine:.3f} on captions that were left out of the fit")
    adapter = aesthetic_adapter(source, model, projection, options, loaded)
    say(adapter.save(output, "aesthetic" if output.suffix == ".pt" else "diffgraft"))


def predict(
    images: Annotated[Path, typer.Argument(help="Folder with one to five pictures of one subject.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new adapter file.")] = Path(
        "predicted.safetensors"
    ),
    base: Annotated[str, typer.Option(help="The base that the predictor is for.")] = "tiny",
    predictor: Annotated[Path | None, typer.Option(help="File of a predictor. [default: the one of `tiny`]")] = None,
    to: Annotated[str, typer.Option(help="Format of the file, as for `convert`.")] = "kohya",
) -> None:
    """Predict a LoRA from pictures of a subject in one pass of a small network, to draw with or to train further.

    For example: diffgraft predict my_toy/ -o toy.safetensors, and then:
    diffgraft train subject images=my_toy/ subject=toy init_from=toy.safetensors steps=133
    """
    from diffgraft.bases import load_base
    from diffgraft.files import check_new
    from diffgraft.predictor.predict import predict_adapter

    check_new(output)
    say(predict_adapter(images, load_base(base), predictor).save(output, to))


def _say(written: int, kept: int, what: str) -> None:
    note = f", {kept} existing kept (--overwrite replaces them)" if kept else ""
    say(f"{written} {what} written{note}")


COMMANDS = (import_config, caption, mask, aesthetic, predict)
