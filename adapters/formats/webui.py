"""What stable-diffusion-webui and ComfyUI both read and take to mean the same: kohya's files, with what fails refused.

Hypernetworks become the ``.pt`` files of webui, words the files of `embedding`.
Tried or read in the sources of AUTOMATIC1111/stable-diffusion-webui v1.10.1 and ComfyUI a125cd84.
"""

from pathlib import Path

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.formats import embedding, kohya, webui_hypernetwork
from diffgraft.adapters.formats.elsewhere import is_unread
from diffgraft.files import atomic_write, check_suffix, write_safetensors

_LAST_NORM = "lora_unet_conv_norm_out."
_READ = ("lora", "loha", "lokr", "full", "oft", "boft")


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
            if reason := _trouble(path, delta):
                raise ValueError(f"{path} is {reason}")
    _refuse_torn_attention(adapter)
    tensors, header = kohya.write(adapter)
    # webui knows this one norm of diffusers' UNet by the original's name alone, and ComfyUI knows both
    return {key.replace(_LAST_NORM, "lora_unet_out_0."): value for key, value in tensors.items()}, header


def _trouble(path: str, delta: Delta) -> str | None:
    """Why one of the two would not do what it should; None where both do."""
    if delta.kind not in _READ:
        return f"{delta.kind}, which webui or ComfyUI does not read"
    if isinstance(delta, DoraDelta) and not delta.of_inputs:
        return "a DoRA by outputs, which webui takes for one by inputs, without saying so"
    if delta.kind == "full" and is_unread(path):
        return "a full difference of a norm or an embedding in a text encoder, which webui and ComfyUI leave out"
    if "lokr_t2" in delta.leaves:
        return "a LoKr in its Tucker variant, with which ComfyUI fails"
    if delta.kind in ("oft", "boft") and (delta.alpha or "rescale" in delta.leaves):
        return f"{delta.kind} with a bound or a rescaling, which ComfyUI leaves away"
    return None


def _refuse_torn_attention(adapter: Adapter) -> None:
    """Webui changes the attention of OpenCLIP's text encoders only where all four layers come together."""
    family = (adapter.metadata.get("base") or {}).get("family")
    open_clip = {"sd2": "text_encoder", "sdxl": "text_encoder_2"}.get(str(family), "text_encoder_2")
    layers: dict[str, set[str]] = {}
    for path in adapter.deltas:
        start, attention, name = path.partition(".self_attn.")
        if attention and start.startswith(f"{open_clip}."):
            layers.setdefault(start, set()).add(name)
    for start, names in layers.items():
        if len(names) < 4:
            raise ValueError(
                f"{start}.self_attn has {', '.join(sorted(names))} alone, and webui needs all four layers of it"
            )
