"""Model cards: the README.md of an adapter, as the Hugging Face hub shows it, with pictures."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.training_metadata import recipe_lines
from diffgraft.errors import DiffgraftError, wrap_system_errors
from diffgraft.files import check_new, write_text
from diffgraft.generation.metadata import read_record
from diffgraft.generation.plots import row_starts, save_image
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.folder import adapter_file, recipe_with

CARD_NAME, PICTURES = "README.md", "card-images"
"""Name of the card's file, and of the folder with its pictures beside it"""
FAMILY_TAGS = {"sd1": "stable-diffusion", "sd2": "stable-diffusion", "sdxl": "stable-diffusion-xl"}
"""Family of the base → its tag on the hub, where this is not the name of the family"""
_LOW_RANK = ("lora", "locon", "tlora")
"""Methods with files that diffusers loads as LoRA"""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""Id of a repository on the hub, owner/name"""


@dataclass(frozen=True)
class Sample:
    """A sample picture on a model card, with its prompt."""

    prompt: str
    image: Image.Image = field(repr=False)


@dataclass(frozen=True)
class Card:
    """A model card, the README.md of a repository on the Hugging Face hub."""

    text: str
    """Its Markdown, after a head in YAML"""
    pictures: Mapping[str, Image.Image]
    """Path beside the card → picture"""

    def write(self, folder: Path) -> list[Path]:
        """Write the card and its pictures into a folder; return the paths, the card's first.

        Raises:
            DiffgraftError: there is a card in the folder already.
        """
        file = check_new(folder / CARD_NAME)
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in self.pictures.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_image(image, folder / name)
        return [write_text(file, self.text), *(folder / name for name in self.pictures)]


@wrap_system_errors
def card(
    source: str | Path,
    *,
    pictures: Sequence[str | Path] = (),
    base_model: str = "",
    title: str = "",
    output: str | Path = "",
) -> Path:
    """Write the model card of an adapter.

    Args:
        source: the folder of a run, or an adapter file of any tool.
        pictures: picture files for the card, drawn by diffgraft, webui or ComfyUI, from which the prompts are read; by
            default the newest samples of a run.
        base_model: hub id of the base, if the recipe of the run does not have it.
        title: title of the card; by default the name of the run or of the file.
        output: folder of the card; by default that of the adapter.

    Returns:
        Path of the card, `README.md`, beside which `card-images/` has its pictures.

    Raises:
        DiffgraftError: the source is no adapter, a picture cannot be read, or there is a card already.
    """
    folder = Path(output).expanduser() if output else adapter_file(source).parent
    check_new(folder / CARD_NAME)
    return make_card(source, pictures, base_model, title).write(folder)[0]


def make_card(source: str | Path, pictures: Sequence[str | Path] = (), base_model: str = "", title: str = "") -> Card:
    """Return the model card of an adapter without writing it; the arguments are those of `card`."""
    file = adapter_file(source)
    adapter, recipe = load_adapter(file), _recipe_of(file.parent)
    if base_model and not HUB_ID.fullmatch(base_model):
        raise DiffgraftError(f"Invalid base model {base_model!r}: must be an id on the hub, OWNER/NAME.")
    facts = _Facts(adapter, recipe, file.name, title or _name(file), base_model)
    # samples of a control network have condition pictures too, which a card does not show
    prompts = recipe.samples() if recipe is not None and recipe.data.conditions is None else []
    given = [_given(Path(path).expanduser(), facts.instance_prompt) for path in pictures]
    samples = given or _newest(file.parent, prompts)
    shown = {f"{PICTURES}/{number:02}.png": sample.image for number, sample in enumerate(samples, 1)}
    before_after = file.parent / "before-after.png"
    if recipe is not None and before_after.is_file():
        with Image.open(before_after, formats=["PNG"]) as sheet:
            shown[f"{PICTURES}/before-after.png"] = sheet.convert("RGB")
    return Card(f"---\n{facts.head([sample.prompt for sample in samples])}---\n\n{facts.body(list(shown))}", shown)


@dataclass(frozen=True)
class _Facts:
    """Everything that a card tells."""

    adapter: Adapter
    recipe: Recipe | None
    file: str
    """Name of the adapter's file"""
    title: str
    given_base: str
    """Hub id of the base from the caller; empty if it gave none"""

    @property
    def base(self) -> Mapping[str, Any]:
        told = self.adapter.metadata.get("base")
        return told if isinstance(told, Mapping) else {}

    @property
    def hub_base(self) -> str:
        """Hub id of the base; empty if it is not known."""
        known = self.recipe.base if self.recipe is not None else ""
        is_id = HUB_ID.fullmatch(known) is not None and not Path(known).exists()
        return self.given_base or (known if is_id else "")

    @property
    def instance_prompt(self) -> str:
        """Prompt that calls what was learned; empty if no trigger is known."""
        metadata = self.adapter.metadata
        trigger, noun = (str(metadata.get(key) or "") for key in ("trigger", "class"))
        recipe = metadata.get("recipe")
        task = recipe.get("task") if isinstance(recipe, Mapping) else ""
        if self.recipe is not None:
            return self.recipe.fill(self.recipe.prompt)
        if trigger and task == "style":
            return f"a picture, {trigger} style"
        return f"a {trigger} {noun}" if trigger and noun else trigger

    @property
    def is_lora(self) -> bool:
        return self.adapter.method in _LOW_RANK and not self.adapter.tokens

    def head(self, prompts: Sequence[str]) -> str:
        """Return the head of the card, by which the hub finds and shows the adapter, as YAML."""
        family = str(self.base.get("family") or "")
        tags = ["text-to-image", "diffusers", "diffgraft", *([FAMILY_TAGS.get(family, family)] if family else [])]
        tags += ["lora", "template:sd-lora"] if self.is_lora else [self.adapter.method]
        tags += ["textual_inversion"] if self.adapter.tokens else []
        head: dict[str, Any] = {"base_model": self.hub_base} if self.hub_base else {}
        head |= {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": list(dict.fromkeys(tags))}
        head |= {"instance_prompt": self.instance_prompt} if self.instance_prompt else {}
        if prompts:
            head["widget"] = [
                {"text": prompt, "output": {"url": f"{PICTURES}/{number:02}.png"}}
                for number, prompt in enumerate(prompts, 1)
            ]
        text: str = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000)
        return text

    def body(self, pictures: Sequence[str]) -> str:
        """Return the card below its head, as Markdown."""
        metadata = self.adapter.metadata
        base = self.hub_base or str(self.base.get("name") or "an unknown base")
        size = f" of rank {metadata['rank']}" if "rank" in metadata else ""
        parts = [
            f"# {_plain(self.title)}",
            f"An adapter by the method {_code(self.adapter.method)}{size} for {_code(base)}.",
        ]
        if self.instance_prompt:
            parts.append(f"Prompts call it by the words {_code(self.instance_prompt)}.")
        comparison = f"{PICTURES}/before-after.png"
        parts += ["<Gallery />"] if set(pictures) - {comparison} else []
        if comparison in pictures:
            parts += ["Without and with the adapter:", f"![without and with the adapter]({comparison})"]
        return "\n\n".join([*parts, "## Use", self._use(), *self._training()]) + "\n"

    def _training(self) -> list[str]:
        metadata, parts = self.adapter.metadata, []
        if isinstance(recipe := metadata.get("recipe"), Mapping):
            lines = [line[9:].replace("`", "'") for line in recipe_lines(recipe)]
            parts += ["## Training", "The settings of the recipe that differ from the defaults:", _block("", lines)]
            parts.append("`diffgraft replay` trains by them again, on pictures that you give.")
        if isinstance(versions := metadata.get("versions"), Mapping):
            parts.append(f"Trained with {_plain(', '.join(f'{name} {number}' for name, number in versions.items()))}.")
        return parts

    def _use(self) -> str:
        prompt = self.instance_prompt or "a picture"
        lines = [
            "import diffgraft as dg",
            "",
            f"pictures = dg.generate({prompt!r}, {self.file!r}, base={self._loaded()!r})",
        ]
        text = _block("python", [line.replace("`", "'") for line in lines])
        if not self.is_lora or not self.hub_base:
            return text
        lines = [
            "import torch",
            "from diffusers import AutoPipelineForText2Image",
            "",
            f"pipe = AutoPipelineForText2Image.from_pretrained({self._loaded()!r}, torch_dtype=torch.float16)",
            "pipe.to('cuda')",
            f"pipe.load_lora_weights('FOLDER', weight_name={self.file!r})  # or an id on the hub",
            f"picture = pipe({prompt!r}).images[0]",
        ]
        return f"{text}\n\nor with diffusers:\n\n{_block('python', [line.replace('`', chr(39)) for line in lines])}"

    def _loaded(self) -> str:
        return self.hub_base or str(self.base.get("name") or "BASE")


