"""A training run from beginning to end: recipe in, a folder with an adapter and pictures out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Attached, find_modules, get_method
from diffgraft.bases import Base, load_base
from diffgraft.data.class_images import class_images
from diffgraft.data.latents import encode
from diffgraft.data.pictures import Picture, read_folder
from diffgraft.errors import DiffgraftError
from diffgraft.generation.generate import Settings, generate
from diffgraft.generation.graft import graft
from diffgraft.generation.plots import grid, save_image, save_loss_plot
from diffgraft.trainers.captioned import Captioned
from diffgraft.trainers.checkpoint import checkpoints
from diffgraft.trainers.denoising import Denoiser, Noising
from diffgraft.trainers.dreambooth import DreamBooth
from diffgraft.trainers.examples import Examples, data_digest
from diffgraft.trainers.loop import Objective, fit, new_accelerator
from diffgraft.trainers.recipe import Recipe, StyleRecipe, SubjectRecipe, load_recipe, save_recipe

_ATTENTION = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
_FEEDFORWARD = ("ff.net.0.proj", "ff.net.2")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        base: a base, or what `load_base` takes; the recipe's own where it is not given.
        resume: the folder of an earlier run to go on with; the recipe is then the one that stands there.
        settings: what differs from the recipe, by key; nested keys as ``prior={"weight": 0.5}``.

    Returns:
        The run: ``adapter.safetensors``, ``recipe.yaml``, ``metrics.jsonl``, ``loss.png``, ``before-after.png`` and
        ``checkpoints/`` lie in its folder.

    Raises:
        DiffgraftError: recipe, pictures or base will not do; nothing has been trained then.
    """
    if not isinstance(base, Base) and str(base):
        settings["base"] = str(base)
    plan, folder = _resumed(Path(resume), settings) if resume is not None else _fresh(recipe, settings)
    if (folder / "adapter.safetensors").exists():
        if resume is None:
            raise DiffgraftError(
                f"{folder} already holds a finished run. Choose another output=…, or remove the folder to train again."
            )
        return _finished(folder, plan)
    method = get_method(plan.method)
    pictures = read_folder(plan.images)
    accelerator = new_accelerator(plan)
    # a base that was handed in keeps the precision of its weights; only the arithmetic follows the recipe
    held = base if isinstance(base, Base) else load_base(plan.base, _DTYPES[plan.precision])
    was_on = held.device
    held.to(accelerator.device)
    try:
        prompts = _prompts(plan, pictures)
        objective = _objective(plan, held, pictures, prompts)
        folder.mkdir(parents=True, exist_ok=True)
        save_recipe(plan, folder / "recipe.yaml")
        metrics, adapter = _learn(
            plan, held, folder, accelerator, method.attach, objective, data_digest(pictures, prompts)
        )
        if accelerator.is_main_process:
            save_loss_plot(_curves(metrics), folder / "loss.png")
            save_image(_before_after(plan, held, adapter), folder / "before-after.png")
            adapter.save(folder / "adapter.safetensors")  # last: its presence says that the run is complete
        accelerator.wait_for_everyone()
    finally:
        held.to(was_on)
    return Run(folder, plan, metrics)


