"""Loading bases: the embedded one, a diffusers folder, a model on the hub, or a single checkpoint file."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict, get_args

import torch
from safetensors import SafetensorError, safe_open

from diffgraft.bases.base import Base, Digest
from diffgraft.bases.checkpoint_files import FLOAT_DTYPES, files_of_part, main_dtype
from diffgraft.bases.family import Component, Family
from diffgraft.bases.folder import build_pipeline
from diffgraft.bases.header_config import ConfigOverrides, copy_config, read_config_overrides, write_config_overrides
from diffgraft.bases.ldm_keys import UNET_PREFIX, VAE_PREFIX, is_open_clip, ldm_state_dict
from diffgraft.bases.prediction import detect_prediction_type, with_prediction_type
from diffgraft.bases.processors import tokenizer_in
from diffgraft.bases.quantize import quantized
from diffgraft.bases.quantized import Quantize
from diffgraft.bases.registry import families, part_names
from diffgraft.bases.transformer_files import TransformerFile, open_transformer
from diffgraft.bases.unet import inpainting_class
from diffgraft.errors import DiffgraftError, did_you_mean, short_repr, wrap_system_errors
from diffgraft.third_party import quiet_libraries


def known_pipelines() -> dict[str, Mapping[str, Component]]:
    """Return class name of a diffusers pipeline → its components, for all families that load from folders."""
    return {family.pipeline_class: family.components for family in families().values() if family.pipeline_class}


TINY = Path(__file__).parent / "tiny" / "model"
TINY_FLOW = Path(__file__).parent / "tiny" / "flow"
CONFIGS = Path(__file__).parent / "configs"
_FIRST = f"{UNET_PREFIX}input_blocks.0.0.weight"
_ADVICE = "If it is an adapter, not a base: give it to `generate` with --adapter, or to `merge`."


class LoadOptions(TypedDict, total=False):
    """Options for loading a base, beside its dtype."""

    prediction_type: str | None
    """Prediction type, ``epsilon`` or ``v_prediction``, if the files lack it or it is wrong"""
    zero_snr: bool | None
    """Whether the noise schedule has zero terminal SNR, if the files lack it or it is wrong"""
    components: str | None
    """Diffusers folder or hub id with the text encoders, VAE and noise schedule of a transformer in a single file"""
    quantize: Quantize
    """``fp8``, ``int8`` or ``nf4``: quantize the linear layers of denoiser and text encoders to 8 or about 4 bits"""


def load_options(
    prediction_type: str | None, zero_snr: bool | None, components: str | None, quantize: str = "none"
) -> LoadOptions:
    """Return `LoadOptions` from options of the command line."""
    schedule: LoadOptions = {"prediction_type": prediction_type, "zero_snr": zero_snr}
    return {**schedule, "components": components, "quantize": quantize}  # type: ignore[typeddict-item]


@wrap_system_errors
def load_base(
    source: str | Path = "tiny",
    dtype: torch.dtype | None = torch.float32,
    *,
    family: str | None = None,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
    components: str | Path | None = None,
    quantize: Quantize = "none",
) -> Base:
    """Load a base and freeze it.

    Args:
        source: ``tiny`` (the embedded base), a diffusers folder, a single ``.safetensors`` checkpoint in the original
            layout, a single ``.safetensors`` or ``.gguf`` file of a transformer, or a model's id on the Hugging Face
            hub.
        dtype: dtype of the weights; None: for each network that of its files.
        family: a key of `diffgraft.bases.registry.families`; by default the family is detected.
        prediction_type: ``epsilon`` or ``v_prediction``, if the files lack it or it is wrong.
        zero_snr: whether the noise schedule has zero terminal SNR, if the files lack it or it is wrong.
        components: diffusers folder or hub id with the text encoders, VAE and noise schedule of a base, if `source` is
            the single file of a transformer, which lacks them.
        quantize: ``fp8``, ``int8`` or ``nf4``: quantize the linear layers of denoiser and text encoders to 8 or about 4
            bits per weight. Files in float8 keep their numbers by ``fp8``. Such a base needs less memory, and can train
            adapters and draw.

    Raises:
        DiffgraftError: `source` does not exist, cannot be read, or is not a base of a known family.
    """
    if family is not None and family not in families():
        raise DiffgraftError(f"Invalid value family={family!r}: {did_you_mean(family, families())}")
    if not isinstance(source, str | Path):
        raise DiffgraftError(f"Invalid base {short_repr(source)}: must be a name or a path.")
    if quantize not in get_args(Quantize):
        hint = "for 4 bits use 'nf4'." if "4" in str(quantize) else did_you_mean(quantize, get_args(Quantize))
        raise DiffgraftError(f"Invalid value quantize={quantize!r}: {hint}")
    with quiet_libraries():
        path = locate_base(source)
        pipe, digest = _read(path, components, family, dtype)
    pipe.scheduler = with_prediction_type(pipe.scheduler, prediction_type, zero_snr)
    detected = families()[family] if family else next(item for item in families().values() if item.matches(pipe))
    if type(pipe).__name__ not in (detected.pipeline_class, inpainting_class(detected.pipeline_class)):
        raise DiffgraftError(
            f"{source} is a {type(pipe).__name__}, which draws otherwise than a base of the family {detected.name}. "
            "Give a text-to-image model."
        )
    base = Base(
        name=str(source), family=detected, **parts_of(pipe), components_from=str(components or ""), digest=digest
    )
    # a transformer's file and its components are read in their dtypes
    dtypes = _dtypes_on_disk(path, detected) if dtype is None and components is None else {}
    with quiet_libraries():
        for name, part in base.parts():
            part.to(dtypes.get(name, dtype))
        return quantized(base, quantize)


def _read(
    path: Path, components: str | Path | None, family: str | None, dtype: torch.dtype | None
) -> tuple[Any, Digest | None]:
    """Return the pipeline of a folder or file, and the digest over its denoiser if that was cast while it was read."""
    if path.is_file():
        with open_transformer(path, family) as transformer:
            if transformer is not None:
                return transformer.load(components_of(transformer, components), "files", dtype)
    refuse_components(path, components)
    return (_from_file(path, family) if path.is_file() else build_pipeline(path, known_pipelines(), "files")), None


def components_of(transformer: TransformerFile, components: str | Path | None, *, weights: bool = True) -> Path:
    """Return the folder with the other components of a transformer; those on the hub are downloaded.

    Raises:
        DiffgraftError: none are named, or there is no such folder.
    """
    path, family = transformer.file.path, transformer.family
    if components is None:
        example = f", such as components={family.published}" if family.published else ""
        raise DiffgraftError(
            f"{path} is the single file of a {family.name} transformer: name a diffusers folder or hub id that has its "
            f"text encoders, VAE and noise schedule{example}."
        )
    folder = locate_base(components, weights=weights, unless=family.denoiser)
    if not folder.is_dir():
        raise DiffgraftError(f"components={components} is a file: give a diffusers folder, or a hub id.")
    return folder


def refuse_components(path: Path, components: str | Path | None) -> None:
    """Raise DiffgraftError if components are named for a base that is no transformer's single file."""
    if components is not None:
        raise DiffgraftError(
            f"components={components} is for the single file of a transformer, and {path} has components of its own, "
            "or is none of a known family: leave it out."
        )


