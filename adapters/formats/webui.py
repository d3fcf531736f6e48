"""Files that stable-diffusion-webui and ComfyUI both read correctly: kohya's files, without contents that fail there.

Hypernetworks become the ``.pt`` files of webui, words the files of `embedding`. Verified by running, or by reading the
sources of, AUTOMATIC1111/stable-diffusion-webui v1.10.1 and ComfyUI a125cd84.
"""

from pathlib import Path

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Dialect, store_safetensors
from diffgraft.adapters.formats import embedding, kohya, webui_hypernetwork
from diffgraft.adapters.formats.compatibility import incomplete_attention, webui_problem
from diffgraft.adapters.formats.original_names import is_for_transformer
from diffgraft.files import atomic_write

_LAST_NORM = "lora_unet_conv_norm_out."


def suffix(adapter: Adapter) -> str:
    """``.pt`` for hypernetworks, and ``.safetensors`` for everything else."""
    return ".pt" if adapter.networks else ".safetensors"


def store(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> Path:
    """Write the file, and return its path. Raises ValueError if webui does not list files with such a name."""
    if not webui_hypernetwork.recognises(tensors, header):
        return store_safetensors(path, tensors, header)
    if path.suffix != ".pt":
        raise ValueError(f"webui lists only hypernetworks that end in .pt: name it {path.with_suffix('.pt').name}")
    with atomic_write(path) as partial:
        torch.save(webui_hypernetwork.nested_contents(tensors, header), partial)
    return path


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header. Raises ValueError for contents that webui or ComfyUI misreads."""
    if adapter.networks:
        return webui_hypernetwork.write(adapter)
    if not adapter.deltas:
        return embedding.write_nameless(adapter)
    if is_for_transformer(adapter):
        raise ValueError("it is for a transformer, which webui does not draw with: use kohya, which ComfyUI reads")
    for path, deltas in adapter.deltas.items():
        for delta in deltas:
            if reason := webui_problem(path, delta):
                raise ValueError(f"{path} is {reason}")
        if len(deltas) > 1 and any(set(delta.leaves) == {"diff_b"} for delta in deltas):
            raise ValueError(f"{path} has a difference of its bias beside other factors, which webui ignores")
    if ignored := incomplete_attention(adapter):
        raise ValueError(f"webui would ignore {ignored}")
    tensors, header = kohya.write(adapter)
    # webui knows this norm of diffusers' UNet only by its original name, and ComfyUI knows both names
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
