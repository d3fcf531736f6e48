"""From a name to a base: the embedded one, a diffusers folder, a hub id, or a single checkpoint file."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diffgraft.bases.base import Base, Family
from diffgraft.bases.original import is_open_clip
from diffgraft.bases.sd1 import StableDiffusion1
from diffgraft.bases.sd2 import StableDiffusion2
from diffgraft.bases.sdxl import StableDiffusionXL
from diffgraft.bases.taiyi import Taiyi
from diffgraft.errors import DiffgraftError
from diffgraft.quiet import hushed

FAMILIES: dict[str, Family] = {
    family.name: family for family in (Taiyi(), StableDiffusion2(), StableDiffusion1(), StableDiffusionXL())
}
"""Name → family; the first that holds a pipeline is the one."""

TINY = Path(__file__).parent / "tiny" / "model"
CONFIGS = Path(__file__).parent / "configs"


def load_base(source: str | Path = "tiny", dtype: torch.dtype = torch.float32) -> Base:
    """Load a base and freeze it.

    Args:
        source: ``tiny`` (the embedded base), a diffusers folder, a single ``.safetensors`` checkpoint in the original
            layout, or a model's id on the Hugging Face hub.
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
    family = next(family for family in FAMILIES.values() if family.holds(pipe))
    return Base(name=str(source), family=family, **_parts(pipe)).to(dtype=dtype)


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
    kind = parts.get("_class_name", "model without a class")
    known = sorted({family.pipeline_class for family in FAMILIES.values()})
    if kind not in known:
        raise DiffgraftError(f"{folder} is a {kind}; the families known here are drawn with: {', '.join(known)}.")
    more = {"safety_checker": None, "feature_extractor": None} if "safety_checker" in parts else {}
    try:
        return getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, use_safetensors=True, **more)
    except Exception as error:  # the libraries raise whatever their parsing stumbles over
        raise DiffgraftError(f"The base in {folder} cannot be loaded: {_first_line(error)}") from error


def _from_file(path: Path) -> Any:
    import diffusers

    if path.suffix != ".safetensors":
        raise DiffgraftError(
            f"{path} is a {path.suffix or 'suffixless'} file; a single-file base must be .safetensors. Other files may "
            "hold code that runs on opening, so they are not opened. Convert it first, or give a diffusers folder."
        )
    advice = "If it is an adapter, pass it with --adapter and keep the base it was made for."
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise DiffgraftError(f"{path} is not a readable .safetensors file: {_first_line(error)}") from error
    starts = {name: family.in_single_files.values() for name, family in FAMILIES.items() if family.in_single_files}
    fitting = [name for name, wanted in starts.items() if all(any(key.startswith(w) for key in keys) for w in wanted)]
    if not fitting:
        raise DiffgraftError(f"{path} is no checkpoint of {', '.join(starts)} in the original layout. {advice}")
    name = fitting[0]
    pipeline = getattr(diffusers, FAMILIES[name].pipeline_class)
    more: dict[str, Any] = {
        part.replace("text_encoder", "tokenizer"): _clip_tokenizer("!" if is_open_clip(start) else "<|endoftext|>")
        for part, start in FAMILIES[name].in_single_files.items()
    }
    if "safety_checker" in pipeline._optional_components:
        more["safety_checker"] = None
    try:
        return pipeline.from_single_file(path, config=str(CONFIGS / name), local_files_only=True, **more)
    except Exception as error:  # the loader raises whatever its parsing stumbles over
        raise DiffgraftError(
            f"{path} cannot be loaded as a checkpoint of {name}: {_first_line(error)} {advice}"
        ) from error


def _clip_tokenizer(padding: str) -> Any:
    """CLIP's own, which all of these families have; OpenCLIP's pads with id 0, which is that of ``!``."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TINY / "tokenizer", pad_token=padding)


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
