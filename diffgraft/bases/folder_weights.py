"""Weights of a network, from the files in its folder: each of them, in the right shape, and none beyond."""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffgraft.bases.checkpoint_files import FLOAT_DTYPES, files_of_part
from diffgraft.bases.configs import short
from diffgraft.errors import DiffgraftError

UNREAD = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale", "cls.", "position_ids")
"""Weights that files of text encoders may have in addition: CLIP's vision model, heads of BERT"""
_LAYER = re.compile(r"encoder\.layers?\.(\d{1,3})\.")
"""A layer of a text encoder; files of bases with clip skip have more layers than their configurations"""
_RENAMED = {
    "vae": ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")),
    "text": ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")),
}
"""Names in files of earlier versions of the libraries, and their names now"""


def normalizer(part: str) -> Callable[[str], str]:
    """Return a function from names of weights to names that do not depend on the version of the libraries."""
    replacements = _RENAMED.get("vae" if part == "vae" else "text" if part.startswith("text") else "", ())

    def normalize(name: str) -> str:
        for old, new in replacements:
            name = name.replace(old, new)
        plain = name.removeprefix("bert.").removeprefix("text_model.")
        return _of_language_model(plain) if part.startswith("text") else name

    return normalize


def _of_language_model(name: str) -> str:
    """Return the name of a weight without the levels that only newer versions of vision-language models have."""
    return name.removeprefix("model.language_model.").removeprefix("model.")


def fill(network: nn.Module, folder: Path, part: str, *, is_read: bool) -> None:
    """Compare a network on ``meta`` with the headers of its files, and load their weights if `is_read`.

    Raises:
        DiffgraftError: a weight is missing, unknown, of another shape, or not floating-point.
    """
    files = files_of_part(folder)
    if not files:
        raise DiffgraftError(
            f"{folder} has no weights in .safetensors; other files may hold code and are not opened: convert them, "
            "or copy the model's folder again."
        )
    normalize = normalizer(part)
    wanted = {normalize(name): (name, value) for name, value in network.state_dict().items()}
    state: dict[str, Tensor] = {}
    layers = int(getattr(getattr(network, "config", None), "num_hidden_layers", 0))
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (not a mapping)
                    if normalize(key) not in wanted:
                        if part.startswith("text") and (key.endswith(UNREAD) or normalize(key).startswith(UNREAD)):
                            continue
                        if part.startswith("text") and (layer := _layer_beyond(normalize(key), layers)) is not None:
                            raise DiffgraftError(
                                f"{file} holds {key}, but {folder}/config.json has num_hidden_layers={layers}, which "
                                "may have been lowered for clip skip. To use all layers, set num_hidden_layers to "
                                f"{layer + 1} or more; to use {layers}, load the folder with diffusers and save it."
                            )
                        raise DiffgraftError(
                            f"{file} holds {short(key)}, which is not a weight of the {part} that {folder}/config.json "
                            "describes: the two belong to different models."
                        )
                    name, value = wanted[normalize(key)]
                    tensor = opened.get_slice(key)
                    if tensor.get_shape() != [*value.shape]:
                        raise DiffgraftError(
                            f"{file} holds {key} of shape {tensor.get_shape()}, but by {folder}/config.json it is "
                            f"{[*value.shape]}: the two belong to different models."
                        )
                    if tensor.get_dtype() not in FLOAT_DTYPES and value.is_floating_point():
                        raise DiffgraftError(
                            f"{file} holds {key} in {tensor.get_dtype()}; weights must be float32 or half precision."
                        )
                    state[name] = opened.get_tensor(key).clone() if is_read else value
        except (SafetensorError, OSError) as error:
            raise DiffgraftError(f"{file} is not a readable .safetensors file ({error}); copy it again.") from error
    missing = [name for name, _ in wanted.values() if name not in state and name not in tied_names(network)]
    if missing:
        raise DiffgraftError(
            f"{folder} lacks {len(missing)} of the {len(wanted)} weights that its config.json describes, such as "
            f"{missing[0]}: copy the model's folder again."
        )
    if is_read:
        assign(network, state)


def tied_names(network: nn.Module) -> Collection[str]:
    """Return the names of weights that another one stands for, which files do not have."""
    names: Collection[str] = getattr(network, "all_tied_weights_keys", ())
    return names


def assign(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network on ``meta`` its weights, all in the dtype of most of them."""
    dtype = _most_common_dtype(state)
    values = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    tied = tied_names(network)
    network.load_state_dict(values, strict=not tied, assign=True)
    if tied:
        network.tie_weights()  # type: ignore[operator]
    _fill_buffers(network)


def _layer_beyond(name: str, layers: int) -> int | None:
    """Return the index of a weight's layer if a text encoder with `layers` layers does not have it, else None."""
    match = _LAYER.match(name)
    return int(match[1]) if match and int(match[1]) >= layers else None


def _most_common_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of most numbers, apart from those in float8, which every other dtype holds exactly."""
    counts: dict[torch.dtype, int] = {torch.bfloat16: 0}
    for value in filter(Tensor.is_floating_point, state.values()):
        if value.element_size() > 1:
            counts[value.dtype] = counts.get(value.dtype, 0) + value.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def _fill_buffers(network: nn.Module) -> None:
    """Fill the buffers of text encoders, position and token type ids, which are in no file."""
    for path, module in network.named_modules():
        for name, value in module.named_buffers(recurse=False):
            if not value.is_meta:
                continue
            if name == "position_ids":
                setattr(module, name, torch.arange(value.shape[-1]).expand(value.shape).contiguous())
            elif name == "token_type_ids":
                setattr(module, name, torch.zeros(value.shape, dtype=torch.long))
            else:
                raise DiffgraftError(f"{type(network).__name__} has a buffer {path}.{name} that is in no file.")
