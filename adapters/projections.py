"""Layers that are linear in one tool and 1 × 1 convolutions in another: the same weights on two or on four axes.

The projections around the attentions of Stable Diffusion 2 are linear layers in diffusers and 1 × 1 convolutions in
kohya's tools (sd-scripts, ``library/model_util.py``, which loads that UNet with ``use_linear_projection`` off). A file
of either form means the same layer.
"""

from collections.abc import Mapping

from torch import Tensor

Shape = tuple[int, ...]
_KERNEL_LEAVES = ("lora_down", "lora_up", "lora_mid", "lokr_w2", "lokr_t2", "hada_t1", "hada_t2", "diff")
"""Leaves that have kernel axes if the layer is a convolution"""


def same_layer(first: Shape, second: Shape) -> bool:
    """Whether two weight shapes are those of the same layer, as a linear layer or as a 1 × 1 convolution."""
    return _core(first) == _core(second)


def _core(shape: Shape) -> Shape:
    """The shape without the kernel axes of a 1 × 1 convolution."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def match_conv_axes(leaves: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Give leaves two axes for a weight [out, in], and four for a weight [out, in, 1, 1]; these are views, not copies.

    Leaves with a larger kernel, and leaves for weights of other shapes, are returned unchanged.
    """
    if len(shape) == 2:
        return {
            name: leaf[:, :, 0, 0] if leaf.ndim == 4 and leaf.shape[2:] == (1, 1) else leaf
            for name, leaf in leaves.items()
        }
    if len(shape) == 4 and tuple(shape[2:]) == (1, 1):
        return {
            name: leaf[:, :, None, None] if leaf.ndim == 2 and name in _KERNEL_LEAVES else leaf
            for name, leaf in leaves.items()
        }
    return dict(leaves)
