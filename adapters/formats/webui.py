"""What stable-diffusion-webui and ComfyUI both read and take to mean the same: kohya's files, with what fails refused.

Hypernetworks become the ``.pt`` files of webui, words the files of `embedding`.
Tried or read in the sources of AUTOMATIC1111/stable-diffusion-webui v1.10.1 and ComfyUI a125cd84.
"""

from pathlib import Path

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Dialect, store_safetensors
from diffgraft.adapters.formats import embedding, kohya, webui_hypernetwork
from diffgraft.adapters.formats.elsewhere import torn_attention, trouble
from diffgraft.files import atomic_write

_LAST_NORM = "lora_unet_conv_norm_out."


def suffix(adapter: Adapter) -> str:
    """``.pt`` for hypernetworks, and ``.safetensors`` for all else."""
    return ".pt" if adapter.networks else ".safetensors"


def store(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> Path:
    """Write the file. Raises ValueError where webui does not list files of such a name."""
    if not webui_hypernetwork.recognises(tensors, header):
        return store_safetensors(path, tensors, header)
    if path.suffix != ".pt":
        raise ValueError(f"webui lists hypernetworks that end in .pt: give {path.with_suffix('.pt').name} as a name")
    with atomic_write(path) as partial:
        torch.save(webui_hypernetwork.nested(tensors, header), partial)
    return path


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header. Raises ValueError where webui or ComfyUI would not do what the adapter does."""
    if adapter.networks:
        return webui_hypernetwork.write(adapter)
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


DIALECT = Dialect(
    name="webui",
    summary="files that webui and ComfyUI both read, and take to mean the same",
    order=120,
    write=write,
    store=store,
    suffix=suffix,
    holds_networks=True,
)
