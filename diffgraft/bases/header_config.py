"""The configuration of a base in the header of its single file, so that a UNet of any depth and width is read again.

Checkpoints in the original layout hold weights alone: numbers of heads, groups of norms, the VAE's factor and the noise
schedule are those of the family, unless the header says otherwise under `CONFIG_KEY`. Other programs do not read it.
"""

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffgraft.bases.base import Base
from diffgraft.bases.configs import ClipConfig
from diffgraft.errors import DiffgraftError

CONFIG_KEY = "diffgraft.configuration"
"""In the header: a JSON object, part → field → value"""
_LARGEST = 2**20
"""Characters of a configuration; those of real bases have a few hundred"""

ConfigOverrides = Mapping[str, Mapping[str, Any]]
"""Part → field → value, of what differs from the family's configuration"""


def config_header(base: Base, family: Path) -> dict[str, str]:
    """The header entry for what differs between a base and the configuration of its family in the folder `family`.

    Empty where nothing does.
    """
    own: dict[str, Mapping[str, Any]] = {"unet": base.unet.config, "vae": base.vae.config}
    for name in base.family.single_file_prefixes:
        config = getattr(base, name).config
        own[name] = {field: getattr(config, field) for field in ClipConfig.model_fields}
    own["scheduler"] = {**base.scheduler.config, "_class_name": type(base.scheduler).__name__}
    found: dict[str, dict[str, Any]] = {}
    for part, values in own.items():
        usual = json.loads(_file_of(family, part).read_text("utf-8"))
        usual = {**_defaults(part, values), **usual}
        plain = json.loads(json.dumps({key: value for key, value in values.items() if _is_said(key)}, default=str))
        found[part] = {key: value for key, value in plain.items() if value != usual.get(key)}
    found = {part: values for part, values in found.items() if values}
    return {CONFIG_KEY: json.dumps(found, sort_keys=True)} if found else {}


def read_config_overrides(path: Path, header: Mapping[str, str]) -> ConfigOverrides:
    """What the header of a single file says of its configuration; what it says is checked where a base is built of it.

    Raises:
        DiffgraftError: it says something else than fields of parts.
    """
    text = header.get(CONFIG_KEY, "{}")
    try:
        if len(text) > _LARGEST:
            raise ValueError(f"it has {len(text):,} characters")
        found = json.loads(text)
        if not isinstance(found, dict) or not all(isinstance(values, dict) for values in found.values()):
            raise ValueError("it is not a mapping of parts to their fields")
    except (ValueError, RecursionError) as error:
        raise DiffgraftError(
            f"The header of {path} has a damaged {CONFIG_KEY} ({error}): write the file again."
        ) from error
    return found


def write_config_overrides(folder: Path, stated: ConfigOverrides, channels: int) -> None:
    """Lay what a file says over the family's configuration in `folder`; its UNet takes so many `channels`."""
    for part in ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler"):
        path = _file_of(folder, part)
        if path.is_file():
            values = {**json.loads(path.read_text("utf-8")), **stated.get(part, {})}
            path.write_text(json.dumps({**values, "in_channels": channels} if part == "unet" else values), "utf-8")
    if kind := stated.get("scheduler", {}).get("_class_name"):
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", kind]}), "utf-8")


def copy_config(folder: Path, place: Path) -> Path:
    """A copy of the configuration in `folder` that can be changed."""
    return Path(shutil.copytree(folder, place / folder.name, ignore=shutil.ignore_patterns("*.safetensors")))


def _file_of(folder: Path, part: str) -> Path:
    return folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")


def _is_said(key: str) -> bool:
    """Whether a field is said: none of the library's own notes, and not `clip_sample`, as latents are never clipped."""
    return key == "_class_name" or not (key.startswith("_") or key == "clip_sample")


def _defaults(part: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Values that the library takes for fields a configuration does not give."""
    if part.startswith("text_encoder"):
        return {name: info.default for name, info in ClipConfig.model_fields.items()}
    import diffusers

    usual = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    parameters = inspect.signature(getattr(diffusers, usual.get(part) or str(config["_class_name"]))).parameters
    said = {name: one.default for name, one in parameters.items() if one.default is not one.empty}
    plain: dict[str, Any] = json.loads(json.dumps(said, default=str))
    return plain
