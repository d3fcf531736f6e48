"""A training run from beginning to end: recipe in, a folder with an adapter and pictures out."""

import hashlib
import math
import re
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from math import lcm
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Attached, Spec, choose_layers, get_method
from diffgraft.bases import Base, load_base
from diffgraft.bases.sd1 import lost_words
from diffgraft.data.class_images import class_images
from diffgraft.data.latents import encode
from diffgraft.data.pictures import Picture, read_folder
from diffgraft.errors import DiffgraftError
from diffgraft.files import alone_in
from diffgraft.generation.generate import Settings, generate
from diffgraft.generation.graft import graft
from diffgraft.generation.plots import grid, save_image, save_loss_plot
from diffgraft.trainers.captioned import Captioned
from diffgraft.trainers.denoising import Denoiser, Noising
from diffgraft.trainers.dreambooth import DreamBooth
from diffgraft.trainers.examples import Examples, data_digest, generator
from diffgraft.trainers.loop import Objective, fit, new_accelerator, read_record
from diffgraft.trainers.recipe import Recipe, StyleRecipe
from diffgraft.trainers.recipe_files import load_recipe, meaningless, save_recipe
from diffgraft.trainers.settings import Prior
from diffgraft.trainers.templates import TEMPLATES

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLE_SEEDS = 50_000
"""Samples count their seeds from here, so that none is a class image that training has seen."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    recipe: Recipe
    metrics: Sequence[dict[str, float]]
    """One entry a step: step, lr, loss and the objective's terms"""

    @property
    def adapter_file(self) -> Path:
        return self.folder / "adapter.safetensors"

    @property
    def before_after(self) -> Path:
        """A grid of the same prompts and seeds without and with the adapter."""
        return self.folder / "before-after.png"

    @property
    def adapter(self) -> Adapter:
        """What was learnt, read from its file."""
        return load_adapter(self.adapter_file)


