"""Deltas of a fused layer and of its parts, whose weights are the rows of the fused layer's weight, block by block.

Some tools have one layer for queries, keys and values, where others have three. A delta of the fused layer is split
into deltas of its parts, and those of the parts are joined to one of the fused layer, both exactly or not at all:

- LoRA: the parts have the same ``down`` and rows of ``up``. Parts with different ``down`` are joined to a LoRA of the
  sum of their ranks, with ``up`` zero outside of blocks on its diagonal, as sd-scripts does with ``split_qkv``; LoHa
  likewise, as in musubi-tuner. Such a LoRA or LoHa is split into its blocks again.
- LoKr, w1 ⊗ w2: if the boundary of a part is inside of a row of blocks, a part is a sum of several LoKr, one for each
  piece of w2 between boundaries. Only parts that came from one LoKr can be joined again.
- Differences, GLoRA, (IA)³ and rotations of inputs: rows of those leaves that have rows.
- DoRA: with the norms of the outputs, as its direction is; norms of the inputs cannot be split.

Sources: kohya-ss/sd-scripts, ``networks/convert_flux_lora.py``; kohya-ss/musubi-tuner,
``networks/convert_z_image_lora_to_comfy.py``.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Delta
from diffgraft.adapters.dora import LEAF as NORMS
from diffgraft.adapters.dora import DoraDelta, with_strength_convention
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.methods.full import FullDelta
from diffgraft.adapters.methods.glora import GloraDelta
from diffgraft.adapters.methods.ia3 import Ia3Delta
from diffgraft.adapters.registry import read_delta

Bounds = Sequence[tuple[int, int]]
"""First row of each part, and the row after its last"""
_BLOCK_LEAVES = {
    "lora": (("lora_up",), ("lora_down",)),
    "loha": (("hada_w1_a", "hada_w2_a"), ("hada_w1_b", "hada_w2_b")),
}
"""Kind that can be block-diagonal → its leaves [out, r], and those [r, in]"""


def adds_nothing(delta: Delta) -> bool:
    """Whether a delta changes no weight and no bias, as one of its factors is zero; False for other kinds than these.

    Recognised are LoRA, LoHa and LoKr without DoRA, differences, and (IA)³.
    """
    if isinstance(delta, FactorDelta):
        return any(not leaf.any() for leaf in delta.leaves.values())
    if isinstance(delta, FullDelta):
        return not any(leaf.any() for leaf in delta.leaves.values())
    return isinstance(delta, Ia3Delta) and not delta.leaves["weight"].any()


def rows_and_columns(delta: Delta) -> tuple[int | None, int | None]:
    """Number of rows and of columns of the weight that a delta is for; None for what its leaves do not tell."""
    if (shape := delta.matrix_shape) is not None:
        return shape[0], math.prod(shape[1:])
    if isinstance(delta, GloraDelta):
        old = delta.has_old_order
        return delta.leaves["b2" if old else "b1"].shape[0], delta.leaves["a1"].shape[1 if old else 0]
    if isinstance(delta, Ia3Delta):
        count = delta.leaves["weight"].numel()
        return (None, count) if delta.on_input else (count, None)
    return (len(delta.leaves["diff_b"]) if isinstance(delta, FullDelta) else None), None


def split_fused(delta: Delta, bounds: Bounds) -> list[tuple[Delta, ...]]:
    """Split the delta of a fused layer into those of its parts, as small as they can be.

    A block-diagonal LoRA or LoHa becomes its blocks. A part that is not changed has no deltas, unless no part is.

    Args:
        delta: delta of a weight [out, in].
        bounds: rows of the parts, which follow one another and are all rows of the weight.

    Raises:
        ValueError: the delta depends on all rows of the weight together, or its leaves have different numbers of rows.
    """
    parts = split_rows(delta, bounds)
    if delta.kind in _BLOCK_LEAVES and (columns := _block_columns(delta, bounds)):
        parts = [_narrowed(part, *own) for (part,), own in zip(parts, columns, strict=True)]
    if all(adds_nothing(part) for block in parts for part in block):
        return parts
    return [tuple(part for part in block if not adds_nothing(part)) for block in parts]


def split_rows(delta: Delta, bounds: Bounds) -> list[tuple[Delta, ...]]:
    """Split a delta into those of the rows within each of `bounds`: one, or several if it is a LoKr.

    Arguments and errors are those of `split_fused`.
    """
    if isinstance(delta, FactorDelta) and delta.kind == "lokr":
        return _split_kronecker(delta, bounds)
    names, count = _row_leaves(delta), bounds[-1][1]
    if wrong := next((name for name in names if len(delta.leaves[name]) != count), None):
        raise ValueError(f"its {wrong} has {len(delta.leaves[wrong])} rows instead of {count}")
    return [
        (_rebuilt(delta, {**delta.leaves, **{name: delta.leaves[name][start:stop] for name in names}}),)
        for start, stop in bounds
    ]


def _row_leaves(delta: Delta) -> list[str]:
    """Names of the leaves of `delta` that have a row, or a number, for each output.

    Raises:
        ValueError: the delta is not made of rows.
    """
    if isinstance(delta, DoraDelta):
        if delta.has_input_norms:
            raise ValueError("it is a DoRA with norms of the inputs, which are those of all rows together")
        return [*_row_leaves(delta.direction), NORMS]
    if isinstance(delta, GloraDelta):
        return ["b2" if delta.has_old_order else "b1"]
    if isinstance(delta, Ia3Delta):
        return [] if delta.on_input else ["weight"]
    names = {"full": delta.leaves, "oft-inputs": (), **{kind: ups for kind, (ups, _) in _BLOCK_LEAVES.items()}}
    if delta.kind not in names:
        kind = "a DoRA of LoKr" if isinstance(delta, FactorDelta) and delta.kind == "lokr" else f"of kind {delta.kind}"
        raise ValueError(f"it is {kind}, which is not made of rows")
    return list(names[delta.kind])


def _rebuilt(delta: Delta, leaves: Mapping[str, Tensor], alpha: float | None = None) -> Delta:
    """A delta like `delta` with other leaves, and another alpha if one is given."""
    result = read_delta(delta.kind, dict(leaves), delta.alpha if alpha is None else alpha)
    convention = delta.strength_convention
    return with_strength_convention(result, convention) if convention else result


def _block_columns(delta: Delta, bounds: Bounds) -> list[tuple[int, int]] | None:
    """Columns of each part in the up factors of a block-diagonal LoRA or LoHa; None if it is not one.

    Blocks have equal numbers of columns, or as many as are not zero; a part that is zero may have none.
    """
    ups = [delta.leaves[name] for name in _BLOCK_LEAVES[delta.kind][0]]
    used = torch.stack([torch.stack([(up[start:stop] != 0).any(0) for up in ups]).any(0) for start, stop in bounds])
    rank, count = ups[0].shape[1], len(bounds)
    ends = [max((int(column) + 1 for column in row.nonzero()), default=0) for row in used]
    fitted = [*(max(ends[: place + 1]) for place in range(count - 1)), rank]
    candidates = [[rank // count * (place + 1) for place in range(count)]] if rank % count == 0 else []
    for stops in [*candidates, fitted] if used.any() else candidates:
        columns = list(pairwise([0, *stops]))
        are_inside = all(int(row.sum()) == int(row[slice(*own)].sum()) for row, own in zip(used, columns, strict=True))
        if are_inside and (NORMS not in delta.leaves or all(start < stop for start, stop in columns)):
            return columns
    return None


def _narrowed(delta: Delta, start: int, stop: int) -> tuple[Delta, ...]:
    """The LoRA or LoHa of the ranks from `start` to `stop` of `delta`, with the same scale; none if there are none."""
    if start == stop:
        return ()
    ups, downs = _BLOCK_LEAVES[delta.kind]
    leaves = dict(delta.leaves)
    rank = leaves[downs[0]].shape[0]
    leaves |= {name: leaves[name][:, start:stop] for name in ups} | {name: leaves[name][start:stop] for name in downs}
    assert delta.alpha is not None
    return (_rebuilt(delta, leaves, delta.alpha * (stop - start) / rank),)


def _kronecker_leaves(delta: Delta) -> tuple[str, str]:
    """Names of the leaves of a LoKr with the rows of w1 and of w2."""
    return tuple(f"lokr_{w}" if f"lokr_{w}" in delta.leaves else f"lokr_{w}_a" for w in ("w1", "w2"))  # type: ignore[return-value]


def _split_kronecker(delta: FactorDelta, bounds: Bounds) -> list[tuple[Delta, ...]]:
    """Split a LoKr at multiples of `step`, the greatest number of rows that divides those of w2 and all parts.

    Row k · step of the weight is in row k // pieces of w1, and in piece k % pieces of w2.
    """
    first, second = _kronecker_leaves(delta)
    w1, w2 = delta.leaves[first], delta.leaves[second]
    step = math.gcd(w2.shape[0], *(row for bound in bounds for row in bound))
    pieces = w2.shape[0] // step
    parts: list[tuple[Delta, ...]] = []
    for start, stop in bounds:
        places = torch.arange(start // step, stop // step)
        rows = w1[places // pieces]
        part = []
        for piece in range(pieces):
            here = (places % pieces == piece).view(-1, *[1] * (w1.ndim - 1))
            leaves = {first: rows * here, second: w2[piece * step : (piece + 1) * step]}
            part.append(_rebuilt(delta, {**delta.leaves, **leaves}))
        parts.append(tuple(part))
    return parts


def join_rows(parts: Sequence[Sequence[Delta]], rows: Sequence[int]) -> tuple[Delta, ...]:
    """Join the deltas of the parts of a fused layer to those of the fused layer, at most one of its weight.

    Args:
        parts: deltas of each part, in order; empty for a part that is not changed. A delta of a bias alone may be
            among them.
        rows: number of rows of each part.

    Raises:
        ValueError: no single delta does the same to the fused layer.
    """
    biases = [[delta for delta in part if set(delta.leaves) == {"diff_b"}] for part in parts]
    weights = [[delta for delta in part if set(delta.leaves) != {"diff_b"}] for part in parts]
    joined: list[Delta] = []
    if any(weights):
        joined.append(_join_weights(weights, rows))
    if any(biases):
        values = [torch.stack([d.leaves["diff_b"].float() for d in part]).sum(0) if part else None for part in biases]
        bias = _padded(values, rows)
        if joined and isinstance(joined[0], FullDelta):
            leaves = joined.pop().leaves
            joined.append(FullDelta({**leaves, "diff_b": bias + leaves.get("diff_b", torch.zeros(()))}))
        else:
            joined.append(FullDelta({"diff_b": bias}))
    return tuple(joined)


def _join_weights(parts: Sequence[Sequence[Delta]], rows: Sequence[int]) -> Delta:
    deltas = [delta for part in parts for delta in part]
    kinds = sorted({delta.kind for delta in deltas})
    if len(kinds) > 1 or len({isinstance(delta, DoraDelta) for delta in deltas}) > 1:
        raise ValueError(f"they hold {' and '.join(kinds)}, with or without DoRA")
    first = deltas[0]
    if isinstance(first, FactorDelta) and first.kind == "lokr":
        return _join_kronecker(parts)
    if any(len(part) > 1 for part in parts):
        raise ValueError("one of them holds several deltas")
    single = [part[0] if part else None for part in parts]
    if isinstance(first, FullDelta):
        return _join_differences(single, rows)
    names = _row_leaves(first)
    if all(delta is not None and _is_like(delta, first, names) for delta in single):
        stacked = {name: torch.cat([delta.leaves[name] for delta in deltas]) for name in names}
        return _rebuilt(first, {**first.leaves, **stacked})
    if isinstance(first, Ia3Delta) and not first.on_input:
        present = [None if delta is None else delta.leaves["weight"].flatten() for delta in single]
        return _rebuilt(first, {**first.leaves, "weight": _padded(present, rows)})
    if first.kind not in _BLOCK_LEAVES:
        raise ValueError(f"they hold {first.kind} with different factors")
    return _join_blocks(single, rows)


def _is_like(delta: Delta, first: Delta, names: Sequence[str]) -> bool:
    """Whether two deltas differ only in the leaves called `names`."""
    others = [name for name in first.leaves if name not in names]
    return (
        delta.alpha == first.alpha
        and set(delta.leaves) == set(first.leaves)
        and all(torch.equal(delta.leaves[name], first.leaves[name]) for name in others)
    )


def _padded(blocks: Sequence[Tensor | None], rows: Sequence[int]) -> Tensor:
    """Stack blocks of rows, with as many `rows` of zeros for each missing one."""
    like = next(block for block in blocks if block is not None)
    zeros = (like.new_zeros(count, *like.shape[1:]) for count in rows)
    return torch.cat([zero if block is None else block for block, zero in zip(blocks, zeros, strict=True)])


def _join_differences(parts: Sequence[Delta | None], rows: Sequence[int]) -> Delta:
    leaves = [delta.leaves if delta is not None else {} for delta in parts]
    names = dict.fromkeys(name for own in leaves for name in own)
    return FullDelta({name: _padded([own.get(name) for own in leaves], rows) for name in names})


def _join_blocks(parts: Sequence[Delta | None], rows: Sequence[int]) -> Delta:
    """Join LoRAs or LoHas to a block-diagonal one of the sum of all ranks."""
    present = [delta for delta in parts if delta is not None]
    first = present[0]
    if isinstance(first, DoraDelta) and len(present) < len(parts):
        raise ValueError("they are DoRA, which has norms of all rows, but one of them is not changed")
    ups, downs = _BLOCK_LEAVES[first.kind]
    factors = [delta.direction if isinstance(delta, DoraDelta) else delta for delta in present]
    scales = [delta.scale for delta in factors if isinstance(delta, FactorDelta)]
    common = scales[0] if len(set(scales)) == 1 else None
    leaves = {name: torch.cat([delta.leaves[name] for delta in present]) for name in downs}
    for name in ups:
        blocks = [delta.leaves[name] for delta in present]
        if common is None and name == ups[0]:
            blocks = [scale * block.float() for scale, block in zip(scales, blocks, strict=True)]
        leaves[name] = _block_diagonal(blocks, [delta is not None for delta in parts], rows)
    if NORMS in first.leaves:
        leaves[NORMS] = torch.cat([delta.leaves[NORMS] for delta in present])
    return _rebuilt(first, leaves, (1.0 if common is None else common) * leaves[downs[0]].shape[0])


def _block_diagonal(blocks: Sequence[Tensor], is_present: Sequence[bool], rows: Sequence[int]) -> Tensor:
    """A matrix with `blocks` on its diagonal, and rows of zeros for each part that is not present."""
    result = blocks[0].new_zeros(sum(rows), sum(block.shape[1] for block in blocks))
    row = column = 0
    remaining = iter(blocks)
    for present, count in zip(is_present, rows, strict=True):
        if present:
            block = next(remaining)
            result[row : row + count, column : column + block.shape[1]] = block
            column += block.shape[1]
        row += count
    return result


def _join_kronecker(parts: Sequence[Sequence[Delta]]) -> Delta:
    """Join the LoKr that `_split_kronecker` made of one."""
    deltas = [delta for part in parts for delta in part]
    first = deltas[0]
    name1, name2 = _kronecker_leaves(first)
    different = ValueError("they hold LoKr with different factors")
    if not all(parts) or not all(_is_like(delta, first, (name1, name2)) for delta in deltas):
        raise different
    pieces: list[Tensor] = []
    rows: list[tuple[Tensor, int]] = []
    for part in parts:
        for row in zip(*(delta.leaves[name1] for delta in part), strict=True):
            used = [place for place, values in enumerate(row) if values.any()]
            if len(used) != 1:
                raise different
            w2 = part[used[0]].leaves[name2]
            place = next((place for place, piece in enumerate(pieces) if torch.equal(piece, w2)), len(pieces))
            pieces += [w2] if place == len(pieces) else []
            rows.append((row[used[0]], place))
    count = len(pieces)
    w1 = [values for values, _ in rows[::count]]
    if len(rows) % count or any(
        place != number % count or not torch.equal(values, w1[number // count])
        for number, (values, place) in enumerate(rows)
    ):
        raise different
    return _rebuilt(first, {**first.leaves, name1: torch.stack(w1), name2: torch.cat(pieces)})
