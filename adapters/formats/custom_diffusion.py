"""Custom Diffusion as diffusers saves it: ``<attention>.processor.to_k_custom_diffusion.weight``.

Files hold the keys and values of the cross-attentions and, if they were trained too, queries and outputs: new weights,
not differences. A folder holds them as ``pytorch_custom_diffusion_weights.safetensors``, and each learned word in a
file of `embedding`, such as ``<new1>.safetensors``. Diffusers reads a file only if it names the processors of all
attentions, those without weights with nothing: it writes ``{}`` for them into pickles, and leaves them out of its own
safetensors files, which it then refuses. It also reads an empty tensor as nothing, which is what is written here.
Source: diffusers 0.42.1, ``models/attention_processor.py`` and ``loaders/unet.py``.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats import embedding
from diffgraft.adapters.formats.header import read_metadata, write_metadata
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.formats.reader import open_file
from diffgraft.adapters.registry import read_delta
from diffgraft.files import write_safetensors

WEIGHTS = "pytorch_custom_diffusion_weights.safetensors"
_OLD_WEIGHTS = "pytorch_custom_diffusion_weights.bin"
"""Name of the weights as a pickle, which is opened with ``weights_only=True``"""
_KEY = re.compile(
    r"(?:unet\.)?(?P<path>[\w.]+)\.processor\.to_(?P<layer>q|k|v|out)_custom_diffusion(?:\.0)?\.(?P<leaf>weight|bias)"
)
_PATH = re.compile(r"unet\.(?P<block>[\w.]+)\.attn2\.to_(?P<layer>q|k|v|out)(?P<zero>\.0)?")
_SELF_ATTENTION = "attn1"


def open_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Read the tensors and the header of a folder with such weights and words; None if `path` is not such a folder."""
    weights = next((path / name for name in (WEIGHTS, _OLD_WEIGHTS) if (path / name).is_file()), None)
    if weights is None:
        return None
    tensors, header = open_file(weights)
    others = (file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".bin"))
    for file in others:
        if file.name not in (WEIGHTS, _OLD_WEIGHTS):
            contents = open_file(file)
            if embedding.recognises(*contents):  # a folder also holds what training needs, such as states of optimizers
                tensors |= embedding.bundle(embedding.read(*contents).tokens)
    return tensors, header


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the keys look like this dialect."""
    return any(_KEY.fullmatch(key) for key in tensors)


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Build the adapter. Raises ValueError for an unknown key, or for a module with missing tensors."""
    modules: dict[str, dict[str, Tensor]] = {}
    bundled = {key: value for key, value in tensors.items() if embedding.is_bundled(key)}
    for key, value in tensors.items():
        if key in bundled or (key.endswith(".processor") and value.numel() == 0):
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise UnknownKeyError(key, "<attention>.processor.to_<q, k, v or out>_custom_diffusion.weight")
        layer = "to_out.0" if match["layer"] == "out" else f"to_{match['layer']}"
        modules.setdefault(f"unet.{match['path']}.{layer}", {})[match["leaf"]] = value
    deltas = {}
    for path, leaves in modules.items():
        try:
            deltas[path] = (read_delta("replacement", leaves, None),)
        except ValueError as error:
            raise ValueError(f"the tensors of {path} are incomplete: {error}") from error
    tokens = embedding.read(bundled, {}).tokens if bundled else {}
    inferred = {"method": "custom", **({"trigger": next(iter(tokens))} if tokens else {})}
    return Adapter(deltas, read_metadata(header, **inferred), tokens=tokens)


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header in the form of `open_folder`. Raises ValueError for contents such files cannot hold."""
    if not adapter.deltas:
        raise ValueError("it holds no weights, which these files require")
    tensors: dict[str, Tensor] = {}
    for path, deltas in adapter.deltas.items():
        match = _PATH.fullmatch(path)
        if match is None or (match["layer"] == "out") != bool(match["zero"]):
            raise ValueError(f"it changes {path}, but such files hold only projections of cross-attention")
        if len(deltas) != 1 or deltas[0].kind != "replacement":
            raise ValueError(
                f"{path} holds a delta of kind {deltas[0].kind}, but such files hold new weights: make them by "
                "`diffgraft convert --to custom-diffusion --base BASE`"
            )
        start, zero = f"{match['block']}.attn2.processor.to_{match['layer']}", match["zero"] or ""
        for name, leaf in deltas[0].leaves.items():
            tensors[f"{start}_custom_diffusion{zero}.{name}"] = leaf.contiguous()
        tensors[f"{match['block']}.{_SELF_ATTENTION}.processor"] = torch.zeros(0)
    return tensors | embedding.bundle(adapter.tokens), {"format": "pt", **write_metadata(adapter)}


def store(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> Path:
    """Write a folder atomically, and return its path. Raises ValueError if `path` exists, or ends in .safetensors."""
    if path.suffix == ".safetensors" or path.exists():
        raise ValueError(f"it becomes a folder: give the name of a new folder instead of {path}")
    bundled = {key: value for key, value in tensors.items() if embedding.is_bundled(key)}
    partial = path.with_name(f".{path.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        weights = {key: value for key, value in tensors.items() if key not in bundled}
        write_safetensors(partial / WEIGHTS, weights, header)
        tokens = embedding.read(bundled, {}).tokens if bundled else {}
        for word, vectors in tokens.items():
            write_safetensors(
                partial / f"{_file_name(word)}.safetensors", *embedding.write(Adapter(tokens={word: vectors}))
            )
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _file_name(word: str) -> str:
    """Name of a word's file: the word, as diffusers' script names it, without characters that separate folders."""
    return re.sub(r"[/\\:\0]+", "", word) or "word"


def suffix(adapter: Adapter) -> str:  # noqa: ARG001  (all are folders)
    """Empty suffix, as the result is a folder."""
    return ""


DIALECT = Dialect(
    name="custom-diffusion",
    summary="folders of Custom Diffusion as diffusers saves it",
    order=55,  # before `embedding`, which recognises the keys of words too
    recognises=recognises,
    read=read,
    write=write,
    store=store,
    open=open_folder,
    suffix=suffix,
    holds_new_weights=True,
    note="diffusers loads it by unet.load_attn_procs(FOLDER, weight_name=FILE, _pipeline=pipe), its words as textual "
    "inversion; other programs do not read it.",
)
