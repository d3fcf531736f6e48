"""ControlNet-LLLite of kohya's sd-scripts, as ComfyUI's node reads it: ``lllite_unet_<module>.<leaf>``.

<module> is the path of a layer in the original layout of the UNet, with ``_`` for ``.``, and <leaf> a name inside of
the network at its input, such as ``conditioning1.0.weight`` or ``up.0.bias``.
Sources: kohya-ss/sd-scripts, ``networks/control_net_lllite.py``; kohya-ss/ControlNet-LLLite-ComfyUI,
``node_control_net_lllite.py``.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Contents, Dialect
from diffgraft.adapters.formats.families import usual_layers
from diffgraft.adapters.formats.header import read_metadata, write_metadata
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.registry import read_network
from diffgraft.bases.ldm_keys import MAX_LEVELS, BlockLayout

KIND = "lllite"
_PREFIX = "lllite_unet_"
_INNER = (
    *(f"attn{number}_to_{letter}" for number in (1, 2) for letter in "qkv"),
    *("attn1_to_out_0", "attn2_to_out_0", "ff_net_0_proj", "ff_net_2"),
)
"""Layers of a transformer block, with ``_`` for ``.``"""
_MODULE = re.compile(
    r"(?P<block>(?:input|output)_blocks_\d+_\d+|middle_block_\d+)_"
    rf"(?:(?P<around>proj_in|proj_out)|transformer_blocks_(?P<number>\d+)_(?P<inner>{'|'.join(_INNER)}))"
)
_DOTTED = {inner: re.sub(r"(?<!to)_", ".", inner) for inner in _INNER}


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether a key is that of a ControlNet-LLLite."""
    return any(key.startswith(_PREFIX) for key in tensors)


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str], layers: int | None = None) -> Adapter:
    """Build the adapter; without `layers`, those of the header count, and else 2. Raises ValueError for other keys."""
    metadata = read_metadata(header, method=KIND)
    blocks = BlockLayout(layers or usual_layers(metadata), (True,) * MAX_LEVELS)
    renamed = {_path(key, blocks): value for key, value in tensors.items()}
    return Adapter({}, metadata, (read_network(KIND, renamed, {}),))


def _path(key: str, blocks: BlockLayout) -> str:
    """Return the name of a weight by diffusers' path of its layer. Raises ValueError for an unknown key."""
    module, dot, leaf = key.removeprefix(_PREFIX).partition(".")
    found = _MODULE.fullmatch(module)
    if found is None or not dot or not key.startswith(_PREFIX):
        raise UnknownKeyError(key, f"{_PREFIX}<layer of an attention>.<leaf> of a ControlNet-LLLite")
    block = re.sub(r"_(?=\d)", ".", found["block"])
    inner = found["around"] or f"transformer_blocks.{found['number']}.{_DOTTED[found['inner']]}"
    return f"{blocks.to_diffusers(f'{block}.{inner}')}.{leaf}"


def write(adapter: Adapter) -> Contents:
    """Return tensors and header. Raises ValueError for anything but a single ControlNet-LLLite."""
    if adapter.deltas or adapter.tokens or [network.kind for network in adapter.networks] != [KIND]:
        raise ValueError("such files hold one ControlNet-LLLite and nothing else")
    blocks = BlockLayout(usual_layers(adapter.metadata), (True,) * MAX_LEVELS)
    tensors = {}
    for name, value in adapter.networks[0].tensors.items():
        path, *leaf = name.rsplit(".", 3)
        tensors[f"{_PREFIX}{blocks.to_ldm(path).replace('.', '_')}.{'.'.join(leaf)}"] = value
    return tensors, {"format": "pt", **write_metadata(adapter)}


DIALECT = Dialect(
    name="lllite",
    summary="kohya's ControlNet-LLLite, as ComfyUI's node reads them",
    order=16,
    recognises=recognises,
    read=read,
    write=write,
    auto=36,
    holds_networks=True,
    note="ComfyUI's node for ControlNet-LLLite reads the file, for Stable Diffusion XL.",
)
