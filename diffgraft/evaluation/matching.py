"""Matching of patches: how well each patch of a subject is found again in another picture."""

from torch import Tensor


def patch_match(reference: Tensor, inside: Tensor, picture: Tensor, picture_inside: Tensor | None = None) -> float:
    """Return the mean best cosine of a reference's patches among those of a picture.

    Each patch of the reference is matched with the nearest patch of the picture, wherever it is; patches count by their
    share inside the reference's mask, so that the background does not count. This is the concept preservation of MaSC
    (2026, arXiv:2605.22469). With a mask of the picture, its patches inside are also matched with those of the
    reference inside, and the mean of both directions is returned: parts that only the picture has count against it.

    Args:
        reference: unit vectors [m, d].
        inside: share of each of its patches inside its mask, [m], from 0 to 1.
        picture: unit vectors [n, d].
        picture_inside: share of each of the picture's patches inside its mask, [n]; None without a mask.

    Raises:
        ValueError: nothing is inside a mask.
    """
    cosines = reference.double() @ picture.double().T  # [m, n]
    there = _weighted(cosines.amax(1), inside)
    if picture_inside is None:
        return there
    kept = inside > 0.5 if bool((inside > 0.5).any()) else inside > 0
    back = _weighted(cosines[kept].amax(0), picture_inside)
    return (there + back) / 2


def _weighted(values: Tensor, weights: Tensor) -> float:
    total = weights.double().sum()
    if not total > 0:
        raise ValueError("a mask in which no patch is inside")
    return float((values * weights.double()).sum() / total)
