"""From a name to a base: the embedded one, a diffusers folder, a hub id, or a single checkpoint file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict, get_args

import torch
from safetensors import SafetensorError, safe_open

from diffgraft.bases.base import Base
from diffgraft.bases.checkpoint_files import FLOAT_DTYPES, files_of_part, main_dtype
from diffgraft.bases.family import Family
from diffgraft.bases.folder import pipeline_of
from diffgraft.bases.header_config import ConfigOverrides, copy_config, read_config_overrides, write_config_overrides
from diffgraft.bases.ldm_keys import UNET_PREFIX, VAE_PREFIX, is_open_clip, ldm_state_dict
from diffgraft.bases.prediction import scheduled, told_by
from diffgraft.bases.quantize import quantized
from diffgraft.bases.quantized import Quantize
from diffgraft.bases.registry import families, part_names
from diffgraft.bases.unet import inpainting
from diffgraft.errors import DiffgraftError, did_you_mean, short_repr, wrap_system_errors
from diffgraft.third_party import quiet_libraries


def known_pipelines() -> dict[str, bool]:
    """Class of a pipeline of diffusers → whether it has two text encoders."""
    return {one.pipeline_class: len(one.text) > 1 for one in families().values() if one.pipeline_class}


TINY = Path(__file__).parent / "tiny" / "model"
CONFIGS = Path(__file__).parent / "configs"
_FIRST = f"{UNET_PREFIX}input_blocks.0.0.weight"
_ADVICE = "An adapter is no base: `generate` takes it with --adapter, and `merge` before --into."


class LoadOptions(TypedDict, total=False):
    """How a base is loaded, beside its precision."""

    prediction_type: str | None
    """``epsilon`` or ``v_prediction``, where what the files say, or do not say, is wrong"""
    zero_snr: bool | None
    """Whether the noise schedule is rescaled to end in pure noise, alike"""
    quantize: Quantize
    """``int8`` or ``nf4``: the weights of linear layers, of denoiser and text encoders, in 8 or about 4 bits"""


def load_options(predicts: str | None, zero_snr: bool | None, quantize: str = "none") -> LoadOptions:
    """`LoadOptions`, as a command line has them."""
    return {"prediction_type": predicts, "zero_snr": zero_snr, "quantize": quantize}  # type: ignore[typeddict-item]


@wrap_system_errors
def load_base(
    source: str | Path = "tiny",
    dtype: torch.dtype | None = torch.float32,
    *,
    family: str | None = None,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
    quantize: Quantize = "none",
) -> Base:
    """Load a base and freeze it.

    Args:
        source: ``tiny`` (the embedded base), a diffusers folder, a single ``.safetensors`` checkpoint in the original
            layout, or a model's id on the Hugging Face hub.
        dtype: precision the weights are held in; None: of each part that of its files.
        family: a key of `diffgraft.bases.registry.families`, where what is found in the files is not to decide.
        prediction_type: ``epsilon`` or ``v_prediction``, where what the files say, or do not say, is wrong.
        zero_snr: whether the noise schedule is rescaled to end in pure noise, alike.
        quantize: ``int8`` or ``nf4``: the weights of linear layers, of UNet and text encoders, in 8 or about 4 bits;
            such a base trains adapters and draws, in less memory.

    Raises:
        DiffgraftError: nothing by that name can be read, or it is no base of a known family.
    """
    if family is not None and family not in families():
        raise DiffgraftError(f"There is no family {family!r} of bases: {did_you_mean(family, families())}")
    if not isinstance(source, str | Path):
        raise DiffgraftError(f"Invalid base {short_repr(source)}: must be a name or a path.")
    if quantize not in get_args(Quantize):
        hint = "for 4 bits take 'nf4'." if "4" in str(quantize) else did_you_mean(quantize, get_args(Quantize))
        raise DiffgraftError(f"Invalid value quantize={quantize!r}: {hint}")
    with quiet_libraries():
        path = located(source)
        pipe = _from_file(path, family) if path.is_file() else pipeline_of(path, known_pipelines(), "files")
    pipe.scheduler = scheduled(pipe.scheduler, prediction_type, zero_snr)
    found = families()[family] if family else next(one for one in families().values() if one.matches(pipe))
    if type(pipe).__name__ not in (found.pipeline_class, inpainting(found.pipeline_class)):
        raise DiffgraftError(f"{source} is a {type(pipe).__name__}, and no base of the family {found.name} is.")
    base = Base(name=str(source), family=found, **parts_of(pipe))
    held = _precisions(path, found) if dtype is None else {}
    with quiet_libraries():
        for name, part in base.parts():
            part.to(held.get(name, dtype))
        return quantized(base, quantize)


def located(source: str | Path, *, weights: bool = True) -> Path:
    """Where a base lies on disk; of one on the hub, what is needed is brought: all but the weights, if those are not.

    Raises:
        DiffgraftError: there is none.
    """
    path = TINY if str(source) == "tiny" else Path(source).expanduser()
    if path.exists():
        return path
    if path.suffix in (".safetensors", ".ckpt", ".pt", ".bin"):
        raise DiffgraftError(f"There is no base {source}: no file of that name exists.")
    return _from_hub(str(source), weights)


def _precisions(path: Path, family: Family | None = None) -> dict[str, torch.dtype]:
    """Part → the precision in which a folder, or a single file of a family, holds it."""
    if family is None or path.is_dir():
        found = {name: main_dtype(files_of_part(path / name)) for name in (*part_names(), "vae")}
    else:
        starts = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, **family.single_file_prefixes}
        found = {name: main_dtype([path], start) for name, start in starts.items()}
    return {name: dtype for name, dtype in found.items() if dtype is not None}


def parts_of(pipe: Any) -> dict[str, Any]:
    """Networks, tokenizers and scheduler of a pipeline, as `Base` takes them."""
    names = ("unet", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return {name: getattr(pipe, name, None) for name in names}


def _holds_plain_weights(folder: Path) -> bool:
    return any(".fp16." not in path.name for path in folder.glob("unet/*.safetensors"))


@dataclass(frozen=True)
class SingleFile:
    """What the header of a checkpoint in the original layout tells."""

    family: str
    channels: int
    """What the UNet takes"""
    told: dict[str, Any]
    """`prediction_type` and `zero_snr`, as far as it tells"""
    stated: ConfigOverrides
    """What of its configuration is not the family's, as files that were written here say it"""

    @property
    def pipeline(self) -> Any:
        """The class of its diffusers pipeline."""
        import diffusers

        kind = families()[self.family].pipeline_class
        return getattr(diffusers, kind if self.channels == 4 else inpainting(kind))

    def tokenizers(self) -> dict[str, Any]:
        """Its tokenizers by name."""
        starts = families()[self.family].single_file_prefixes.items()
        pads = {part: "!" if is_open_clip(start) else "<|endoftext|>" for part, start in starts}
        return {part.replace("text_encoder", "tokenizer"): clip_tokenizer(pad) for part, pad in pads.items()}


