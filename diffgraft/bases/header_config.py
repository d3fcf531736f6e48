"""The configuration of a base in the header of its single file, for UNets of any depth and width.

Checkpoints in the original layout only hold weights. Numbers of heads, groups of norms, the scaling of latents and the
noise schedule are those of the family, unless the header overrides them under `CONFIG_KEY`, which only diffgraft reads.
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
"""Header key of a JSON object: part → field → value"""
_MAX_LENGTH = 2**20
"""Characters of a configuration at most; those of real bases have a few hundred"""

ConfigOverrides = Mapping[str, Mapping[str, Any]]
"""Part → field → value, for fields that differ from the family's configuration"""


def base_config_metadata(base: Base, family: Path) -> dict[str, str]:
    """Return the header entry for fields in which a base differs from its family's configuration; empty if in none.

    Args:
        base: the base.
        family: folder with the configuration of its family.
    """
    own: dict[str, Mapping[str, Any]] = {"unet": base.unet.config, "vae": base.vae.config}
    for name in base.family.single_file_prefixes:
        config = getattr(base, name).config
        own[name] = {field: getattr(config, field) for field in ClipConfig.model_fields}
    own["scheduler"] = {**base.scheduler.config, "_class_name": type(base.scheduler).__name__}
    overrides: dict[str, dict[str, Any]] = {}
    for part, values in own.items():
        usual = json.loads(_config_file(family, part).read_text("utf-8"))
        usual = {**_defaults(part, values), **usual}
        plain = json.loads(json.dumps({key: value for key, value in values.items() if _is_written(key)}, default=str))
        overrides[part] = {key: value for key, value in plain.items() if value != usual.get(key)}
    overrides = {part: values for part, values in overrides.items() if values}
    return {CONFIG_KEY: json.dumps(overrides, sort_keys=True)} if overrides else {}


def read_config_overrides(path: Path, header: Mapping[str, str]) -> ConfigOverrides:
    """Read the configuration from the header of a single file; its values are checked when a base is built.

    Raises:
        DiffgraftError: the header entry is not a mapping of parts to their fields.
    """
    text = header.get(CONFIG_KEY, "{}")
    try:
        if len(text) > _MAX_LENGTH:
            raise ValueError(f"it has {len(text):,} characters")
        overrides = json.loads(text)
        if not isinstance(overrides, dict) or not all(isinstance(values, dict) for values in overrides.values()):
            raise ValueError("it is not a mapping of parts to their fields")
    except (ValueError, RecursionError) as error:
        raise DiffgraftError(
            f"The header of {path} has a damaged {CONFIG_KEY} ({error}): save or download the file again."
        ) from error
    return overrides


def write_config_overrides(folder: Path, overrides: ConfigOverrides, channels: int) -> None:
    """Apply overrides, and the number of input channels of the UNet, to the configuration files in `folder`."""
    for part in ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler"):
        path = _config_file(folder, part)
        if path.is_file():
            values = {**json.loads(path.read_text("utf-8")), **overrides.get(part, {})}
            path.write_text(json.dumps({**values, "in_channels": channels} if part == "unet" else values), "utf-8")
    if kind := overrides.get("scheduler", {}).get("_class_name"):
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", kind]}), "utf-8")


def copy_config(folder: Path, parent: Path) -> Path:
    """Copy the configuration in `folder`, without weights, into the folder `parent`, and return the copy's path."""
    return Path(shutil.copytree(folder, parent / folder.name, ignore=shutil.ignore_patterns("*.safetensors")))


def _config_file(folder: Path, part: str) -> Path:
    return folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")


def _is_written(key: str) -> bool:
    """Whether a field is written: private ones are not, nor is `clip_sample`, as latents are never clipped."""
    return key == "_class_name" or not (key.startswith("_") or key == "clip_sample")


def _defaults(part: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the library's defaults for fields that a configuration lacks."""
    if part.startswith("text_encoder"):
        return {name: info.default for name, info in ClipConfig.model_fields.items()}
    import diffusers

    usual = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    parameters = inspect.signature(getattr(diffusers, usual.get(part) or str(config["_class_name"]))).parameters
    defaults = {name: item.default for name, item in parameters.items() if item.default is not item.empty}
    plain: dict[str, Any] = json.loads(json.dumps(defaults, default=str))
    return plain
