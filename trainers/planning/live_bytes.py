"""Bytes of the tensors that a computation holds at once, counted on any device, ``meta`` included."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations within its block create, until they are released; each counts once.

    Tensors that exist before the block do not count, nor do memory that a kernel uses inside, and fragmentation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        """Bytes that are alive now, and the most that were at once"""
        self._known: dict[int, ref[Any]] = {}
        """Address of a storage, while it is alive → weak reference that counts it out"""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._note((args, kwargs), is_new=False)
        out, most = func(*args, **(kwargs or {})), self.peak
        self._note(out, is_new=True)
        if func is torch.ops.aten.add.Tensor and not torch.is_grad_enabled():
            # autograd adds up gradients in place, but not while operations are watched
            self.peak = most
        return out

    def _note(self, values: Any, *, is_new: bool) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            if (key := storage._cdata) not in self._known:
                size = storage.nbytes() if is_new else 0
                self._known[key] = ref(storage, partial(self._release, key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _release(self, key: int, size: int, _: object) -> None:
        del self._known[key]
        self.now -= size