def read_single_file(path: Path, family: str | None = None) -> SingleFile:
    """Look at a checkpoint's header.

    Raises:
        DiffgraftError: it is no safetensors file, or no checkpoint of the family, or of any.
    """
    if path.suffix != ".safetensors":
        raise DiffgraftError(
            f"{path} is a {path.suffix or 'suffixless'} file; a single-file base must be .safetensors. Other files may "
            "hold code that runs on opening, so they are not opened. Convert it first, or give a diffusers folder."
        )
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            name = _family_of(path, keys, family)
            channels = file.get_slice(_FIRST).get_shape()[1] if _FIRST in keys else 4
            return SingleFile(
                name, channels, told_by(name, file, keys), read_config_overrides(path, file.metadata() or {})
            )
    except (SafetensorError, OSError) as error:
        raise DiffgraftError(f"{path} is not a readable .safetensors file: {_first_line(error)}") from error


def _from_file(path: Path, family: str | None) -> Any:
    found = read_single_file(path, family)
    dtypes = {*_precisions(path, families()[found.family]).values()}
    more = found.tokenizers()
    if "safety_checker" in found.pipeline._optional_components:
        more["safety_checker"] = None
    if len(dtypes) == 1:
        more["dtype"] = dtypes.pop()
    _check_names(path, found)
    try:
        with configuration(found) as config:
            pipe = found.pipeline.from_single_file(path, config=str(config), local_files_only=True, **more)
    except Exception as error:  # the loader raises whatever its parsing stumbles over
        raise DiffgraftError(
            f"{path} cannot be loaded as a checkpoint of {found.family}: {_first_line(error)} {_ADVICE}"
        ) from error
    pipe.scheduler = scheduled(pipe.scheduler, **found.told)
    return pipe


