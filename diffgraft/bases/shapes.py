"""Shapes of the layers of known bases, computed from their configurations without allocating weights."""

import json
from functools import cache
from pathlib import Path

import torch
from torch import nn

from diffgraft.bases.loading import CONFIGS, TINY
from diffgraft.third_party import quiet_libraries

Shape = tuple[int, ...]
KNOWN: dict[str, Path] = {"tiny": TINY, **{name: CONFIGS / name for name in ("sd1", "sd2", "sdxl")}}
"""Name of a base, or of a family for its usual configuration → folder of the configuration"""

FAMILY = {name: "sd1" if name == "tiny" else name for name in KNOWN}
"""Name of a known base → its family"""


@cache
def layer_shapes(name: str) -> dict[str, Shape]:
    """Return module path → shape of its weight, for all modules of a base; `name` is a key of `KNOWN`."""
    return {
        f"{part}.{path.removeprefix('text_model.')}": tuple(module.weight.shape)
        for part, root in _parts(KNOWN[name]).items()
        for path, module in root.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }


def _parts(folder: Path) -> dict[str, nn.Module]:
    with quiet_libraries():
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"), quiet_libraries():
        config = json.loads((folder / "unet" / "config.json").read_text("utf-8"))
        parts: dict[str, nn.Module] = {"unet": UNet2DConditionModel.from_config(config)}
        for part, kind in classes.items():
            if (folder / part / "config.json").is_file():
                parts[part] = kind(CLIPTextConfig.from_pretrained(folder / part))
    return parts
