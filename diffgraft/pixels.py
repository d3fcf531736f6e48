"""Pictures as tensors and back."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Convert n RGB images of one size to a float32 tensor [n, 3, h, w] with values from -1 to 1."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in images])


def to_image(pixels: Tensor) -> Image.Image:
    """Convert a tensor [3, h, w] with values from -1 to 1 to an RGB image; values beyond are clipped."""
    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(scaled.permute(1, 2, 0).cpu().numpy())
