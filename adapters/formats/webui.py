"""What stable-diffusion-webui and ComfyUI both read and take to mean the same: kohya's files, with what fails refused.

Hypernetworks become the ``.pt`` files of webui, words the files of `embedding`.
Tried or read in the sources of AUTOMATIC1111/stable-diffusion-webui v1.10.1 and ComfyUI a125cd84.
"""

from pathlib import Path

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import embedding, kohya, webui_hypernetwork
from diffgraft.adapters.formats.elsewhere import torn_attention, trouble
from diffgraft.files import atomic_write, check_suffix, write_safetensors

_LAST_NORM = "lora_unet_conv_norm_out."


def recognises(*_: object) -> bool:
    """Its files are of the dialects that it writes."""
    return False


def save(adapter: Adapter, path: Path) -> Path:
    """Write the file. Raises ValueError where webui or ComfyUI would do something else with it, or nothing."""
    if adapter.networks:
        if path.suffix != ".pt":
            raise ValueError(
                f"webui lists hypernetworks that end in .pt: give {path.with_suffix('.pt').name} as a name"
            )
        held = webui_hypernetwork.write(adapter)
        if held["is_layer_norm"] and not held["activate_output"] and held["activation_func"] != "linear":
            raise ValueError(
                "it is a hypernetwork with layer norms and no activation behind its last layer, where ComfyUI puts one"
            )
        with atomic_write(path) as partial:
            torch.save(held, partial)
        return path
    tensors, header = write(adapter)
    check_suffix(path)
    return write_safetensors(path, tensors, header)


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of what is no hypernetwork."""
    if not adapter.deltas:
        return embedding.write_nameless(adapter)
    for path, deltas in adapter.deltas.items():
        for delta in deltas:
            if reason := trouble(path, delta):
                raise ValueError(f"{path} is {reason}")
        if len(deltas) > 1 and any(set(delta.leaves) == {"diff_b"} for delta in deltas):
            raise ValueError(f"{path} has a difference of its bias beside other factors, which webui leaves out")
    if torn := torn_attention(adapter):
        raise ValueError(f"webui would leave out {torn}")
    tensors, header = kohya.write(adapter)
    # webui knows this one norm of diffusers' UNet by the original's name alone, and ComfyUI knows both
    return {key.replace(_LAST_NORM, "lora_unet_out_0."): value for key, value in tensors.items()}, header
