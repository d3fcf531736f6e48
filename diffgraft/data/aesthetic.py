"""Aesthetic embeddings, made from a folder of pictures, and the projection that prompts are compared with them by."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.methods.aesthetic import AestheticEmbedding, AestheticOptions, end_positions
from diffgraft.bases import Base
from diffgraft.bases.clip import Clip
from diffgraft.bases.tiny.world import caption, random_scene
from diffgraft.bases.tokens import token_ids
from diffgraft.data.captioner import pictures_with_paths
from diffgraft.errors import DiffgraftError
from diffgraft.pixels import to_tensor
from diffgraft.progress import track

WORLD_CAPTIONS = 3000
"""Number of captions of the world of `tiny` that a projection is fitted on"""
_LEAST_CAPTIONS = 50
_HELD_OUT = 5
"""Every fifth caption is left out of the fit, and tells how good it is"""


@dataclass(frozen=True)
class Projection:
    """Matrix from the pooled state of a base's text encoder to the embeddings of a CLIP."""

    matrix: Tensor
    """[width of embeddings, width of the text encoder], float32"""
    cosine: float | None = None
    """Mean cosine of projected and true embeddings of captions that were not fitted; None for CLIP's own matrix"""


@torch.no_grad()
def mean_embedding(clip: Clip, folder: str | Path) -> tuple[Tensor, int]:
    """Return the mean [1, width] of the unit embeddings of all pictures of a folder, and their number.

    Gallego 2022, arXiv:2209.12330, equation 1. webui's extension takes the mean of embeddings of any length.

    Raises:
        DiffgraftError: the folder does not exist, or has no pictures.
    """
    pictures = [picture.image for _, picture in pictures_with_paths(folder)]
    rows = [
        clip.image_features(to_tensor([image]).to(clip.model.device) / 2 + 0.5)
        for image in track(pictures, "embedding")
    ]
    return torch.cat(rows).mean(0, keepdim=True).cpu(), len(rows)


def check_files(source: Path, output: Path) -> None:
    """Check the names of files before networks are loaded, which takes seconds.

    Raises:
        DiffgraftError: `source` is no folder with pictures and no file of an embedding, or `output` has another suffix.
    """
    if output.suffix not in (".safetensors", ".pt"):
        raise DiffgraftError(f"{output} should end in .safetensors, to draw with, or in .pt, for webui's extension.")
    if source.is_dir():
        pictures_with_paths(source)
    elif source.suffix not in (".safetensors", ".pt", ".bin"):
        raise DiffgraftError(
            f"{source} is neither a folder of pictures nor a file with an aesthetic embedding, which ends in .pt or "
            ".safetensors."
        )


def projection_for(clip: Clip, base: Base | None = None, captions: Sequence[str] = ()) -> Projection:
    """Return the projection with which prompts of a base are compared with embeddings of a CLIP.

    If the text encoder has the shape of CLIP's text model, as in Stable Diffusion 1.x with ViT-L/14, it is CLIP's own
    matrix. For another text encoder a matrix is fitted by least squares: it is to map the encoder's pooled state of a
    caption to the caption's CLIP embedding.

    Args:
        clip: the CLIP that the pictures were embedded by.
        base: the base that is drawn with; None: one with CLIP's own text encoder.
        captions: captions for the fit, of what is to be drawn; for the embedded base `tiny` they may be missing.

    Raises:
        DiffgraftError: the base has no CLIP text encoder; or it is not of this CLIP, and there are too few captions.
    """
    if base is None:
        return Projection(clip.text_projection.detach().cpu())
    encoder, own = base.text_encoder, clip.model.config.text_config
    if "clip" not in type(encoder).__name__.lower():
        raise DiffgraftError(
            f"Aesthetic gradients have no meaning for bases of the family {base.family.name}: they tune a CLIP text "
            f"encoder, and its text encoder is a {type(encoder).__name__}."
        )
    if _shape(encoder.config) == _shape(own) and not captions:
        return Projection(clip.text_projection.detach().cpu())
    texts = list(dict.fromkeys(captions)) or (world_captions() if base.name == "tiny" else [])
    if len(texts) < _LEAST_CAPTIONS:
        raise DiffgraftError(
            f"The text encoder of {base.name} ({_described(encoder.config)}) is not that of the CLIP {clip.name} "
            f"({_described(own)}), so that its projection does not fit. Name the CLIP whose text encoder the base has, "
            f"or give at least {_LEAST_CAPTIONS} captions of what you draw, one a line, on which a projection is "
            "fitted: --captions FILE."
        )
    return _fitted(clip, base, texts)


