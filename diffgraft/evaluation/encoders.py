"""Encoders: networks of transformers that embed pictures, patches of pictures, and for some of them texts.

CLIP, SigLIP, SigLIP 2, DINO, DINOv2 and DINOv3 are loaded by hub id or folder. Pictures are prepared by the processor
that comes with the model, so that figures are those of other programs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffgraft.bases.clip import TINY_CLIP
from diffgraft.data.hf_models import load_hf_model
from diffgraft.errors import DiffgraftError
from diffgraft.generation.metadata import pixel_hash
from diffgraft.third_party import quiet_libraries

_BATCH = 16
"""Pictures in one pass of an encoder"""


@dataclass(eq=False, repr=False)
class Encoder:
    """A frozen network that embeds pictures; embeddings are unit vectors, so that cosines are inner products."""

    name: str
    """Source it was loaded from: `tiny`, a hub id or a folder"""
    model: Any
    processor: Any
    """Image processor of transformers, which prepares pictures"""
    tokenizer: Any = None
    """Tokenizer of the text model; None for encoders of pictures alone"""

    def __repr__(self) -> str:
        return f"Encoder({self.name!r}, {type(self.model).__name__})"

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed n pictures as unit vectors [n, width], float32 on the CPU.

        They are CLIP's and SigLIP's image features, and the normalized class token of DINO.
        """
        rows = []
        for batch in _batches(images):
            inputs = self._prepared(batch)
            features = getattr(self.model, "get_image_features", self.model)(**inputs)
            whole = getattr(features, "pooler_output", features)
            if whole is None:  # the first DINO has no layer after the class token
                whole = features.last_hidden_state[:, 0]
            rows.append(F.normalize(whole.float(), dim=-1).cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def patches(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Embed the patches of n pictures as unit vectors: for each picture [patches, width], float32 on the CPU.

        They are the last hidden states of the vision model, row by row, without the class token and registers.
        """
        rows: list[Tensor] = []
        for batch in _batches(images):
            inputs = self._prepared(batch)
            states = getattr(self.model, "vision_model", self.model)(**inputs).last_hidden_state.float()
            for number, count in enumerate(self._counts(inputs)):
                end = states.shape[1] if "spatial_shapes" not in inputs else count
                rows.append(F.normalize(states[number, end - count : end], dim=-1).cpu())
        return rows

    def coverage(self, masks: Sequence[Image.Image]) -> list[Tensor]:
        """Return the share of each patch that lies inside a mask (mode L, white inside): for each mask [patches]."""
        shares: list[Tensor] = []
        for mask in masks:
            inputs = self._prepared([mask.convert("RGB")], do_normalize=False)
            pixels = inputs["pixel_values"].float().cpu()
            (count,) = self._counts(inputs)
            if "spatial_shapes" in inputs:  # [1, patches, values of a patch]
                shares.append(pixels[0, :count].mean(-1).clamp(0, 1))
            else:
                side = self._patch_size
                pooled = F.avg_pool2d(pixels.mean(1, keepdim=True), side, side)
                shares.append(pooled.flatten().clamp(0, 1))
        return shares

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embed n texts as unit vectors [n, width], float32 on the CPU; long texts are cut to the model's length.

        Raises:
            DiffgraftError: the encoder has no text model.
        """
        if self.tokenizer is None:
            raise DiffgraftError(
                f"{self.name} embeds pictures alone, but prompts are compared too: give a CLIP, such as "
                "openai/clip-vit-large-patch14."
            )
        config = self.model.config.text_config
        pad = "longest" if config.model_type == "clip_text_model" else "max_length"  # SigLIP reads the last position
        options = {"truncation": True, "max_length": config.max_position_embeddings, "return_tensors": "pt"}
        ids = self.tokenizer([*prompts], padding=pad, **options).input_ids.to(self.model.device)
        features = self.model.get_text_features(input_ids=ids)
        return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1).cpu()

    @property
    def logit_scale(self) -> float:
        """Factor on cosines of pictures and texts that the model was trained with."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def _patch_size(self) -> int:
        return int(getattr(self.model.config, "vision_config", self.model.config).patch_size)

    def _prepared(self, images: Sequence[Image.Image], **changes: Any) -> dict[str, Any]:
        """Return the inputs of the vision model for some pictures."""
        with quiet_libraries():
            inputs = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt", **changes)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        return {**inputs, "pixel_values": inputs["pixel_values"].to(self.model.dtype)}

    def _counts(self, inputs: Mapping[str, Tensor]) -> list[int]:
        """Return the number of patches of each picture."""
        if "spatial_shapes" in inputs:
            return [math.prod(shape) for shape in inputs["spatial_shapes"].tolist()]
        count, _, height, width = inputs["pixel_values"].shape
        return [(height // self._patch_size) * (width // self._patch_size)] * count


def load_encoder(source: str) -> Encoder:
    """Load an encoder by hub id or folder, in float32, on the device of this process.

    Args:
        source: ``tiny`` for the CLIP of the embedded base, a hub id, or a folder that `save_pretrained` wrote. Code of
            a model is not run, and only weights in safetensors are read.

    Raises:
        DiffgraftError: it does not exist, or is no encoder of pictures.
    """
    from transformers import (
        AutoImageProcessor,
        AutoTokenizer,
        CLIPModel,
        Dinov2Model,
        Dinov2WithRegistersModel,
        DINOv3ViTModel,
        Siglip2Model,
        SiglipModel,
        ViTModel,
    )

    path = str(TINY_CLIP) if source == "tiny" else source
    kinds = (CLIPModel, Siglip2Model, SiglipModel, Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, ViTModel)
    model, processor = load_hf_model(kinds, path, "embed pictures", AutoImageProcessor, "--encoder TASK=FOLDER")
    tokenizer = None
    if hasattr(model, "text_model"):
        try:
            with quiet_libraries():
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError):  # pictures can be embedded without it
            tokenizer = None
    return Encoder(source, model.float().requires_grad_(False), processor, tokenizer)


@dataclass(eq=False)
class Encoders:
    """Encoders by the task that they have, such as ``clip``; each is loaded once, and no picture is embedded twice."""

    sources: Mapping[str, str]
    """Task → source of its encoder"""
    load: Callable[[str], Encoder] = load_encoder
    masker: Callable[[Image.Image], Image.Image] | None = None
    """Function that finds the subject in a drawn picture: a mask (mode L), white inside; None without one"""
    _loaded: dict[str, Encoder] = field(default_factory=dict)
    _memo: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)

    def of(self, task: str) -> Encoder:
        """Return the encoder of a task."""
        source = self.sources[task]
        if source not in self._loaded:
            self._loaded[source] = self.load(source)
        return self._loaded[source]

    def pictures(self, task: str, images: Sequence[Image.Image]) -> Tensor:
        """Return the embeddings [n, width] of n pictures."""
        return torch.stack(self.once(task, "picture", images, lambda new: list(self.of(task).pictures(new))))

    def texts(self, task: str, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings [n, width] of n texts."""
        return self.of(task).texts(prompts)

    def once(
        self,
        task: str,
        kind: str,
        images: Sequence[Image.Image],
        compute: Callable[[Sequence[Image.Image]], list[Tensor]],
    ) -> list[Tensor]:
        """Return what `compute` gives for each picture; it is kept by task, `kind` and the picture's content."""
        keys = [(self.sources[task], kind, pixel_hash(image)) for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._memo}
        if new:
            self._memo.update(zip(new, compute(list(new.values())), strict=True))
        return [self._memo[key] for key in keys]


def _batches(images: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
    return [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
