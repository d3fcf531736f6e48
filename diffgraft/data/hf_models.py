"""Models of transformers that look at pictures, by hub id or folder; nothing of theirs is run or unpickled."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from diffgraft.data.hub import answers, offline
from diffgraft.errors import DiffgraftError
from diffgraft.third_party import quiet_libraries


def load_hf_model(kinds: Sequence[Any], where: str, purpose: str) -> tuple[Any, Any]:
    """A model and its processor, on the device of this process.

    Args:
        kinds: the classes of transformers that may open it: the first that knows its kind does.
        where: hub id or folder.
        purpose: what it should be able to do, for the message where it is not.

    Raises:
        DiffgraftError: there is no such model, it is of another kind, or holds no weights for it in safetensors.
    """
    from transformers import AutoConfig, AutoProcessor

    is_local = Path(where).expanduser().exists()
    place = str(Path(where).expanduser()) if is_local else where
    try:
        with quiet_libraries(), nullcontext() if is_local or answers("model", where) else offline():
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
            kind = next((kind for kind in kinds if _knows(kind, config)), None)
            if kind is None:
                raise ValueError(f"it is of the kind {config.model_type!r}")
            safe = {"use_safetensors": True, "trust_remote_code": False}
            model, told = kind.from_pretrained(place, output_loading_info=True, **safe)
            processor = AutoProcessor.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, ImportError, LookupError, AttributeError, TypeError) as error:
        raise DiffgraftError(_why(where, error, purpose)) from error
    if missing := sorted(told["missing_keys"]):
        raise DiffgraftError(
            f"{where} is no model that can {purpose}: its file lacks {len(missing)} tensors of such a model, like "
            f"{missing[0]}. Name another with --model."
        )
    return model.to(this_process().device).eval(), processor


def this_process() -> Any:
    """Its device, and its place among those that `accelerate launch` or torchrun has started."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def _knows(kind: Any, config: Any) -> bool:
    """Whether a class, or one of those that an auto class chooses from, is for such a configuration."""
    mapping = getattr(kind, "_model_mapping", None)
    return type(config) in mapping if mapping is not None else isinstance(config, kind.config_class)


def _why(where: str, error: Exception, purpose: str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = lines[0].rstrip(".")
    if "safetensors" in str(error):
        return f"{where} holds no weights in safetensors, and others are not opened. Name another with --model."
    if isinstance(error, OSError):
        return (
            f"There is no model {where!r} in a folder, in the cache, or on the hub as far as can be reached: {said}. "
            "Give the folder of one: --model FOLDER."
        )
    return f"{where} is no model that can {purpose}: {said}. Name another with --model."
