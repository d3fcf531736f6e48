"""A training run from beginning to end: recipe in, a folder with an adapter and pictures out."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.formats.header import told
from diffgraft.adapters.method import Attached, Spec, choose_layers, get_method
from diffgraft.bases import Base, load_base
from diffgraft.data.texts import Texts
from diffgraft.errors import DiffgraftError
from diffgraft.files import alone_in, sweep
from diffgraft.generation.generate import Settings, generate
from diffgraft.generation.graft import graft
from diffgraft.generation.plots import grid, save_image, save_loss_plot
from diffgraft.room import DiskFullError
from diffgraft.trainers.captioned import Captioned
from diffgraft.trainers.checkpoint import check_same
from diffgraft.trainers.denoising import Denoiser, Noising
from diffgraft.trainers.dreambooth import DreamBooth
from diffgraft.trainers.identity import identity_of
from diffgraft.trainers.loop import Objective, OnTheWay, by_step, curves, fit, new_accelerator, read_record
from diffgraft.trainers.materials import Materials, Read, gather, local, read_pictures, side_of, step_of
from diffgraft.trainers.preserving import Preserving
from diffgraft.trainers.rates import freeze
from diffgraft.trainers.recipe import Recipe
from diffgraft.trainers.recipe_files import load_recipe, meaningless, save_recipe
from diffgraft.trainers.resting import at_hand, not_needed, put_away, take_back
from diffgraft.trainers.settings import Concept, Validation
from diffgraft.trainers.speed import check_speed, sped_up
from diffgraft.trainers.start import Start, begin, read_start, with_start
from diffgraft.trainers.trackers import check_trackers
from diffgraft.trainers.validation import Trial

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLE_SEEDS = 50_000
"""Samples count their seeds from here, so that none is a class image that training has seen."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    recipe: Recipe
    metrics: Sequence[dict[str, float]]
    """One entry a step: step, lr, loss and the objective's terms"""
    was_finished: bool = False
    """Whether nothing was left to be trained"""

    @property
    def steps(self) -> int:
        """How many were trained, in all."""
        return int(max((entry["step"] for entry in self.metrics), default=0))

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
    changed: bool = False,
    **settings: Any,
) -> Run:
    """Train an adapter and leave a folder with everything about it.

    Args:
        recipe: name of a recipe (``diffgraft recipes`` lists them), or the path of a YAML.
        base: a base, or what `load_base` takes; the recipe's own where it is not given. A `Base` keeps the precision
            of its weights, and after training has the very same bits.
        resume: the folder of an earlier run to go on with, under the recipe that stands there.
        changed: with `resume`, that base, pictures or settings that decide what a step does differ on purpose.
        settings: what differs from the recipe, by key; nested keys as ``prior={"weight": 0.5}``. With `resume` they
            become part of the run's recipe.

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
    is_done = (folder / "adapter.safetensors").exists()  # which can do without the file it began with
    needed = plan.init_from and not (is_done and not Path(plan.init_from).exists())
    start = read_start(plan.init_from) if needed else None
    read = read_pictures(plan)
    check_trackers(plan)
    accelerator = new_accelerator(plan)
    check_speed(plan, accelerator.device)
    held = _held(plan, base)
    plan = plan.model_copy(update={"quantize": held.quantize})  # so that what is written says it, whoever loaded it
    check_resolution(plan, held)
    was_on = held.device
    held.to(accelerator.device)
    try:
        live = attach(plan, held, start)  # what cannot be is refused before anything is drawn or written
        live.detach()
        _noising(plan, held)
        with alone_in(folder) if accelerator.is_main_process else nullcontext():
            trained = {name: value for name, value in live.trainable().items() if value.requires_grad}
            identity = identity_of(plan, held.hash, start=_hash_of(plan, start))
            done = check_same(folder, identity, trained, changed=changed)
            if done > plan.steps:
                raise DiffgraftError(f"{folder} has done {done} steps already, which is past steps={plan.steps}.")
            run = _finished(folder, plan, done, changed=changed)
            if run is None:
                if accelerator.is_main_process:
                    sweep(folder)
                    save_recipe(plan, folder / "recipe.yaml")
                run = _learn(plan, held, folder, accelerator, read, start, changed=changed)
            if accelerator.is_main_process and not run.before_after.exists():
                save_loss_plot(curves(run.metrics), folder / "loss.png")
                save_image(_before_after(plan, held, run.adapter), run.before_after)
            accelerator.wait_for_everyone()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(folder) from None  # whoever catches it can say what to resume
    except DiskFullError as error:
        has_begun = (folder / "recipe.yaml").exists()
        then = f"go on with: diffgraft train --resume {folder}" if has_begun else "start again."
        raise DiskFullError(f"{error} Then {then}") from error
    finally:
        held.to(was_on)
    return run


def recipe_with(recipe: str | Path, settings: dict[str, Any]) -> Recipe:
    """A recipe with settings laid over it, as `train` takes both.

    Raises:
        DiffgraftError: as `load_recipe`, and where it names no pictures.
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    plan = load_recipe(recipe, {key: str(value) if isinstance(value, Path) else value for key, value in flat.items()})
    if not plan.images and not plan.concepts:
        raise DiffgraftError(f"The recipe {recipe} needs pictures: add images=FOLDER (JPEG, PNG or WebP files).")
    return plan


