"""Devices and processes, by accelerate: what processes that train as one share and must agree upon."""

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from diffgraft.errors import DiffgraftError
from diffgraft.progress import Control
from diffgraft.trainers.recipe.groups import OutputSettings, RuntimeSettings

PATIENCE = timedelta(hours=12)
"""So long a process waits for the others, while one of them draws or saves; one that dies ends all at once"""
_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def new_accelerator(runtime: RuntimeSettings, outputs: OutputSettings, *, text_stops: bool = False) -> Any:
    """Accelerate's view of devices, processes and precision; ``accelerate launch`` is how more than one takes part.

    `text_stops` says that some parameters stop training on the way.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration

    wanted = _PRECISIONS[runtime.precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()  # it remembers the precision of an earlier run in this process
    some_stop = DistributedDataParallelKwargs(find_unused_parameters=text_stops)
    accelerator = Accelerator(
        mixed_precision=wanted,
        kwargs_handlers=[some_stop, InitProcessGroupKwargs(timeout=PATIENCE)],
        log_with=outputs.trackers or None,
        project_config=ProjectConfiguration(outputs.output or None, str(Path(outputs.output, "logs"))),
    )
    if accelerator.num_processes == 1 < int(os.environ.get("WORLD_SIZE", "1")):
        raise DiffgraftError(
            f"{os.environ['WORLD_SIZE']} processes were started, and without a GPU accelerate takes each for the only "
            "one. If they are to train on processors, set ACCELERATE_USE_CPU=true in their environment."
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        kind = {"FSDP": "fsdp", "DEEPSPEED": "zero3"}[accelerator.distributed_type.value]
        raise DiffgraftError(
            f"The launch asks accelerate itself for {accelerator.distributed_type.value}, which would cut up the "
            f"adapter, too. Launch with --multi_gpu alone, and set shard={kind}: that cuts up the frozen UNet."
        )
    if wanted == "fp16" and accelerator.device.type == "cpu":
        raise DiffgraftError("precision=float16 needs a GPU; on a processor use precision=bfloat16 or float32.")
    return accelerator


def shared_mean(accelerator: Any, terms: Mapping[str, float]) -> dict[str, float]:
    """The means of these numbers over all processes, the same everywhere."""
    if accelerator.num_processes == 1:
        return dict(terms)
    own = torch.tensor(list(terms.values()), dtype=torch.float32, device=accelerator.device)
    return dict(zip(terms, accelerator.reduce(own, "mean").tolist(), strict=True))


def shared_requests(accelerator: Any, control: Control) -> frozenset[str]:
    """What was asked for by the main process's control since the last call: `stop`, `sample`, `save`; all get it."""
    asked = {what for what in ("sample", "save") if control.pop_request(what)} | (
        {"stop"} if control.is_stopping else set()
    )
    if accelerator.num_processes == 1:
        return frozenset(asked)
    from accelerate.utils import broadcast_object_list

    return frozenset(broadcast_object_list([sorted(asked)])[0])


def the_same_folder(accelerator: Any, folder: Path) -> Path:
    """The main process's folder; a name made of the time may differ from one to the next."""
    from accelerate.utils import broadcast_object_list

    accelerator.wait_for_everyone()  # none looks for an earlier run there when another has begun to write
    return Path(broadcast_object_list([str(folder)])[0])


def check_together(accelerator: Any, folder: Path, done: int) -> None:
    """Refuse processes that would go on from different steps.

    Raises:
        DiffgraftError: a machine does not see the run's folder.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    found = gather_object([done])
    if len(set(found)) > 1:
        raise DiffgraftError(
            f"The processes find different checkpoints in {folder}: {', '.join(map(str, found))} steps. All machines "
            "need the run's folder on a disk that they share."
        )
