"""Devices and distributed processes, by accelerate: what the processes of one run share and must agree on."""

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from diffgraft.errors import DiffgraftError
from diffgraft.progress import Control
from diffgraft.trainers.recipe.groups import OutputSettings, RuntimeSettings

TIMEOUT = timedelta(hours=12)
"""How long a process waits for one that generates or saves; if a process dies, all end at once"""
_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def new_accelerator(runtime: RuntimeSettings, outputs: OutputSettings, *, text_stops: bool = False) -> Any:
    """Create the `Accelerator` of a run, which knows its devices, processes and precision.

    Args:
        runtime: precision and sharding.
        outputs: trackers and the run's folder.
        text_stops: whether the text encoders stop training during the run (`text_encoder_stop`).

    Raises:
        DiffgraftError: the environment does not allow what the recipe asks for.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration

    precision = _PRECISIONS[runtime.precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # it remembers the precision of an earlier run in this process
    ddp = DistributedDataParallelKwargs(find_unused_parameters=text_stops)
    accelerator = Accelerator(
        mixed_precision=precision,
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=TIMEOUT)],
        log_with=outputs.trackers or None,
        project_config=ProjectConfiguration(outputs.output or None, str(Path(outputs.output, "logs"))),
    )
    if accelerator.num_processes == 1 < int(os.environ.get("WORLD_SIZE", "1")):
        raise DiffgraftError(
            f"{os.environ['WORLD_SIZE']} processes were started, but no GPU was found, so that accelerate runs each "
            "on its own. To train on CPUs, set ACCELERATE_USE_CPU=true in their environment."
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        kind = {"FSDP": "fsdp", "DEEPSPEED": "zero3"}[accelerator.distributed_type.value]
        raise DiffgraftError(
            f"accelerate was launched with {accelerator.distributed_type.value}, which would also shard the adapter. "
            f"Launch with --multi_gpu alone and set shard={kind}, which shards only the frozen denoiser."
        )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise DiffgraftError("precision=float16 needs a GPU; on a CPU use precision=bfloat16 or float32.")
    return accelerator


def shared_mean(accelerator: Any, terms: Mapping[str, float]) -> dict[str, float]:
    """Mean of each named number over all processes; equal on all of them."""
    if accelerator.num_processes == 1:
        return dict(terms)
    local = torch.tensor(list(terms.values()), dtype=torch.float32, device=accelerator.device)
    return dict(zip(terms, accelerator.reduce(local, "mean").tolist(), strict=True))


def shared_requests(accelerator: Any, control: Control) -> frozenset[str]:
    """Return the requests (`stop`, `sample`, `save`) that the main process received since the last call.

    All processes must call it together, and all get the same answer.
    """
    requests = {name for name in ("sample", "save") if control.pop_request(name)}
    requests |= {"stop"} if control.is_stopping else set()
    if accelerator.num_processes == 1:
        return frozenset(requests)
    from accelerate.utils import broadcast_object_list

    return frozenset(broadcast_object_list([sorted(requests)])[0])


def shared_folder(accelerator: Any, folder: Path) -> Path:
    """The main process's folder, on all processes; default names contain the time, and may differ between them."""
    from accelerate.utils import broadcast_object_list

    accelerator.wait_for_everyone()  # all have looked for an earlier run before one of them writes
    return Path(broadcast_object_list([str(folder)])[0])


def check_same_step(accelerator: Any, folder: Path, done: int) -> None:
    """Check that all processes resume from the same step `done`.

    Raises:
        DiffgraftError: they do not, since some machine does not see the run's folder.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    steps = gather_object([done])
    if len(set(steps)) > 1:
        raise DiffgraftError(
            f"The processes found different checkpoints in {folder}: {', '.join(map(str, steps))} steps. Put the "
            "run's folder on a disk that all machines share."
        )