def _fresh(recipe: str | Path, settings: dict[str, Any]) -> tuple[Recipe, Path]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    flat = {key: str(value) if isinstance(value, Path) else value for key, value in flat.items()}
    plan = load_recipe(recipe, flat)
    if not plan.images:
        raise DiffgraftError(f"The recipe {recipe} needs pictures: add images=FOLDER (JPEG, PNG or WebP files).")
    folder = Path(plan.output or f"runs/{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    if checkpoints(folder) and not (folder / "adapter.safetensors").exists():
        raise DiffgraftError(
            f"{folder} holds an unfinished run. Go on with it: --resume {folder}, or choose another output=…"
        )
    return plan.model_copy(update={"output": str(folder)}), folder


def _resumed(folder: Path, settings: dict[str, Any]) -> tuple[Recipe, Path]:
    path = folder.expanduser() / "recipe.yaml"
    if not path.is_file():
        raise DiffgraftError(
            f"There is no run to resume in {folder}: it holds no recipe.yaml. Give the folder of a run."
        )
    if settings:
        raise DiffgraftError(
            f"A resumed run keeps its recipe, so {', '.join(settings)} cannot be set. Edit {path}, or start a new run."
        )
    return load_recipe(path, {"output": str(folder)}), folder.expanduser()


def _finished(folder: Path, plan: Recipe) -> Run:
    import json

    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return Run(folder, plan, [json.loads(line) for line in lines])


def _prompts(plan: Recipe, pictures: Sequence[Picture]) -> list[str]:
    prompts = []
    for picture in pictures:
        caption = picture.caption if plan.captions else None
        if isinstance(plan, StyleRecipe) and caption:
            prompts.append(plan.fill(plan.caption).replace("{caption}", caption))
        else:
            prompts.append(caption or plan.fill(cast(SubjectRecipe, plan).prompt))
    return prompts


def _objective(plan: Recipe, base: Base, pictures: Sequence[Picture], prompts: list[str]) -> Objective:
    side = plan.resolution or base.resolution
    if side % base.factor:
        raise DiffgraftError(f"resolution={side} is no multiple of {base.factor}, the pixels per latent of this base.")

    def examples(images: Sequence[Image.Image], texts: list[str], title: str) -> Examples:
        if plan.flip:
            images = [*images, *(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images)]
            texts = texts + texts
        return Examples(encode(base, images, side, title), texts)

    noising = Noising(base)
    ours = examples([picture.image for picture in pictures], prompts, "encoding pictures")
    if not isinstance(plan, SubjectRecipe) or plan.prior.weight == 0:
        return Captioned(ours, noising, plan.seed)
    text = plan.fill(plan.class_prompt)
    drawn = class_images(base, text, plan.prior.images, Settings(size=(side, side)), plan.seed)
    kept = examples(drawn, [text] * len(drawn), "encoding class images")
    return DreamBooth(ours, kept, plan.prior.weight, noising, plan.seed)


def _learn(
    plan: Recipe,
    base: Base,
    folder: Path,
    accelerator: Any,
    attach: Callable[..., Attached],
    objective: Objective,
    digest: str,
) -> tuple[list[dict[str, float]], Adapter]:
    """Attach, train, export, detach: the base is afterwards as it was."""
    side = plan.resolution or base.resolution
    attached = {
        part: attach(module, paths, rank=plan.rank, alpha=plan.scale_alpha(), seed=plan.seed)
        for part, module, paths in _targets(plan, base)
    }
    parameters = {
        f"{part}.{name}": value for part, live in attached.items() for name, value in live.parameters().items()
    }
    if plan.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()  # it recomputes in training mode only; these UNets have no dropout
    denoiser = Denoiser(base, (side, side), plan.text_encoder)

    def sample(step: int) -> None:
        base.unet.eval()
        drawn = _draw(plan, base, f"samples at step {step}")
        sheet = grid(drawn)
        save_image(sheet, folder / "samples" / f"step-{step:06d}.png")
        base.unet.train(plan.gradient_checkpointing)

    try:
        metrics = fit(plan, folder, accelerator, denoiser, parameters, objective, sample)
        deltas = {
            f"{part}.{path}": (delta,) for part, live in attached.items() for path, delta in live.deltas().items()
        }
    finally:
        for live in attached.values():
            live.detach()
        base.unet.disable_gradient_checkpointing()
        base.unet.eval().requires_grad_(False)
    return metrics, Adapter(deltas, _header(plan, base, digest))


def _targets(plan: Recipe, base: Base) -> list[tuple[str, Any, list[str]]]:
    endings = _ATTENTION["unet"] + (_FEEDFORWARD if "feedforward" in plan.layers else ())
    found = [("unet", base.unet, find_modules(base.unet, endings))]
    if plan.text_encoder:
        for name, part in base.parts():
            if name.startswith("text_encoder"):
                found.append((name, part, find_modules(part, _ATTENTION["text_encoder"])))
    return found


def _header(plan: Recipe, base: Base, digest: str) -> dict[str, Any]:
    """What the file says of itself: all of it a function of recipe, base and pictures."""
    names = ("diffgraft", "torch", "diffusers", "transformers", "peft")
    return {
        "method": plan.method,
        "rank": plan.rank,
        "alpha": plan.scale_alpha(),
        "trigger": plan.trigger,
        "class": getattr(plan, "subject", None),
        "base": {"name": Path(plan.base).name, "family": base.family.name, "hash": base.hash},
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
    seeds = [plan.seed * 100_003 + 7 * number for _ in prompts for number in range(count)]
    images = generate(base.pipeline(), listed, Settings(size=(side, side)), seeds, title)
    return {prompt: images[row * count : (row + 1) * count] for row, prompt in enumerate(prompts)}


def _before_after(plan: Recipe, base: Base, adapter: Adapter) -> Image.Image:
    before = _draw(plan, base, "pictures before")
    with graft(base, {adapter: 1.0}):
        after = _draw(plan, base, "pictures after")
    rows = {}
    for prompt in before:
        rows[f"{prompt}  ·  before | after"] = before[prompt] + after[prompt]
    return grid(rows)


def _curves(metrics: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    names = [name for name in metrics[0] if name not in ("step", "lr")]
    return {name: [entry[name] for entry in metrics] for name in names}