def train(
    recipe: str | Path = "subject",
    /,
    *,
    base: str | Path | Base = "",
    resume: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Train an adapter and leave a folder with everything about it.

    Args:
        recipe: name of a recipe (``diffgraft recipes`` lists them), or the path of a YAML.
        base: a base, or what `load_base` takes; the recipe's own where it is not given. A `Base` keeps the precision
            of its weights, and after training has the very same bits.
        resume: the folder of an earlier run to go on with; the recipe is then the one that stands there.
        settings: what differs from the recipe, by key; nested keys as ``prior={"weight": 0.5}``.

    Returns:
        The run: ``adapter.safetensors``, ``recipe.yaml``, ``metrics.jsonl``, ``loss.png``, ``before-after.png`` and
        ``checkpoints/`` lie in its folder.

    Raises:
        DiffgraftError: recipe, pictures or base will not do; nothing has been trained then.
    """
    if resume is not None:
        other = {"base": base} if isinstance(base, str | Path) and str(base) else {}
        plan, folder = _resumed(Path(resume).expanduser(), {**settings, **other})
    else:
        named = base.name if isinstance(base, Base) else str(base)
        plan, folder = _fresh(recipe, {**settings, "base": named} if named else settings)
    get_method(plan.method).read_options(plan.options)
    pictures = read_folder(plan.images)
    accelerator = new_accelerator(plan)
    held = _held(plan, base)
    _check_resolution(plan, held)
    was_on = held.device
    held.to(accelerator.device)
    try:
        _attach(plan, held).detach()  # what cannot be is refused before anything is drawn or written
        _noising(plan, held)
        with alone_in(folder) if accelerator.is_main_process else nullcontext():
            if accelerator.is_main_process:
                save_recipe(plan, folder / "recipe.yaml")
            run = Run(folder, plan, read_record(folder))
            if not run.adapter_file.exists():
                run = _learn(plan, held, folder, accelerator, pictures)
            if accelerator.is_main_process and not run.before_after.exists():
                save_loss_plot(_curves(run.metrics), folder / "loss.png")
                save_image(_before_after(plan, held, run.adapter), run.before_after)
            accelerator.wait_for_everyone()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(folder) from None  # whoever catches it can say what to resume
    finally:
        held.to(was_on)
    return run


def _fresh(recipe: str | Path, settings: dict[str, Any]) -> tuple[Recipe, Path]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    plan = load_recipe(recipe, {key: str(value) if isinstance(value, Path) else value for key, value in flat.items()})
    if not plan.images:
        raise DiffgraftError(f"The recipe {recipe} needs pictures: add images=FOLDER (JPEG, PNG or WebP files).")
    folder = Path(plan.output or f"runs/{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    if (folder / "adapter.safetensors").exists():
        raise DiffgraftError(
            f"{folder} already holds a finished run. Choose another output=…, or remove it to train again."
        )
    if (folder / "recipe.yaml").exists():
        raise DiffgraftError(
            f"{folder} holds an unfinished run. Go on with it: --resume {folder}, or choose another output=…"
        )
    local = Path(plan.base).expanduser()
    is_path = plan.base != "tiny" and local.exists()
    places = {"images": str(Path(plan.images).expanduser().resolve()), "output": str(folder)}
    return plan.model_copy(update={**places, "base": str(local.resolve()) if is_path else plan.base}), folder


def _resumed(folder: Path, settings: dict[str, Any]) -> tuple[Recipe, Path]:
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise DiffgraftError(
            f"There is no run to resume in {folder}: it holds no recipe.yaml. Give the folder of a run."
        )
    if settings:
        raise DiffgraftError(
            f"A resumed run keeps its recipe, so {', '.join(settings)} cannot be set. Start a new run for that."
        )
    return load_recipe(path, {"output": str(folder)}), folder


def _held(plan: Recipe, base: str | Path | Base) -> Base:
    """The base that was given, or the recipe's."""
    if not isinstance(base, Base):
        more = {"prediction_type": plan.prediction_type, "zero_snr": plan.zero_snr}
        return load_base(plan.base, _DTYPES[plan.precision], **more)  # type: ignore[arg-type]
    if plan.prediction_type not in (None, base.prediction_type) or plan.zero_snr not in (None, base.zero_snr):
        raise DiffgraftError(
            f"The base that was given is {base!r}; the recipe has prediction_type={plan.prediction_type} and "
            f"zero_snr={plan.zero_snr}. Load the base with them: load_base(…, prediction_type=…, zero_snr=…)."
        )
    return base


def _check_resolution(plan: Recipe, base: Base) -> None:
    side, step = plan.resolution or base.resolution, lcm(base.factor, 8)
    if side % step:
        better = max(step, round(side / step) * step)
        raise DiffgraftError(f"resolution={side} is no multiple of {step}, which this base needs. Take {better}.")


def _learn(plan: Recipe, base: Base, folder: Path, accelerator: Any, pictures: Sequence[Picture]) -> Run:
    """Attach, train, detach, export: the base is afterwards as it was."""
    prompts = _prompts(plan, base, pictures)
    with accelerator.main_process_first():  # the others find the class images drawn
        objective = _objective(plan, base, pictures, prompts)
    digest = data_digest(pictures, prompts)
    side = plan.resolution or base.resolution
    live: Attached | None = None

    def sample(step: int) -> None:
        base.unet.eval()
        assert live is not None
        live.eval()
        sheet = grid(_draw(plan, base, f"samples at step {step}", count=2))
        save_image(sheet, folder / "samples" / f"step-{step:06d}.png")
        base.unet.train(plan.gradient_checkpointing)
        live.train()

    try:
        live = _attach(plan, base)
        if plan.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
            base.unet.train()  # it recomputes in training mode only; these UNets have no dropout
        denoiser = Denoiser(base, (side, side), live, plan.text_encoder or live.changes_text)
        identity = hashlib.sha256(f"{base.hash} {digest} {plan.essence()}".encode()).hexdigest()
        metrics = fit(plan, folder, identity, accelerator, denoiser, live, objective, sample)
        adapter = live.adapter(_header(plan, base, digest))
    finally:
        if live is not None:
            live.detach()
        base.unet.disable_gradient_checkpointing()
        base.unet.eval()
    run = Run(folder, plan, metrics)
    if accelerator.is_main_process:
        adapter.save(run.adapter_file)
    return run


def _noising(plan: Recipe, base: Base) -> Noising:
    return Noising(base, plan.noise, plan.timesteps, plan.loss)


def _attach(plan: Recipe, base: Base) -> Attached:
    method = get_method(plan.method)
    options, words = method.read_options(plan.options), (plan.trigger, getattr(plan, "subject", ""))
    return method.attach(base, Spec(_targets(plan, base), plan.rank, plan.scale_alpha(), plan.seed, options, *words))


def _prompts(plan: Recipe, base: Base, pictures: Sequence[Picture]) -> list[list[str]]:
    """The prompts that each picture is shown under; what a person may not have meant is said in a warning."""
    listed = []
    for picture in pictures:
        caption = picture.caption if plan.captions else None
        if isinstance(plan, StyleRecipe) and caption:
            said = re.search(rf"(?<!\w){re.escape(plan.trigger)}(?!\w)", caption)
            prompts = [caption if said else plan.fill(plan.caption).replace("{caption}", caption)]
        elif caption is None and plan.templates != "none":
            prompts = [plan.fill(template) for template in TEMPLATES[plan.templates]]
        else:
            prompts = [caption or plan.fill(plan.prompt)]
        for prompt in prompts:
            if lost := lost_words(base.tokenizer, prompt):
                what = f"The prompt of {picture.path.name} is too long; the base never sees: {lost}"
                warnings.warn(what, stacklevel=4)
            if plan.trigger not in prompt:
                warnings.warn(f"The caption of {picture.path.name} lacks the trigger {plan.trigger!r}.", stacklevel=4)
        listed.append(prompts)
    return listed


def _objective(plan: Recipe, base: Base, pictures: Sequence[Picture], prompts: list[list[str]]) -> Objective:
    side = plan.resolution or base.resolution

    def examples(images: Sequence[Image.Image], texts: list[list[str]], names: list[str], title: str) -> Examples:
        """Each picture under each of its prompts."""
        if plan.flip:
            images = [*images, *(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images)]
            texts, names = texts + texts, names + names
        shown = [row for row, listed in enumerate(texts) for _ in listed]
        prompts = [text for listed in texts for text in listed]
        return Examples(encode(base, images, side, title).take(shown), prompts, [names[row] for row in shown])

    noising = _noising(plan, base)
    files = [picture.path.name for picture in pictures]
    ours = examples([picture.image for picture in pictures], prompts, files, "encoding pictures")
    texts = plan.class_prompts([picture.caption if plan.captions else None for picture in pictures])
    prior: Prior | None = getattr(plan, "prior", None)
    if not texts or prior is None or prior.weight == 0 or "prior" in meaningless(plan):
        return Captioned(ours, noising, plan.seed)
    if len(texts) > prior.images:  # each is drawn at least once
        texts = [
            texts[row] for row in sorted(torch.randperm(len(texts), generator=generator(plan.seed))[: prior.images])
        ]
    each = math.ceil(prior.images / len(texts))
    drawn = class_images(base, texts, each, Settings(size=(side, side)), plan.seed)
    names = [f"class image {number}" for number in range(len(drawn))]
    kept = examples([image for _, image in drawn], [[text] for text, _ in drawn], names, "encoding class images")
    return DreamBooth(ours, kept, prior.weight, noising, plan.seed)


def _targets(plan: Recipe, base: Base) -> dict[str, list[str]]:
    """Part of the base → paths inside it of the layers that are adapted."""
    method = get_method(plan.method)
    layers = plan.layers or method.layers_under(method.read_options(plan.options))
    found = {"unet": choose_layers("unet", base.unet, layers)}
    for name, part in base.parts():
        if plan.text_encoder and name.startswith("text_encoder"):
            paths = choose_layers(name, part, layers)
            found[name] = [path for path in paths if base.family.reaches(base, name, path)]
    return found


def _header(plan: Recipe, base: Base, digest: str) -> dict[str, Any]:
    """What the file says of itself: all of it a function of recipe, base and pictures."""
    names = ("diffgraft", "torch", "diffusers", "transformers", "peft")
    has_rank = "rank" not in meaningless(plan)
    return {
        "method": plan.method,
        **({"rank": plan.rank, "alpha": plan.scale_alpha()} if has_rank else {}),
        **({"options": plan.options} if plan.options else {}),
        "trigger": plan.trigger,
        "class": getattr(plan, "subject", None),
        "base": {
            "name": Path(plan.base).name,
            "family": base.family.name,
            "hash": base.hash,
            "prediction_type": base.prediction_type,
        },
        "recipe": plan.header(),
        "seed": plan.seed,
        "data": digest,
        "versions": {name: version(name) for name in names},
    }


def _draw(plan: Recipe, base: Base, title: str, count: int = 4) -> dict[str, list[Image.Image]]:
    """`count` pictures of each of the recipe's sample prompts, with the same seeds every time."""
    prompts = plan.samples()
    side = plan.resolution or base.resolution
    listed = [prompt for prompt in prompts for _ in range(count)]
    seeds = [_SAMPLE_SEEDS + number for _ in prompts for number in range(count)]
    images = generate(base.pipeline(), listed, Settings(size=(side, side)), seeds, title)
    return {prompt: images[row * count : (row + 1) * count] for row, prompt in enumerate(prompts)}


def _before_after(plan: Recipe, base: Base, adapter: Adapter) -> Image.Image:
    before = _draw(plan, base, "pictures before")
    with graft(base, {adapter: 1.0}):
        after = _draw(plan, base, "pictures after")
    return grid({f"{prompt}  ·  before | after": images + after[prompt] for prompt, images in before.items()})


def _curves(metrics: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for entry in metrics for name in entry if name not in ("step", "lr"))
    return {name: [entry[name] for entry in metrics if name in entry] for name in names}