def base_of(pipe: Any) -> Base:
    """Return the base of a loaded diffusers pipeline; its networks are shared and frozen.

    Pipelines for other tasks, such as image to image, are read as text-to-image pipelines of the same networks.

    Raises:
        DiffgraftError: the pipeline is of no known family.
    """
    from diffusers import AutoPipelineForText2Image

    known = [*families().values()]
    try:
        with quiet_libraries():
            plain = pipe if type(pipe).__name__ in known_pipelines() else AutoPipelineForText2Image.from_pipe(pipe)
        detected = next(family for family in known if family.matches(plain))
    except (ValueError, AttributeError, StopIteration) as error:
        raise DiffgraftError(
            f"A {type(pipe).__name__} is of no known family: give a pipeline of one of {', '.join(families())}."
        ) from error
    name = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    return Base(name=name, family=detected, **parts_of(plain))


def locate_base(source: str | Path, *, weights: bool = True, unless: str = "") -> Path:
    """Return the path of a base on disk; a base on the hub is downloaded.

    Args:
        source: name, path or hub id of the base.
        weights: whether weights are downloaded.
        unless: name of a network whose weights are not.

    Raises:
        DiffgraftError: the base does not exist, or the hub cannot be reached.
    """
    path = TINY if str(source) == "tiny" else Path(source).expanduser()
    if path.exists():
        return path
    if path.suffix in (".safetensors", ".gguf", ".ckpt", ".pt", ".bin"):
        raise DiffgraftError(f"The base {source} was not found: there is no such file.")
    return _from_hub(str(source), weights, unless)


