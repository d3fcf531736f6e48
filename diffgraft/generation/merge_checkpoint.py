"""Writing a checkpoint: a base with adapters merged into its weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import add_text_model
from diffgraft.adapters.methods.student import Student
from diffgraft.adapters.ops.all_timesteps import at_all_timesteps
from diffgraft.adapters.strengths import Strength
from diffgraft.bases import Base
from diffgraft.bases.header_config import base_config_metadata
from diffgraft.bases.ldm_keys import layers_per_block_of, ldm_state_dict
from diffgraft.bases.loading import CONFIGS
from diffgraft.bases.modular import MODULAR_INDEX, is_modular
from diffgraft.bases.original_weights import original_state_dict
from diffgraft.bases.prediction import prediction_header, v_pred_markers
from diffgraft.errors import DiffgraftError
from diffgraft.files import check_new, write_safetensors
from diffgraft.generation.graft import AdapterStrengths, graft
from diffgraft.progress import track
from diffgraft.third_party import quiet_libraries


def merge_checkpoint(base: Base, adapters: AdapterStrengths, path: str | Path) -> Path:
    """Write a checkpoint of `base` with `adapters` merged into its weights, and return its path.

    A path that ends in ``.safetensors`` gives a single file in the original layout, any other a diffusers folder. The
    file of a base whose denoiser is a transformer holds that, under the names of its authors' code, without text
    encoders and VAE.
    A student takes the place of the denoiser.
    Weights keep their dtype. T-LoRAs are merged with all of their ranks, with a warning. `base` is left unchanged, and
    the checkpoint appears under its name only when complete.

    Raises:
        DiffgraftError: `path` exists, an adapter holds words or networks, the base is quantised, or its family has no
            single-file layout.
    """
    path = check_new(path)
    if base.quantize != "none":
        raise DiffgraftError(
            f"This base is quantized to {base.quantize}, and adapters can only be merged into unquantized weights: "
            "load it without quantize."
        )
    layers = layers_per_block_of(base)
    loaded: dict[Adapter, Strength] = {}
    for source, value in adapters.items():
        is_adapter = isinstance(source, Adapter)
        adapter = source if isinstance(source, Adapter) else load_adapter(source, layers)
        loaded[at_all_timesteps("The adapter" if is_adapter else str(source), adapter)] = value
    base, loaded = _with_student(base, loaded)
    for adapter in loaded:
        if adapter.tokens or adapter.networks:
            what = "words" if adapter.tokens else "networks"
            raise DiffgraftError(
                f"A {adapter.method} adapter holds {what}, which cannot be merged into weights: leave it out, and "
                "give it when drawing."
            )
    with graft(base, loaded):
        if path.suffix == ".safetensors" and base.family.original is not None:
            original = original_state_dict(base.family.original, base.denoiser.state_dict())
            for slot in base.family.conditioners:
                start = base.family.bundled[slot.component][0]
                own = getattr(base, slot.component).state_dict()
                original |= {f"{start}{name}": value for name, value in own.items()}
            weights = {name: value.detach().contiguous() for name, value in original.items()}
            return write_safetensors(path, weights, {"format": "pt"})
        if path.suffix == ".safetensors":
            weights = {name: value.detach().contiguous() for name, value in ldm_state_dict(base).items()}
            prediction = base.parameterization.name
            weights |= v_pred_markers(base.family.name, prediction, base.zero_snr)
            header = prediction_header(prediction) | base_config_metadata(base, CONFIGS / base.family.name)
            return write_safetensors(path, weights, {"format": "pt", **header})
        return _write_folder(base, path)


def _with_student(base: Base, adapters: dict[Adapter, Strength]) -> tuple[Base, dict[Adapter, Strength]]:
    """Return the base with a student of `adapters`, if they have one, in the place of its denoiser, and the others.

    Raises:
        DiffgraftError: the student has another strength than 1, or does not fit the base.
    """
    others = {}
    for adapter, strength in adapters.items():
        students = [network for network in adapter.networks if isinstance(network, Student)]
        if not students:
            others[adapter] = strength
            continue
        if strength != 1:
            raise DiffgraftError("A student takes the place of the denoiser, and so is merged at the strength 1 alone.")
        denoiser = base.denoiser
        try:
            student = students[0].build(type(denoiser)).to(denoiser.device, denoiser.dtype)
        except ValueError as error:
            raise DiffgraftError(f"The student does not fit this base: {error}.") from error
        changed: dict[str, Any] = {base.family.denoiser: student}
        base = replace(base, **changed)
    return base, others


def _write_folder(base: Base, folder: Path) -> Path:
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quiet_libraries():
            pipe = base.pipeline()
            pipe.save_config(partial)
            parts = {name: part for name, part in pipe.components.items() if part is not None and name in pipe.config}
            if is_modular(pipe):
                _name_folder(partial / MODULAR_INDEX, folder)
            for name, part in track(parts.items(), "writing the checkpoint"):
                part.save_pretrained(partial / name)
                if name.startswith("text_encoder"):
                    _add_text_model_level(partial / name / "model.safetensors", part)
                elif "tokenizer" in name:
                    part.backend_tokenizer.model.save(str(partial / name))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _name_folder(index: Path, folder: Path) -> None:
    """Tell the index of a modular pipeline that its parts are in `folder`, from where diffusers loads them."""
    entries = json.loads(index.read_text("utf-8"))
    for name, entry in entries.items():
        if isinstance(entry, list):
            library, kind = entry[2]["type_hint"]
            place = {"pretrained_model_name_or_path": str(folder), "subfolder": name}
            entries[name] = [library, kind, {**entry[2], **place}]
    index.write_text(json.dumps(entries, indent=2), "utf-8")


def _add_text_model_level(path: Path, encoder: Any) -> None:
    """Rename the weights of a CLIP text encoder so that every version of transformers can read them.

    Newer versions write the names of a ``CLIPTextModel`` without the level ``text_model``, and read both. Versions up
    to 5.5 read only names with that level, and fill missing weights with random numbers.
    """
    if type(encoder).__name__ == "CLIPTextModel":
        weights = {add_text_model(name.removeprefix("text_model.")): value for name, value in load_file(path).items()}
        write_safetensors(path, weights, {"format": "pt"})
