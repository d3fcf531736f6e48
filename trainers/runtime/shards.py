"""A frozen denoiser in shards: each process holds a share of every weight, and the whole of one only while it computes.

By PyTorch's `fully_shard`, or by stage 3 of DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054). What trains
is small, and stays whole on every process.
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
    """Refuse what cannot be in shards.

    Raises:
        DiffgraftError: there is one process, the package is not there, or it cannot be loaded.
    """
    from accelerate.utils import is_deepspeed_available

    if shard == "none":
        return
    if accelerator.num_processes == 1:
        raise DiffgraftError(
            f"shard={shard} deals the denoiser out to several processes, and this is one: start them by `torchrun "
            "--nproc_per_node 2 -m diffgraft train …`, or leave shard out."
        )
    if shard == "zero3" and not is_deepspeed_available():
        raise DiffgraftError("shard=zero3 needs the package deepspeed: python -m pip install deepspeed, or shard=fsdp.")


def check_compatible(runtime: RuntimeSettings, quantize: str) -> None:
    """Refuse settings that need whole weights.

    Raises:
        DiffgraftError: there is one beside `shard`.
    """
    if runtime.shard == "none":
        return
    wanted = {"quantize": quantize != "none", "compile": runtime.compile, "channels_last": runtime.channels_last}
    for key in (key for key, is_wanted in wanted.items() if is_wanted):
        value = quantize if key == "quantize" else "true"
        raise DiffgraftError(f"{key}={value} does not go with shard={runtime.shard}: leave one out.")


@contextmanager
def denoiser_copy(shard: str, base: Base) -> Iterator[None]:
    """Within the block the base has a copy of its denoiser, to be cut up; its own waits in the processor's memory."""
    if shard == "none":
        yield
        return
    own, device = base.denoiser, base.device
    spare = copy.deepcopy(own.to("cpu"))
    base.denoiser = spare.to(device)
    try:
        yield
    finally:
        base.denoiser = own.to(device)


def check_frozen(shard: str, base: Base, live: Attached) -> None:
    """Refuse to deal out what is trained.

    Raises:
        DiffgraftError: the denoiser's own weights are, in what is attached.
    """
    if shard == "none":
        return
    own = {id(value) for value in base.denoiser.parameters()}
    if any(id(value) in own for value in live.trainable().values()):
        raise DiffgraftError(
            f"This method trains the denoiser's own weights, and shard={shard} is for a frozen one: "
            "leave shard out, or take a method that adds to it."
        )


def shard_denoiser(shard: str, base: Base) -> None:
    """Deal the denoiser's weights out to the processes, which from here on must call it together, as before."""
    if shard != "none":
        _KINDS[shard](base.denoiser, base.family.checkpointed)


def ignore_in_ddp(shard: str, module: nn.Module) -> None:
    """Have `DistributedDataParallel` take no notice of what is frozen in `module`, as its shards differ."""
    if shard == "none":
        return
    names = [name for name, value in module.named_parameters() if not value.requires_grad]
    names += [name for name, _ in module.named_buffers()]
    ignore: Any = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(module, names)


def _by_fsdp(denoiser: nn.Module, blocks: Sequence[str]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(denoiser.parameters()).device.type, (torch.distributed.get_world_size(),))
    for block in denoiser.modules():
        if type(block).__name__ in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh, reshard_after_forward=True)


def _by_zero3(denoiser: nn.Module, blocks: Sequence[str]) -> None:  # noqa: ARG001  (it finds what to gather)
    import deepspeed

    # it is asked to train nothing, and gathers and frees weights on both ways
    few = {"stage": 3, "stage3_param_persistence_threshold": 0}
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())
    deepspeed.initialize(model=denoiser, config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": few})


_KINDS = {"fsdp": _by_fsdp, "zero3": _by_zero3}