def _fresh(recipe: str | Path, settings: dict[str, Any]) -> tuple[Recipe, Path]:
    plan = recipe_with(recipe, settings)
    folder = Path(plan.output or f"runs/{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    if (folder / "adapter.safetensors").exists():
        raise DiffgraftError(
            f"{folder} already holds a finished run. Choose another output=…, or remove it to train again."
        )
    if (folder / "recipe.yaml").exists():
        raise DiffgraftError(
            f"{folder} holds an unfinished run. Go on with it: --resume {folder}, or choose another output=…"
        )
    return _placed(plan, folder), folder


def _placed(plan: Recipe, folder: Path) -> Recipe:
    """The recipe with whole paths, which hold wherever it is read again."""
    found = plan.model_copy(deep=True)
    found.init_from = local(plan.init_from) if plan.init_from else ""
    found.output, found.base = str(folder), plan.base if plan.base == "tiny" else local(plan.base)
    held: list[Recipe | Concept | Validation] = [found, *found.concepts, found.validation]
    for part in held:
        part.images = local(part.images) if part.images else ""
    for one in (found, *found.concepts):
        if (prior := getattr(one, "prior", None)) is not None and prior.folder:
            prior.folder = local(prior.folder)
    return found


def _resumed(folder: Path, settings: dict[str, Any]) -> tuple[Recipe, Path]:
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise DiffgraftError(
            f"There is no run to resume in {folder}: it holds no recipe.yaml. Give the folder of a run."
        )
    if "output" in settings:
        raise DiffgraftError(f"A run goes on where it is, in {folder}: leave output=… out.")
    return _placed(recipe_with(path, settings), folder), folder


def _finished(folder: Path, plan: Recipe, done: int, *, changed: bool) -> Run | None:
    """The run in a folder, where it has come to the end of the recipe; one that is to have more steps has not."""
    run = Run(folder, plan, by_step(read_record(folder)), was_finished=True)
    if not run.adapter_file.exists():
        return None
    with safe_open(run.adapter_file, "pt") as file:
        said = told(file.metadata())["recipe"]
    steps = said.get("steps", type(plan).model_fields["steps"].default)
    is_finished = f"{folder} is finished after {steps} steps"
    if steps == plan.steps and changed:
        raise DiffgraftError(f"{is_finished}: nothing is left to be changed. Give more steps=…")
    if steps != plan.steps and not done:
        raise DiffgraftError(f"{is_finished}, and has no checkpoint to go on from.")
    return run if steps == plan.steps else None


def _hash_of(plan: Recipe, start: Start | None) -> str | None:
    """That of the file a run begins with; empty where it begins with none, None where that file is gone."""
    return start.hash if start else None if plan.init_from else ""


def _held(plan: Recipe, base: str | Path | Base) -> Base:
    """The base that was given, or the recipe's."""
    if not isinstance(base, Base):
        more = {"prediction_type": plan.prediction_type, "zero_snr": plan.zero_snr, "quantize": plan.quantize}
        return load_base(plan.base, DTYPES[plan.precision], **more)  # type: ignore[arg-type]
    if plan.prediction_type not in (None, base.prediction_type) or plan.zero_snr not in (None, base.zero_snr):
        raise DiffgraftError(
            f"The base that was given is {base!r}; the recipe has prediction_type={plan.prediction_type} and "
            f"zero_snr={plan.zero_snr}. Load the base with them: load_base(…, prediction_type=…, zero_snr=…)."
        )
    if plan.quantize not in ("none", base.quantize):
        raise DiffgraftError(
            f"The base that was given is {base!r}; the recipe has quantize={plan.quantize}. Load the base with that: "
            f"load_base(…, quantize={plan.quantize!r})."
        )
    return base


def check_resolution(plan: Recipe, base: Base) -> None:
    """Raises DiffgraftError where the base cannot have pictures of that resolution."""
    side, step = side_of(plan, base), step_of(base)
    if side % step:
        better = max(step, round(side / step) * step)
        raise DiffgraftError(f"resolution={side} is no multiple of {step}, which this base needs. Take {better}.")


def _learn(
    plan: Recipe, base: Base, folder: Path, accelerator: Any, read: Read, start: Start | None, *, changed: bool
) -> Run:
    """Attach, train, detach, export: the base is afterwards as it was."""
    with accelerator.main_process_first():  # the others find the class images drawn, and latents in the cache
        materials = gather(plan, base, read)
    live: Attached | None = None

    def sample(step: int, file: Path) -> None:
        base.unet.eval()
        assert live is not None
        live.eval()
        with at_hand(base, away):
            sheet = grid(_draw(plan, base, f"samples at step {step}", count=2))
        save_image(sheet, file)
        base.unet.train(plan.gradient_checkpointing)
        live.train()

    def learnt() -> Adapter:
        assert live is not None
        return with_start(live.adapter(_header(plan, base, materials.digest)), start)

    def keep(_step: int, file: Path) -> None:
        learnt().save(file)

    def keep_best() -> None:
        if accelerator.is_main_process:
            learnt().save(folder / "best.safetensors")

    on_the_way = [
        OnTheWay(plan.sample_every, folder / "samples", ".png", sample),
        OnTheWay(plan.adapter_every, folder / "adapters", ".safetensors", keep),
    ]

    away: list[str] = []
    try:
        live = attach(plan, base, start)
        if plan.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
            base.unet.train()  # it recomputes in training mode only; these UNets have no dropout
        whole = plan.long_prompts == "chunk"
        texts = Texts(base, whole=whole, keep=plan.cache)
        if materials.prompts is not None and not live.changes_text:
            texts.prepare(materials.prompts)
        denoiser = Denoiser(base, live, live.changes_text, texts, whole)
        if not live.trains_text:
            denoiser.freeze_text()
        away += not_needed(base, has_texts=materials.prompts is not None and not live.changes_text)
        put_away(base, away)
        objective = _objective(plan, base, materials, denoiser, live)
        identity = identity_of(plan, base.hash, materials.digest, _hash_of(plan, start))
        trial = Trial(plan.validation, materials.held_out.loss, keep_best) if materials.held_out else None
        with sped_up(plan, denoiser):
            metrics = fit(
                plan, folder, identity, accelerator, denoiser, live, objective, on_the_way, trial, changed=changed
            )
        adapter = learnt()
    finally:
        take_back(base, away)
        if live is not None:
            live.detach()
        base.unet.disable_gradient_checkpointing()
        base.unet.eval()
    run = Run(folder, plan, by_step(metrics))
    if accelerator.is_main_process:
        run.before_after.unlink(missing_ok=True)  # that of fewer steps
        adapter.save(run.adapter_file)
    return run


def _noising(plan: Recipe, base: Base) -> Noising:
    return Noising(base, plan.noise, plan.timesteps, plan.loss, plan.masks)


def attach(plan: Recipe, base: Base, start: Start | None = None) -> Attached:
    """Lay the recipe's method over a base, with the values that it starts from."""
    method = get_method(plan.method)
    options, words = method.read_options(plan.options), (plan.trigger, getattr(plan, "subject", ""))
    live = method.attach(base, Spec(_targets(plan, base), plan.rank, plan.scale_alpha(), plan.seed, options, *words))
    try:
        freeze(plan, base, live, begin(plan, base, live, start) if start else ())
    except BaseException:
        live.detach()
        raise
    return live


def _objective(plan: Recipe, base: Base, materials: Materials, denoiser: Denoiser, live: Attached) -> Objective:
    noising, ours = _noising(plan, base), materials.learnt
    if materials.prior is not None:
        return DreamBooth(ours, materials.prior, noising, plan.seed, base.device)
    if materials.prior_weight:

        def bare(*asked: Any) -> Tensor:
            with live.bare():
                said: Tensor = denoiser(*asked)
            return said

        return Preserving(ours, bare, materials.prior_weight, noising, plan.seed, base.device)
    return Captioned(ours, noising, plan.seed, base.device)


def _targets(plan: Recipe, base: Base) -> dict[str, list[str]]:
    """Part of the base → paths inside it of the layers that are adapted."""
    method = get_method(plan.method)
    layers = plan.layers or method.layers_under(method.read_options(plan.options))
    found = {"unet": choose_layers("unet", base.unet, layers)}
    for name, part in base.parts():
        if plan.text_encoder and name.startswith("text_encoder"):
            found[name] = choose_layers(name, part, layers)
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
    side = side_of(plan, base)
    listed = [prompt for prompt in prompts for _ in range(count)]
    seeds = [_SAMPLE_SEEDS + number for _ in prompts for number in range(count)]
    images = generate(base.pipeline(), listed, Settings(size=(side, side)), seeds, title)
    return {prompt: images[row * count : (row + 1) * count] for row, prompt in enumerate(prompts)}


def _before_after(plan: Recipe, base: Base, adapter: Adapter) -> Image.Image:
    before = _draw(plan, base, "pictures before")
    with graft(base, {adapter: 1.0}):
        after = _draw(plan, base, "pictures after")
    return grid({f"{prompt}  ·  before | after": images + after[prompt] for prompt, images in before.items()})