def _dtypes_on_disk(path: Path, family: Family) -> dict[str, torch.dtype]:
    """Return network → dtype of its weights in a diffusers folder, or in a single file of a family."""
    if path.is_dir():
        conditioners = (slot.component for slot in family.conditioners)
        dtypes = {name: main_dtype(files_of_part(path / name)) for name in (*part_names(), *conditioners, "vae")}
    else:
        prefixes = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, **family.single_file_prefixes}
        dtypes = {name: main_dtype([path], prefix) for name, prefix in prefixes.items()}
    return {name: dtype for name, dtype in dtypes.items() if dtype is not None}


def parts_of(pipe: Any) -> dict[str, Any]:
    """Return networks, tokenizers and scheduler of a pipeline as keyword arguments of `Base`."""
    own = {field.name for field in fields(Base) if field.init} - {"name", "family", "others", "components_from"}
    found = {name: getattr(pipe, name, None) for name in {*own, *known_pipelines().get(type(pipe).__name__, {})}}
    found["tokenizer"] = tokenizer_in(pipe, "tokenizer")
    others = {name: part for name, part in found.items() if name not in own}
    return {name: part for name, part in found.items() if name in own} | {"others": others}


def _has_full_precision(folder: Path) -> bool:
    files = [*folder.glob("unet/*.safetensors")] or [*folder.glob("*/*.safetensors")]
    return any(".fp16." not in path.name for path in files)


@dataclass(frozen=True)
class SingleFile:
    """Properties of a checkpoint in the original layout, read from its header."""

    family: str
    """Name of its family"""
    channels: int
    """Input channels of the UNet"""
    prediction: dict[str, Any]
    """`prediction_type` and `zero_snr`, as far as the header determines them"""
    overrides: ConfigOverrides
    """Fields in which its configuration differs from its family's, if diffgraft wrote the file"""

    @property
    def pipeline(self) -> Any:
        """Class name of the diffusers pipeline of the checkpoint."""
        import diffusers

        kind = families()[self.family].pipeline_class
        return getattr(diffusers, kind if self.channels == 4 else inpainting_class(kind))

    def tokenizers(self) -> dict[str, Any]:
        """Return the tokenizers of the checkpoint by name."""
        prefixes = families()[self.family].single_file_prefixes.items()
        pads = {part: "!" if is_open_clip(prefix) else "<|endoftext|>" for part, prefix in prefixes}
        return {part.replace("text_encoder", "tokenizer"): clip_tokenizer(pad) for part, pad in pads.items()}


def read_single_file(path: Path, family: str | None = None) -> SingleFile:
    """Read the header of a checkpoint in the original layout.

    Raises:
        DiffgraftError: it is not a safetensors file, or not a checkpoint of `family`, or of any family if that is None.
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
                name,
                channels,
                detect_prediction_type(name, file, keys),
                read_config_overrides(path, file.metadata() or {}),
            )
    except (SafetensorError, OSError) as error:
        raise DiffgraftError(f"{path} is not a readable .safetensors file: {_first_line(error)}") from error


def _from_file(path: Path, family: str | None) -> Any:
    file = read_single_file(path, family)
    dtypes = {*_dtypes_on_disk(path, families()[file.family]).values()}
    arguments = file.tokenizers()
    if "safety_checker" in file.pipeline._optional_components:
        arguments["safety_checker"] = None
    if len(dtypes) == 1:
        arguments["dtype"] = dtypes.pop()
    _check_weights(path, file)
    try:
        with config_folder(file) as config:
            pipe = file.pipeline.from_single_file(path, config=str(config), local_files_only=True, **arguments)
    except Exception as error:  # the loader raises many kinds of exceptions for files that it cannot parse
        raise DiffgraftError(
            f"{path} cannot be loaded as a checkpoint of {file.family}: {_first_line(error)} {_ADVICE}"
        ) from error
    pipe.scheduler = with_prediction_type(pipe.scheduler, **file.prediction)
    return pipe


def _check_weights(path: Path, single: SingleFile) -> None:
    """Compare the header of a single file with its configuration, as the loader fills missing weights at random.

    Raises:
        DiffgraftError: a weight is missing, has another shape, or belongs to a UNet of another configuration.
    """
    with config_folder(single) as folder:
        pipe = build_pipeline(folder, known_pipelines(), "nowhere", single.tokenizers())
    family = families()[single.family]
    wanted = {
        name: tuple(value.shape)
        for name, value in ldm_state_dict(Base(name=str(path), family=family, **parts_of(pipe))).items()
    }
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        problem = f"{path} is not a whole checkpoint of {single.family}"
        if missing := [name for name in wanted if name not in tensors]:
            raise DiffgraftError(f"{problem}: it lacks {len(missing)} of its weights, such as {missing[0]}. {_ADVICE}")
        if others := [name for name in tensors if name.startswith(UNET_PREFIX) and name not in wanted]:
            raise DiffgraftError(f"{problem}: {others[0]} belongs to a UNet of another configuration. {_ADVICE}")
        for name, shape in wanted.items():
            actual = tuple(tensors[name].get_shape())
            if _without_ones(actual) != _without_ones(shape):
                raise DiffgraftError(f"{problem}: {name} has the shape {[*actual]}, expected {[*shape]}. {_ADVICE}")
            if tensors[name].get_dtype() not in FLOAT_DTYPES:
                raise DiffgraftError(f"{problem}: {name} is {tensors[name].get_dtype()}; weights are floating-point.")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a 1 x 1 convolution as that of a linear layer; files may have either for the same weight."""
    return shape[:2] if shape[2:] == (1, 1) else shape


