"""CLIP: pictures and texts as vectors of one space, in which a picture lies near the texts that describe it.

Radford et al. 2021, arXiv:2103.00020. `load_clip` loads any CLIP of transformers by hub id or folder, and the small one
of the embedded base by the name ``tiny``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffgraft.bases.base import weights_hash
from diffgraft.bases.configs import read_object
from diffgraft.errors import DiffgraftError, short_repr, wrap_system_errors
from diffgraft.third_party import quiet_libraries

TINY_CLIP = Path(__file__).parent / "tiny" / "clip"
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of pictures in the training of OpenAI's CLIP, where a folder does not say"""
_NORMALIZED = (("image_mean", _MEAN), ("image_std", _STD))
"""Keys of a preprocessor_config.json, and their usual values"""
_ADVICE = "Give `tiny`, a hub id such as openai/clip-vit-large-patch14, or a folder that `save_pretrained` wrote."


@dataclass(eq=False, repr=False)
class Clip:
    """A frozen CLIP, which embeds pictures and texts as unit vectors; the cosine of two is their inner product."""

    name: str
    """Source it was loaded from: `tiny`, a hub id or a folder"""
    model: Any
    """The `transformers.CLIPModel`, in evaluation mode"""
    tokenizer: Any
    mean: Sequence[float] = _MEAN
    std: Sequence[float] = _STD
    """Mean and standard deviation of red, green and blue that pictures are normalized by"""

    def __post_init__(self) -> None:
        """Freeze the model."""
        self.model.requires_grad_(False).eval()
        self.hash = weights_hash([("clip", self.model)])
        """SHA-256 over names, shapes and float16 values of the weights"""

    def __repr__(self) -> str:
        return f"Clip({self.name!r}, embeddings of {self.width} numbers, {self.model.device})"

    @property
    def width(self) -> int:
        """Number of values in an embedding."""
        return int(self.model.config.projection_dim)

    @property
    def side(self) -> int:
        """Side in pixels of the squares that pictures are scaled to."""
        return int(self.model.config.vision_config.image_size)

    @property
    def text_projection(self) -> Tensor:
        """Matrix [width, text width] from the text model's pooled state to an embedding."""
        weight: Tensor = self.model.text_projection.weight
        return weight

    def to(self, device: torch.device | str) -> "Clip":
        """Move the model in place, and return the CLIP."""
        self.model.to(device)
        return self

    def image_features(self, pictures: Tensor) -> Tensor:
        """Embed pictures [n, 3, h, w] with values from 0 to 1 as unit vectors [n, width], float32.

        The short side is scaled to `side`, bicubic with antialiasing, and the middle square is taken, as CLIP's own
        preparation does. Gradients flow to `pictures`.
        """
        height, width = pictures.shape[-2:]
        scale = self.side / min(height, width)
        size = (max(self.side, round(height * scale)), max(self.side, round(width * scale)))
        if size != (height, width):
            pictures = F.interpolate(pictures, size, mode="bicubic", antialias=True, align_corners=False)
        top, left = ((long - self.side) // 2 for long in size)
        square = pictures[..., top : top + self.side, left : left + self.side]
        mean, std = (square.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        inputs = ((square - mean) / std).to(self.model.device, self.model.dtype)
        features = self.model.visual_projection(self.model.vision_model(pixel_values=inputs).pooler_output)
        return F.normalize(features.float(), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Embed n texts as unit vectors [n, width], float32; of long texts only the first 77 tokens are read."""
        longest = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer([*prompts], padding=True, truncation=True, max_length=longest, return_tensors="pt")
        pooled = self.model.text_model(input_ids=ids.input_ids.to(self.model.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)


@wrap_system_errors
def load_clip(source: str | Path = "tiny") -> Clip:
    """Load a CLIP in float32 and freeze it.

    Args:
        source: ``tiny``, a folder of a `transformers.CLIPModel` with its tokenizer, or a model's id on the Hugging Face
            hub. Code of a model is not run, and only weights in safetensors are read.

    Raises:
        DiffgraftError: `source` does not exist, cannot be read, or is not a CLIP.
    """
    from transformers import CLIPModel, CLIPTokenizer

    folder, _ = _locate(source)
    if not any(folder.glob("*.safetensors")):
        raise DiffgraftError(
            f"{source} has no weights in safetensors; other files may hold code and are not opened. {_ADVICE}"
        )
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise DiffgraftError(f"{source} has no tokenizer, expected vocab.json or tokenizer.json. {_ADVICE}")
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_libraries():
            model, report = CLIPModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
            )
            tokenizer = CLIPTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # the libraries raise many kinds of exceptions for damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DiffgraftError(
            f"{source} cannot be loaded as a CLIP: {reason}. Copy the model's folder again."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise DiffgraftError(
            f"{source} lacks {len(missing)} of the weights that its config.json describes, such as {missing[0]}: copy "
            "the model's folder again."
        )
    prepared = folder / "preprocessor_config.json"
    values = read_object(prepared) if prepared.is_file() else {}
    mean, std = (_three(values.get(key, usual), key, prepared) for key, usual in _NORMALIZED)
    return Clip(str(source), model, tokenizer, mean, std)


def check_clip(source: str | Path) -> None:
    """Check that a CLIP can be found, by its configuration alone; of one on the hub, only that is downloaded.

    Raises:
        DiffgraftError: as for `load_clip`.
    """
    _locate(source, weights=False)


def clip_bytes(source: str | Path) -> int:
    """Return the number of bytes of a CLIP's weights in float32, computed from its configuration."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(**_locate(source, weights=False)[1])
    with torch.device("meta"):
        return sum(4 * int(value.numel()) for value in CLIPModel(config).parameters())


def _locate(source: str | Path, *, weights: bool = True) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a CLIP and its configuration; one on the hub is downloaded, with `weights` if asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if not isinstance(source, str | Path) or not str(source):
        raise DiffgraftError(f"Invalid CLIP {short_repr(source)}: must be a name or a path. {_ADVICE}")
    folder = TINY_CLIP if str(source) == "tiny" else Path(source).expanduser()
    if folder.is_file():
        raise DiffgraftError(f"{source} is a file, expected the folder of a CLIP. {_ADVICE}")
    if not folder.is_dir():
        try:
            patterns = ["*.json", "*.txt", *(["model*.safetensors"] if weights else [])]
            folder = Path(snapshot_download(str(source), allow_patterns=patterns))
        except (OSError, RuntimeError, HFValidationError) as error:
            raise DiffgraftError(
                f"The CLIP {str(source)!r} was not found: there is no such folder, and the hub has no such model or "
                f"cannot be reached. {_ADVICE}"
            ) from error
    if not (folder / "config.json").is_file():
        raise DiffgraftError(f"{source} is not a folder of a CLIP: it has no config.json. {_ADVICE}")
    config = read_object(folder / "config.json")
    if config.get("model_type") != "clip" or "vision_config" not in config:
        kind = short_repr(config.get("model_type", "no model_type"))
        raise DiffgraftError(f"{source} is not a CLIP: its config.json has {kind}, expected 'clip'. {_ADVICE}")
    return folder, config


def _three(values: Iterable[Any] | Any, key: str, path: Path) -> tuple[float, ...]:
    """Return the three numbers of `key` in a preprocessor_config.json."""
    numbers = tuple(values) if isinstance(values, list | tuple) else ()
    if len(numbers) != 3 or not all(isinstance(number, int | float) and abs(number) < 100 for number in numbers):
        raise DiffgraftError(f"{path} has {key}={short_repr(values)}, expected three numbers.")
    if key == "image_std" and not all(number > 0 for number in numbers):
        raise DiffgraftError(f"{path} has {key}={short_repr(values)}, expected three numbers above 0.")
    return numbers
