"""From a name to a base: the embedded one, a diffusers folder, a hub id, or a single checkpoint file."""

import json
from pathlib import Path
from typing import Any

import torch

from diffgraft.bases.base import Base, Family
from diffgraft.bases.sd1 import StableDiffusion1
from diffgraft.bases.sdxl import StableDiffusionXL
from diffgraft.errors import DiffgraftError
from diffgraft.quiet import hushed

FAMILIES: dict[str, Family] = {family.pipeline_class: family for family in (StableDiffusion1(), StableDiffusionXL())}
"""Name of the diffusers pipeline → the family it draws with."""

_WIDTH_OF_2 = 1024
"""Width of the text states of Stable Diffusion 2.x, which shares its pipeline with 1.x (768)."""

TINY = Path(__file__).parent / "tiny" / "model"
CONFIGS = Path(__file__).parent / "configs"


def load_base(source: str | Path = "tiny", dtype: torch.dtype = torch.float32) -> Base:
    """Load a base and freeze it.

    Args:
        source: ``tiny`` (the embedded base), a diffusers folder, a single ``.safetensors`` checkpoint of Stable
            Diffusion 1.x in its original layout, or a model's id on the Hugging Face hub.
        dtype: precision the weights are held in.

    Raises:
        DiffgraftError: nothing by that name can be read, or it is no base of a known family.
    """
    path = TINY if str(source) == "tiny" else Path(source).expanduser()
    with hushed():
        if path.is_file():
            pipe = _from_file(path)
        elif path.is_dir():
            pipe = _from_folder(path)
        else:
            pipe = _from_hub(str(source))
    family = _family(type(pipe).__name__, source)
    if pipe.unet.config.cross_attention_dim == _WIDTH_OF_2:
        raise DiffgraftError(f"{source} is a Stable Diffusion 2.x, which is not supported: give a 1.x or an XL.")
    return Base(name=str(source), family=family, **_parts(pipe)).to(dtype=dtype)


def _family(pipeline_class: str, source: str | Path) -> Family:
    if pipeline_class not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise DiffgraftError(f"{source} is a {pipeline_class}; the families known here are drawn with: {known}.")
    return FAMILIES[pipeline_class]


def _parts(pipe: Any) -> dict[str, Any]:
    names = ("unet", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return {name: getattr(pipe, name, None) for name in names}


def _from_folder(folder: Path) -> Any:
    import diffusers

    index = folder / "model_index.json"
    if not index.is_file():
        raise DiffgraftError(
            f"{folder} is no diffusers folder: it holds no model_index.json. Give the folder that "
            "`save_pretrained` wrote, a single .safetensors checkpoint, a hub id, or `tiny`."
        )
    try:
        parts = json.loads(index.read_text("utf-8"))
    except ValueError as error:
        raise DiffgraftError(f"{index} cannot be read as JSON: {error}. Copy the model's folder again.") from error
    if not isinstance(parts, dict):
        raise DiffgraftError(f"{index} holds no JSON object, so {folder} is no diffusers folder.")
    family = _family(parts.get("_class_name", "model without a class"), folder)
    more = {"safety_checker": None, "feature_extractor": None} if "safety_checker" in parts else {}
    try:
        pipeline = getattr(diffusers, family.pipeline_class)
        return pipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True, **more)
    except Exception as error:  # the libraries raise whatever their parsing stumbles over
        raise DiffgraftError(f"The base in {folder} cannot be loaded: {_first_line(error)}") from error


def _from_file(path: Path) -> Any:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    if path.suffix != ".safetensors":
        raise DiffgraftError(
            f"{path} is a {path.suffix or 'suffixless'} file; a single-file base must be .safetensors. Other files may "
            "hold code that runs on opening, so they are not opened. Convert it first, or give a diffusers folder."
        )
    try:
        return StableDiffusionPipeline.from_single_file(
            path,
            config=str(CONFIGS / "sd1"),
            local_files_only=True,
            tokenizer=CLIPTokenizer.from_pretrained(TINY / "tokenizer"),  # CLIP's own vocabulary, which it is
            safety_checker=None,
        )
    except Exception as error:  # the loader raises whatever its parsing stumbles over
        raise DiffgraftError(
            f"{path} cannot be loaded as a Stable Diffusion 1.x checkpoint: {_first_line(error)} "
            "If it is an adapter, pass it with --adapter and keep the base it was made for."
        ) from error


def _from_hub(name: str) -> Any:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted, unwanted = ["*.json", "*.txt", "*/*.safetensors"], ["*/*.fp16.*", "*/*non_ema*", "safety_checker/*"]
    try:
        folder = snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted)
    except (OSError, RuntimeError, HFValidationError) as error:
        raise DiffgraftError(
            f"There is no base {name!r}: no folder or file of that name exists here, and the hub gave no such model "
            "(or cannot be reached). Give `tiny`, a diffusers folder, a .safetensors checkpoint, or a hub id. "
            f"The hub's client said: {_first_line(error)}"
        ) from error
    return _from_folder(Path(folder))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if lines[0].endswith((".", "!")) else lines[0] + "."