@contextmanager
def config_folder(file: SingleFile) -> Iterator[Path]:
    """Yield a folder with the configuration of a single file: its family's, with the overrides in its header."""
    folder = CONFIGS / file.family
    if file.channels == 4 and not file.overrides:
        yield folder
        return
    with TemporaryDirectory() as name:
        copy = copy_config(folder, Path(name))
        write_config_overrides(copy, file.overrides, file.channels)
        yield copy


def _family_of(path: Path, keys: set[str], wanted: str | None) -> str:
    """Return the family of a single file by the names of its text encoders; `wanted` is checked against them."""
    if wanted is not None and not families()[wanted].single_file_prefixes:
        raise DiffgraftError(
            f"{path} is not a whole single-file checkpoint of {wanted}: such bases are loaded from diffusers folders "
            "or hub ids."
        )
    prefixes_of = {
        name: family.single_file_prefixes.values() for name, family in families().items() if family.single_file_prefixes
    }
    matches = [
        name
        for name, prefixes in prefixes_of.items()
        if all(any(key.startswith(prefix) for key in keys) for prefix in prefixes)
    ]
    if wanted is None and matches:
        return matches[0]
    if wanted in matches:
        return str(wanted)
    expected = wanted or ", ".join(prefixes_of)
    raise DiffgraftError(
        f"{path} is not a whole single-file checkpoint of {expected}: it has no text encoder under the names of Stable "
        f"Diffusion's own code. {_ADVICE}"
    )


def clip_tokenizer(padding: str) -> Any:
    """Return CLIP's tokenizer with a padding token; OpenCLIP pads with ``!``, whose id is 0."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TINY / "tokenizer", pad_token=padding)


def _from_hub(name: str, weights: bool, unless: str) -> Path:
    """Download a model from the hub and return its folder; without `weights` only its configuration.

    Weights of the network `unless` are left out.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted, unwanted = ["*.json", "*.txt", "*.jinja", "*/*.safetensors"], ["*/*non_ema*", "safety_checker/*"]
    unwanted += [f"{unless}/*.safetensors"] if unless else []
    try:
        if not weights:
            return Path(snapshot_download(name, allow_patterns=wanted[:3], ignore_patterns=unwanted))
        folder = snapshot_download(name, allow_patterns=wanted, ignore_patterns=[*unwanted, "*/*.fp16.*"])
        if not _has_full_precision(Path(folder)):  # some models only have fp16 weights
            folder = snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted)
    except (OSError, RuntimeError, HFValidationError) as error:
        raise DiffgraftError(
            f"The base {name!r} was not found: there is no folder or file of that name, and the hub has no such model "
            "or cannot be reached. Give `tiny`, a diffusers folder, a .safetensors checkpoint, or a hub id. "
            f"The hub's client reports: {_first_line(error)}"
        ) from error
    return Path(folder)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if lines[0].endswith((".", "!")) else lines[0] + "."
