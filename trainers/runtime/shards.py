"""Sharding of the frozen denoiser: each process holds a share of every weight, and gathers a block while it computes.

Implemented by PyTorch's `fully_shard`, or by stage 3 of DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054).
The trainable parameters are small, and are replicated on every process.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffgraft.adapters.method import Attached
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.groups import RuntimeSettings


def check_shards(shard: str, accelerator: Any) -> None:
    """Check that sharding is possible here.

    Raises:
        DiffgraftError: there is only one process, or the deepspeed package is not installed.
    """
    from accelerate.utils import is_deepspeed_available

    if shard == "none":
        return
    if accelerator.num_processes == 1:
        raise DiffgraftError(
            f"shard={shard} needs several processes, but there is one: start them with `torchrun "
            "--nproc_per_node 2 -m diffgraft train …`, or remove shard."
        )
    if shard == "zero3" and not is_deepspeed_available():
        raise DiffgraftError("shard=zero3 needs the package deepspeed: python -m pip install deepspeed, or shard=fsdp.")


def check_compatible(runtime: RuntimeSettings, quantize: str) -> None:
    """Check that `shard` is not combined with settings that need unsharded weights.

    Raises:
        DiffgraftError: it is combined with such a setting.
    """
    if runtime.shard == "none":
        return
    settings = {"quantize": quantize != "none", "compile": runtime.compile, "channels_last": runtime.channels_last}
    for key in (key for key, is_used in settings.items() if is_used):
        value = quantize if key == "quantize" else "true"
        raise DiffgraftError(f"{key}={value} cannot be combined with shard={runtime.shard}: remove one of them.")


@contextmanager
def denoiser_copy(shard: str, base: Base) -> Iterator[None]:
    """Within the block the base has a copy of its denoiser, which may be sharded; the original waits in CPU memory."""
    if shard == "none":
        yield
        return
    original, device = base.denoiser, base.device
    clone = copy.deepcopy(original.to("cpu"))
    base.denoiser = clone.to(device)
    try:
        yield
    finally:
        base.denoiser = original.to(device)


def check_frozen(shard: str, base: Base, live: Attached) -> None:
    """Check that the denoiser is frozen, as sharding needs.

    Raises:
        DiffgraftError: the attached method trains the denoiser's own weights.
    """
    if shard != "none" and trains_denoiser(base, live):
        raise DiffgraftError(
            f"shard={shard} needs a frozen denoiser, but this method trains the denoiser's own weights: remove shard, "
            "or use another method, such as lora."
        )


def trains_denoiser(base: Base, live: Attached) -> bool:
    """Whether an attached method trains the denoiser's own weights."""
    weights = {id(value) for value in base.denoiser.parameters()}
    return any(id(value) in weights for value in live.trainable().values())


def shard_denoiser(shard: str, base: Base) -> None:
    """Shard the base's denoiser over all processes, which from then on must call it together."""
    if shard != "none":
        _IMPLEMENTATIONS[shard](base.denoiser, base.family.checkpointed)


def ignore_in_ddp(module: nn.Module) -> None:
    """Make `DistributedDataParallel` ignore the frozen parameters and buffers of `module`.

    They differ by process if they are sharded, and are not all on the device; else all processes have read the same.
    """
    names = [name for name, value in module.named_parameters() if not value.requires_grad]
    names += [name for name, _ in module.named_buffers()]
    ignore: Any = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(module, names)


def _shard_with_fsdp(denoiser: nn.Module, blocks: Sequence[str]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(denoiser.parameters()).device.type, (torch.distributed.get_world_size(),))
    for block in denoiser.modules():
        if type(block).__name__ in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh, reshard_after_forward=True)


def _shard_with_zero3(denoiser: nn.Module, blocks: Sequence[str]) -> None:  # noqa: ARG001  (ZeRO gathers by weight)
    import deepspeed

    # without an optimizer, deepspeed only gathers and frees weights, in the forward and the backward pass
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())
    deepspeed.initialize(model=denoiser, config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero})


_IMPLEMENTATIONS = {"fsdp": _shard_with_fsdp, "zero3": _shard_with_zero3}