def _recipe_of(folder: Path) -> Recipe | None:
    """Return the recipe of the run in a folder; None without one."""
    file = folder / "recipe.yaml"
    return recipe_with(file, {}) if file.is_file() else None


def _name(file: Path) -> str:
    return file.parent.resolve().name if file.name == "adapter.safetensors" else file.stem


def _given(path: Path, instance_prompt: str) -> Sample:
    """Return a picture of the caller with the prompt in its file, or else the instance prompt."""
    record, parameters = read_record(path)
    own = parameters.partition("\nNegative prompt:")[0].partition("\nSteps:")[0]
    told = own if record is None else record.batch[record.place][0]
    with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
        return Sample(" ".join(told.split()) or instance_prompt or path.stem, image.convert("RGB"))


def _newest(folder: Path, prompts: Sequence[str]) -> list[Sample]:
    """Return the first of the newest samples of a run for each of its prompts; none without samples."""
    sheets = sorted((folder / "samples").glob("step-*.png"))
    if not sheets or not prompts:
        return []
    labels = list(dict.fromkeys(prompts))
    with Image.open(sheets[-1], formats=["PNG"]) as sheet:
        cells = row_starts(sheet.convert("RGB"), len(labels))
    return [Sample(prompt, cell) for prompt, cell in zip(labels, cells, strict=False)]


def _plain(text: str) -> str:
    """Return a text in one line in which Markdown has no meaning."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def _block(language: str, lines: Sequence[str]) -> str:
    body = "\n".join(lines)
    return f"```{language}\n{body}\n```"
