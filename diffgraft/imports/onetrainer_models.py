"""Families of models in OneTrainer's configurations, and what is said otherwise for those of flow matching."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffgraft.errors import DiffgraftError
from diffgraft.imports.flow import drop_meaningless
from diffgraft.imports.import_report import ImportReport, short


@dataclass(frozen=True)
class Model:
    """A family of models, as far as settings differ for it."""

    encoders: tuple[str, ...] = ("text_encoder",)
    """Text encoders with rates of their own"""
    frozen: str = ""
    """A text encoder that is trained only where OneTrainer says so in a group that is not read"""
    is_flow: bool = False


_TWO = ("text_encoder", "text_encoder_2")
_FLOW = {
    "STABLE_DIFFUSION_3": Model(_TWO, "text_encoder_3", is_flow=True),
    "STABLE_DIFFUSION_35": Model(_TWO, "text_encoder_3", is_flow=True),
    "FLUX_DEV_1": Model(_TWO, is_flow=True),
    "FLUX_2": Model(is_flow=True),
    "Z_IMAGE": Model(is_flow=True),
    "QWEN": Model(is_flow=True),
    "KREA_2": Model(is_flow=True),
}


def model_of(report: ImportReport) -> Model:
    """Return the family that a configuration is for.

    Raises:
        DiffgraftError: recipes do not train it.
    """
    name = report.text("model_type")
    if name in _FLOW:
        return _FLOW[name]
    if not name.startswith("STABLE_DIFFUSION_") or "DEPTH" in name:
        raise DiffgraftError(
            f"model_type={short(name)} is not supported: only Stable Diffusion 1.x, 2.x, XL and 3, FLUX.1 dev, FLUX.2 "
            "klein, Z-Image, Qwen-Image and Krea 2 are."
        )
    return Model(_TWO) if "_XL_" in name else Model()


def read_transformer(report: ImportReport, settings: Any) -> None:
    """Let `settings`, those of the transformer, take the place of the UNet's, which a configuration has as well."""
    for key in [key for key in report.values if key.startswith("unet.")]:
        del report.values[key]
        report.unread.append(key)
    for key, value in settings.items() if isinstance(settings, Mapping) else ():
        report.values[f"unet.{key}"], report.file_keys[f"unet.{key}"] = value, f"transformer.{key}"


def map_flow(report: ImportReport, model: Model) -> None:
    """Map what only transformers have; what has no meaning for flow matching is dropped from the recipe."""
    drop_meaningless(report)
    if report.text("unet.model_name"):
        report.map("components", report.text("base_model_name"), "base_model_name")
        report.map("base", report.text("unet.model_name"), "unet.model_name")
    if report.flag("dynamic_timestep_shifting"):
        report.map("timesteps.shift", "size", "dynamic_timestep_shifting")
    if report.is_set("unet.guidance_scale"):
        report.drop("unet.guidance_scale", "FLUX.1 dev is trained at an embedded guidance of 1.")
    if report.text("model_type") == "FLUX_2":
        report.drop("model_type", "of FLUX.2 only klein is supported.")
    if model.frozen and report.recipe.get("text_encoder"):
        report.recipe["lr_scale"] = {**report.recipe.get("lr_scale", {}), model.frozen: 0.0}