def _shape(config: Any) -> tuple[int, ...]:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return tuple(getattr(config, key) for key in keys)


def _described(config: Any) -> str:
    return f"{config.num_hidden_layers} layers of width {config.hidden_size}"


def read_captions(file: Path) -> list[str]:
    """Return the lines of a text file that are not empty.

    Raises:
        DiffgraftError: it is not a text file.
    """
    try:
        lines = file.expanduser().read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DiffgraftError(f"{file} is not a text file in UTF-8: expected captions, one a line.") from error
    return [line.strip() for line in lines if line.strip()]


def world_captions() -> list[str]:
    """Return captions of random scenes of the world of `tiny`."""
    rng = np.random.default_rng(12)
    return list(dict.fromkeys(caption(random_scene(rng), rng) for _ in range(WORLD_CAPTIONS)))


@torch.no_grad()
def pooled_states(base: Base, texts: Sequence[str]) -> Tensor:
    """Return the last hidden state at the end token of each of n texts, [n, width], float32."""
    ids = token_ids(base.tokenizer, texts, False)[:, 0].to(base.device)
    states: Tensor = base.text_encoder(ids).last_hidden_state
    return states[torch.arange(len(ids)), end_positions(base.text_encoder, ids)].float()


@torch.no_grad()
def _fitted(clip: Clip, base: Base, texts: Sequence[str]) -> Projection:
    """Fit a matrix W that minimizes ‖X · Wᵀ − Y‖² for pooled states X and embeddings Y of captions."""
    x, y = [], []
    for start in track(range(0, len(texts), 100), "fitting a projection"):
        part = texts[start : start + 100]
        x.append(pooled_states(base, part).cpu())
        y.append(clip.text_features(part).cpu())
    states, embeddings = torch.cat(x), torch.cat(y)
    is_held = torch.arange(len(texts)) % _HELD_OUT == 0
    fit = np.linalg.lstsq(states[~is_held].double().numpy(), embeddings[~is_held].double().numpy(), rcond=None)[0]
    matrix = torch.from_numpy(fit.T).float().contiguous()
    cosine = F.cosine_similarity(states[is_held] @ matrix.T, embeddings[is_held]).mean()
    return Projection(matrix, float(cosine))


def aesthetic_adapter(
    source: str | Path, clip: Clip, projection: Projection | None, options: AestheticOptions, base: Base | None = None
) -> Adapter:
    """Make an aesthetic embedding of a folder of pictures, or complete one that a file holds.

    Args:
        source: folder of pictures, or a file with an aesthetic embedding.
        clip: the CLIP of the embedding.
        projection: the projection that drawing needs; None: none, as in files for webui.
        options: how text encoders are tuned.
        base: base that the projection was fitted for.

    Raises:
        DiffgraftError: there are no pictures; or the file holds something else, or an embedding of another CLIP.
    """
    metadata: dict[str, Any] = {"method": "aesthetic", "clip": clip.name, "clip_hash": clip.hash}
    if Path(source).expanduser().is_file():
        adapter = load_adapter(source)
        if len(adapter.networks) != 1 or not isinstance(adapter.networks[0], AestheticEmbedding):
            raise DiffgraftError(
                f"{source} is not an aesthetic embedding, but an adapter of the method {adapter.method}: give a folder "
                "of pictures, or an embedding such as webui's .pt files."
            )
        embedding = adapter.networks[0].tensors["embedding"].float()
        if embedding.shape[1] != clip.width:
            raise DiffgraftError(
                f"{source} holds an embedding of {embedding.shape[1]} numbers, but those of the CLIP {clip.name} have "
                f"{clip.width}: name the CLIP that it was made with. Those of webui are of "
                "openai/clip-vit-large-patch14."
            )
        metadata = {**adapter.metadata, **metadata}
    else:
        embedding, metadata["pictures"] = mean_embedding(clip, source)
    if projection is None:
        return Adapter({}, metadata, (AestheticEmbedding({"embedding": embedding}, {}),))
    if projection.cosine is not None and base is not None:
        metadata["base"] = {"name": base.name, "family": base.family.name, "hash": base.hash}
    tensors = {"embedding": embedding, "projection": projection.matrix}
    return Adapter({}, metadata, (AestheticEmbedding(tensors, options.model_dump()),))