def _check_names(path: Path, found: SingleFile) -> None:
    """Hold a single file's header against the family's configuration, for the loader fills what is missing at random.

    Raises:
        DiffgraftError: a weight is missing, has another shape, or belongs to a UNet of another configuration.
    """
    with configuration(found) as folder:
        pipe = pipeline_of(folder, known_pipelines(), "nowhere", found.tokenizers())
    family = families()[found.family]
    wanted = {
        name: tuple(value.shape)
        for name, value in ldm_state_dict(Base(name=str(path), family=family, **parts_of(pipe))).items()
    }
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        what = f"{path} is no whole checkpoint of {found.family}"
        if missing := [name for name in wanted if name not in held]:
            raise DiffgraftError(f"{what}: it lacks {len(missing)} of its weights, such as {missing[0]}. {_ADVICE}")
        if others := [name for name in held if name.startswith(UNET_PREFIX) and name not in wanted]:
            raise DiffgraftError(f"{what}: {others[0]} belongs to a UNet of another configuration. {_ADVICE}")
        for name, shape in wanted.items():
            there = tuple(held[name].get_shape())
            if _without_ones(there) != _without_ones(shape):
                raise DiffgraftError(f"{what}: {name} has the shape {[*there]}, and should have {[*shape]}. {_ADVICE}")
            if held[name].get_dtype() not in FLOAT_DTYPES:
                raise DiffgraftError(f"{what}: {name} is in {held[name].get_dtype()}; weights are floating-point.")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1 x 1 convolution and a linear layer hold the same numbers, and files have either."""
    return shape[:2] if shape[2:] == (1, 1) else shape


@contextmanager
def configuration(found: SingleFile) -> Iterator[Path]:
    """A folder with the family's configuration, and what the file says of its own laid over it."""
    folder = CONFIGS / found.family
    if found.channels == 4 and not found.stated:
        yield folder
        return
    with TemporaryDirectory() as name:
        copy = copy_config(folder, Path(name))
        write_config_overrides(copy, found.stated, found.channels)
        yield copy


def _family_of(path: Path, keys: set[str], wanted: str | None) -> str:
    """The family whose text encoders a single file has, or the one that is wanted."""
    starts = {
        name: family.single_file_prefixes.values() for name, family in families().items() if family.single_file_prefixes
    }
    fitting = [name for name, own in starts.items() if all(any(key.startswith(w) for key in keys) for w in own)]
    if wanted is None and fitting:
        return fitting[0]
    if wanted in fitting:
        return str(wanted)
    named = wanted or ", ".join(starts)
    raise DiffgraftError(
        f"{path} is not a whole single-file checkpoint of {named}: it has no text encoder under the names of Stable "
        f"Diffusion's own code. {_ADVICE}"
    )


def clip_tokenizer(padding: str) -> Any:
    """CLIP's own, which all of these families have; OpenCLIP's pads with id 0, which is that of ``!``."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TINY / "tokenizer", pad_token=padding)


def _from_hub(name: str, weights: bool = True) -> Path:
    """The folder into which the hub's client has brought a model."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted, unwanted = ["*.json", "*.txt", "*/*.safetensors"], ["*/*non_ema*", "safety_checker/*"]
    try:
        if not weights:
            return Path(snapshot_download(name, allow_patterns=wanted[:2], ignore_patterns=unwanted))
        folder = snapshot_download(name, allow_patterns=wanted, ignore_patterns=[*unwanted, "*/*.fp16.*"])
        if not _holds_plain_weights(Path(folder)):  # there are models in half precision alone
            folder = snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted)
    except (OSError, RuntimeError, HFValidationError) as error:
        raise DiffgraftError(
            f"There is no base {name!r}: no folder or file of that name exists here, and the hub gave no such model "
            "(or cannot be reached). Give `tiny`, a diffusers folder, a .safetensors checkpoint, or a hub id. "
            f"The hub's client said: {_first_line(error)}"
        ) from error
    return Path(folder)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if lines[0].endswith((".", "!")) else lines[0] + "."
