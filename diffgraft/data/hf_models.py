"""Loading transformers models for pictures by hub id or folder, without running their code or unpickling."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from diffgraft.data.hub import hub_reachable, offline
from diffgraft.errors import DiffgraftError
from diffgraft.third_party import quiet_libraries

_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {"ViTModel": {"add_pooling_layer": False}}
"""Class of transformers → further arguments; the first DINO is a ViT without a layer after its class token"""


def load_hf_model(
    kinds: Sequence[Any], where: str, purpose: str, processor_kind: Any = None, option: str = "--model FOLDER"
) -> tuple[Any, Any]:
    """Load a model and its processor, and move the model to the device of this process.

    Args:
        kinds: classes of transformers to load it with; the first that supports its configuration is used.
        where: hub id or folder.
        purpose: what the model is needed for, such as "caption pictures", for error messages.
        processor_kind: class of transformers that loads the processor; None: AutoProcessor.
        option: option of the command that names another model, for error messages.

    Returns:
        The model, in evaluation mode, and its processor.

    Raises:
        DiffgraftError: the model does not exist, is of another kind, or has no weights in safetensors.
    """
    from transformers import AutoConfig, AutoProcessor

    is_local = Path(where).expanduser().exists()
    path = str(Path(where).expanduser()) if is_local else where
    try:
        with quiet_libraries(), nullcontext() if is_local or hub_reachable("model", where) else offline():
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            kind = next((kind for kind in kinds if _supports(kind, config)), None)
            if kind is None:
                raise ValueError(f"it is of the kind {config.model_type!r}")
            safe = {"use_safetensors": True, "trust_remote_code": False}
            more = _ARGUMENTS.get(kind.__name__, {})
            model, loading_info = kind.from_pretrained(path, output_loading_info=True, **safe, **more)
            processor = (processor_kind or AutoProcessor).from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, LookupError, AttributeError, TypeError) as error:
        raise DiffgraftError(_load_error(where, error, purpose, option)) from error
    if missing := sorted(loading_info["missing_keys"]):
        raise DiffgraftError(
            f"{where} is not a model that can {purpose}: its file lacks {len(missing)} of the tensors, such as "
            f"{missing[0]}. Choose another with {option}."
        )
    return model.to(process_state().device).eval(), processor


def process_state() -> Any:
    """Return accelerate's state of this process: its device, and its index among the processes of a launch."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def _supports(kind: Any, config: Any) -> bool:
    """Whether a model class, or a class that an auto class can choose, supports a configuration."""
    mapping = getattr(kind, "_model_mapping", None)
    return type(config) in mapping if mapping is not None else isinstance(config, kind.config_class)


def _load_error(where: str, error: Exception, purpose: str, option: str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[0].rstrip(".")
    if "safetensors" in str(error):
        return f"{where} has no weights in safetensors, and other formats are not opened. Choose another with {option}."
    if isinstance(error, OSError):
        return (
            f"The model {where!r} was not found as a folder, in the cache or on the hub (if reachable): {reason}. "
            f"Give the folder of a model: {option}."
        )
    return f"{where} is not a model that can {purpose}: {reason}. Choose another with {option}."
