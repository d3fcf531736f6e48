"""Text encoders and VAE in a single file beside a transformer, as ComfyUI and Stability AI write them.

Text encoders have the names of transformers behind their prefixes, and the VAE those of CompVis' ldm. Their
configurations are those of the components that the user names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffgraft.bases.checkpoint_files import FLOAT_DTYPES
from diffgraft.bases.family import Family
from diffgraft.bases.folder import empty_network
from diffgraft.bases.folder_weights import UNREAD, assign, normalizer, tied_names
from diffgraft.bases.ldm_keys import ldm_vae_key
from diffgraft.bases.stored_tensors import StoredTensor
from diffgraft.bases.tensor_files import TensorFile
from diffgraft.errors import DiffgraftError

_EXTRA = (*UNREAD, "spiece_model")
"""Endings of names that text encoders in such files have beside their weights"""


def bundled_parts(
    file: TensorFile, family: Family, components: Path, index: Mapping[str, tuple[str, str]], *, is_read: bool
) -> dict[str, nn.Module]:
    """Build the parts that a file holds beside the transformer.

    Args:
        file: the open file.
        family: family of its transformer.
        components: folder with the configuration of each part.
        index: part → library and class, by the components' index.
        is_read: whether weights are read; if not, the networks stay on the device ``meta``.

    Raises:
        DiffgraftError: a part is not whole, or not of this configuration, or the components have no such part.
    """
    parts: dict[str, nn.Module] = {}
    for part, prefixes in family.bundled.items():
        prefix = next((start for start in prefixes if any(name.startswith(start) for name in file.tensors)), None)
        if prefix is None:
            continue
        if part not in index:
            raise DiffgraftError(
                f"{file.path} holds {prefix}…, the {part} of a {family.name}, but {components} has no configuration of "
                "it: give components with one."
            )
        network: Any = empty_network(components / part, *index[part], has_flow=True)
        tensors = {name.removeprefix(prefix): file.tensors[name] for name in file.tensors if name.startswith(prefix)}
        state = _state(network, part, tensors, f"{file.path} holds {prefix}")
        if is_read:
            shapes = {name: value.shape for name, value in network.state_dict().items()}
            assign(network, {name: tensor.read().reshape(shapes[name]).clone() for name, tensor in state.items()})
        parts[part] = network.eval()
    return parts


def _state(network: Any, part: str, tensors: Mapping[str, StoredTensor], problem: str) -> dict[str, StoredTensor]:
    """Return the tensor of each weight of a network.

    Raises:
        DiffgraftError: a weight is missing, unknown, of another shape, or not floating-point.
    """
    wanted = network.state_dict()
    normalize = normalizer(part)
    if part == "vae":
        levels = len(network.config.block_out_channels)
        names = {ldm_vae_key(name, levels): name for name in wanted}
    else:
        names = {normalize(name): name for name in wanted}
    state: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        name = names.get(key if part == "vae" else normalize(key))
        if name is None:
            if part != "vae" and (key.endswith(_EXTRA) or normalize(key).startswith(_EXTRA)):
                continue
            raise DiffgraftError(
                f"{problem}{key}, which the {part} of the components does not have: give components= a "
                "diffusers folder of the same architecture."
            )
        shape = tuple(wanted[name].shape)
        # a matrix of the VAE's attention is a 1 x 1 convolution in the original
        if tensor.shape != shape and tensor.shape != (*shape, 1, 1):
            raise DiffgraftError(
                f"{problem}{key} of shape {[*tensor.shape]}, but for the {part} that the components describe it is "
                f"{[*shape]}."
            )
        if tensor.kind not in FLOAT_DTYPES and wanted[name].is_floating_point():
            raise DiffgraftError(f"{problem}{key} in {tensor.kind}; weights must be floating-point.")
        state[name] = tensor
    if missing := [name for name in wanted if name not in state and name not in tied_names(network)]:
        raise DiffgraftError(f"{problem}… without {len(missing)} of the weights of a {part}, such as {missing[0]}.")
    return state
