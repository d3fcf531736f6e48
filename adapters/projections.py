"""Layers that are linear in one tool and 1 × 1 convolutions in another: the same numbers on two axes or on four.

The projections around the attentions of Stable Diffusion 2 are linear layers in diffusers and 1 × 1 convolutions in
kohya's tools (sd-scripts, ``library/model_util.py``, which loads that UNet with ``use_linear_projection`` off). A file
of either form means the same layer.
"""

from collections.abc import Mapping

from torch import Tensor

Shape = tuple[int, ...]
_WITH_KERNEL = ("lora_down", "lora_up", "lora_mid", "lokr_w2", "lokr_t2", "hada_t1", "hada_t2", "diff")
"""Leaves that have the axes of a kernel where the layer is a convolution."""


def same_layer(one: Shape, two: Shape) -> bool:
    """Whether two shapes are those of one layer, linear or as a 1 × 1 convolution."""
    return _core(one) == _core(two)


def _core(shape: Shape) -> Shape:
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def laid_out(leaves: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """`leaves` with two axes for a weight [out, in], with four for one of [out, in, 1, 1]; views, nothing is copied.

    Of other shapes, and of leaves with a larger kernel, all stays as it is.
    """
    if len(shape) == 2:
        return {
            name: leaf[:, :, 0, 0] if leaf.ndim == 4 and leaf.shape[2:] == (1, 1) else leaf
            for name, leaf in leaves.items()
        }
    if len(shape) == 4 and tuple(shape[2:]) == (1, 1):
        return {
            name: leaf[:, :, None, None] if leaf.ndim == 2 and name in _WITH_KERNEL else leaf
            for name, leaf in leaves.items()
        }
    return dict(leaves)
