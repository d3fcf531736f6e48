"""A diffusers folder as a base: the one place that decides what such a folder may hold.

A folder may come from anyone. Its index may name a few classes of two libraries and nothing else; the folder's own code
is never run, and nobody is asked whether to run it. Networks are laid out on the device ``meta``, held against the
headers of the files, and only then filled: every weight is there, in the right shape, and none is left over.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffgraft.bases.checkpoint_files import FLOAT_DTYPES, files_of_part
from diffgraft.bases.configs import (
    BertConfig,
    ClipConfig,
    SchedulerConfig,
    UNetConfig,
    VAEConfig,
    checked,
    read_object,
    short,
)
from diffgraft.bases.unet import inpainting
from diffgraft.bases.vocabulary import check_vocabulary
from diffgraft.errors import DiffgraftError

WeightsFrom = Literal["files", "headers", "nowhere"]
"""Whether networks get the weights of their files, are only held against the files' headers, or neither"""

_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "BertModel")
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "BertTokenizer", "BertTokenizerFast")
_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
KNOWN_PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "scheduler": ("diffusers", _SCHEDULERS),
    "text_encoder": ("transformers", _TEXT_ENCODERS),
    "tokenizer": ("transformers", _TOKENIZERS),
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
    "tokenizer_2": ("transformers", _TOKENIZERS),
}
"""Part → the library and the classes it may have; all of those a pipeline takes must be there"""
_CLIP = Path(__file__).parent / "tiny" / "model" / "tokenizer"
"""CLIP's own, which the embedded base has as well"""
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that may stand in the index and are never loaded"""

_UNREAD = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale", "cls.", "position_ids")
"""What the weights of text encoders may hold beside those of the model: the other half of CLIP, heads of BERT"""
_LAYER = re.compile(r"encoder\.layers?\.(\d{1,3})\.")
"""A layer of a text encoder; files of bases with clip skip hold more of them than their configurations say"""
_RENAMED = {
    "vae": ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")),
    "text": ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")),
}
"""Names in files of earlier releases of the libraries, and what they are called now"""


def index_of(folder: Path, pipelines: Mapping[str, bool]) -> dict[str, tuple[str, str]]:
    """Part → library and class, from the index of a diffusers folder; under ``""`` the class of the pipeline.

    `pipelines` are the known classes of pipelines, with whether they have two text encoders.

    Raises:
        DiffgraftError: there is no index, it cannot be read, a part is missing, or something in it is not known here.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise DiffgraftError(
            f"{folder} is no diffusers folder: it holds no model_index.json. Give the folder that "
            "`save_pretrained` wrote, a single .safetensors checkpoint, a hub id, or `tiny`."
        )
    index = read_object(path)
    kind = index.get("_class_name", "model without a class")
    known = {name: two for one, two in pipelines.items() for name in (one, inpainting(one))}
    if not isinstance(kind, str) or kind not in known:
        named = kind if isinstance(kind, str) and len(kind) < 60 else short(kind)
        raise DiffgraftError(
            f"{folder} is a {named}; the families known here are drawn with: {', '.join(sorted(pipelines))}."
        )
    needed = {name for name in KNOWN_PARTS if known[kind] or not name.endswith("_2")}
    found: dict[str, tuple[str, str]] = {"": ("diffusers", kind)}
    for name, said in index.items():
        if name in needed:
            library, classes = KNOWN_PARTS[name]
            if not isinstance(said, list) or len(said) != 2 or said[0] != library or said[1] not in classes:
                raise DiffgraftError(
                    f"{path} has {short(said)} as its {name}; supported are, of {library}: {', '.join(classes)}."
                )
            found[name] = (library, said[1])
        elif isinstance(said, list | dict) and name not in _LEFT_OUT:
            raise DiffgraftError(f"{path} lists a part {short(name)}, which a {kind} does not have: take it out.")
    for name in sorted(needed - set(found)):
        raise DiffgraftError(f"{path} lists no {name}, which a {kind} needs: copy the model's folder again.")
    return found


def pipeline_of(
    folder: Path,
    pipelines: Mapping[str, bool],
    weights: WeightsFrom,
    tokenizers: Mapping[str, Any] | None = None,
) -> Any:
    """The diffusers pipeline of a folder; its networks lie on ``meta`` if their weights are not read.

    Weights that are read have the precision of most of their files' numbers: that is what a base's hash is taken of.

    Args:
        folder: a diffusers folder.
        pipelines: as in `index_of`.
        weights: where the weights are read from.
        tokenizers: tokenizers by name that stand for those of the folder.

    Raises:
        DiffgraftError: the folder holds something that is not known, damaged or missing.
    """
    import diffusers

    index = index_of(folder, pipelines)
    parts: dict[str, Any] = {**(tokenizers or {})}
    for name in sorted(index, key=lambda name: name.startswith("tokenizer")):  # last, as they take longest
        library, kind = index[name]
        if name in ("unet", "vae") or name.startswith("text_encoder"):
            parts[name] = _network(folder / name, name, library, kind)
            if weights != "nowhere":
                _fill(parts[name], folder / name, name, is_read=weights == "files")
            parts[name].eval()
        elif name == "scheduler":
            parts[name] = _scheduler(folder / name, kind)
        elif name and name not in parts:
            parts[name] = _tokenizer(folder / name, kind)
    _check_fit(folder, parts)
    more: dict[str, Any] = {}
    if "text_encoder_2" not in parts:
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with _said_of(folder, "the parts do not make a pipeline"):
        return getattr(diffusers, index[""][1])(**parts, **more)


@contextmanager
def _said_of(path: Path, what: str) -> Iterator[None]:
    """Whatever the libraries stumble over in the block becomes a sentence about the file or folder at `path`."""
    try:
        yield
    except (DiffgraftError, MemoryError):
        raise
    except BaseException as error:
        # what tokenizers raises when its Rust code gives up is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0] if len(lines[0]) < 200 else f"{lines[0][:200]}…"
        raise DiffgraftError(f"{path} cannot be used, as {what}: {reason.rstrip('.')}.") from error


def _network(folder: Path, part: str, library: str, kind: str) -> Any:
    """A network of the configuration in `folder`, on the device ``meta``."""
    import diffusers
    import transformers

    path = folder / "config.json"
    said = read_object(path)
    if library == "diffusers":
        model: Any = getattr(diffusers, kind)
        values = checked(path, said, UNetConfig if part == "unet" else VAEConfig, model)
        with _said_of(path, f"no {kind} can be built from it"), torch.device("meta"):
            return model.from_config(values)
    model = getattr(transformers, kind)
    if said.get("model_type") == "clip" and isinstance(said.get("text_config"), dict):
        said = said["text_config"]
    values = checked(path, said, BertConfig if kind == "BertModel" else ClipConfig)
    with _said_of(path, f"no {kind} can be built from it"), torch.device("meta"):
        if values["hidden_size"] % values["num_attention_heads"]:
            raise ValueError("hidden_size is no multiple of num_attention_heads")
        return model(model.config_class(**values))


def _plain(part: str) -> Callable[[str], str]:
    """From the name of a weight to the one that all releases of the libraries share."""
    renamed = _RENAMED.get("vae" if part == "vae" else "text" if part.startswith("text") else "", ())

    def plain(name: str) -> str:
        for before, now in renamed:
            name = name.replace(before, now)
        return name if part in ("unet", "vae") else name.removeprefix("bert.").removeprefix("text_model.")

    return plain


def _fill(network: nn.Module, folder: Path, part: str, *, is_read: bool) -> None:
    """Hold a network on ``meta`` against the headers of its files, and, if they are read, give it their weights.

    Raises:
        DiffgraftError: a weight is missing, left over, of another shape, or holds no floating-point numbers.
    """
    files = files_of_part(folder)
    if not files:
        raise DiffgraftError(
            f"{folder} holds no weights in .safetensors; other files may hold code and are not opened: convert them, "
            "or copy the model's folder again."
        )
    plain = _plain(part)
    wanted = {plain(name): (name, value) for name, value in network.state_dict().items()}
    state: dict[str, Tensor] = {}
    layers = int(getattr(getattr(network, "config", None), "num_hidden_layers", 0))
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (not a mapping)
                    if plain(key) not in wanted:
                        if part.startswith("text") and (key.endswith(_UNREAD) or plain(key).startswith(_UNREAD)):
                            continue
                        if part.startswith("text") and (layer := _layer_beyond(plain(key), layers)) is not None:
                            raise DiffgraftError(
                                f"{file} holds {key}, and {folder}/config.json says num_hidden_layers={layers}, as in "
                                f"a base with clip skip: set it to {layer + 1} or more to use all layers of the file, "
                                "or load and save the folder by diffusers, which leaves the others out."
                            )
                        raise DiffgraftError(
                            f"{file} holds {short(key)}, which is no weight of the {part} that {folder}/config.json "
                            "describes: the two belong to different models."
                        )
                    name, value = wanted[plain(key)]
                    held = opened.get_slice(key)
                    if held.get_shape() != [*value.shape]:
                        raise DiffgraftError(
                            f"{file} holds {key} as {held.get_shape()}; {folder}/config.json makes it "
                            f"{[*value.shape]}: the two belong to different models."
                        )
                    if held.get_dtype() not in FLOAT_DTYPES:
                        raise DiffgraftError(
                            f"{file} holds {key} in {held.get_dtype()}; weights are in float32 or half precision."
                        )
                    state[name] = opened.get_tensor(key).clone() if is_read else value
        except (SafetensorError, OSError) as error:
            raise DiffgraftError(f"{file} is not a readable .safetensors file ({error}); copy it again.") from error
    missing = [name for name, _ in wanted.values() if name not in state]
    if missing:
        raise DiffgraftError(
            f"{folder} lacks {len(missing)} of the {len(wanted)} weights that its config.json describes, such as "
            f"{missing[0]}: copy the model's folder again."
        )
    if is_read:
        kept = _most_common(state)
        network.load_state_dict({name: value.to(kept) for name, value in state.items()}, assign=True)
        _fill_buffers(network)


def _layer_beyond(name: str, layers: int) -> int | None:
    """The number of the layer that a weight belongs to, if a text encoder of so many `layers` does not have it."""
    found = _LAYER.match(name)
    return int(found[1]) if found and int(found[1]) >= layers else None


def _most_common(state: Mapping[str, Tensor]) -> torch.dtype:
    counts: dict[torch.dtype, int] = {}
    for value in state.values():
        counts[value.dtype] = counts.get(value.dtype, 0) + value.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def _fill_buffers(network: nn.Module) -> None:
    """Text encoders count the places of their tokens in buffers that are in no file."""
    for path, module in network.named_modules():
        for name, value in module.named_buffers(recurse=False):
            if not value.is_meta:
                continue
            if name == "position_ids":
                setattr(module, name, torch.arange(value.shape[-1]).expand(value.shape).contiguous())
            elif name == "token_type_ids":
                setattr(module, name, torch.zeros(value.shape, dtype=torch.long))
            else:
                raise DiffgraftError(f"{type(network).__name__} has a buffer {path}.{name} that is in no file.")


def _scheduler(folder: Path, kind: str) -> Any:
    import diffusers

    model: Any = getattr(diffusers, kind)
    path = folder / "scheduler_config.json"
    values = checked(path, read_object(path), SchedulerConfig, model)
    if values.get("trained_betas") is not None and len(values["trained_betas"]) != values.get(
        "num_train_timesteps", 1000
    ):
        raise DiffgraftError(f"{path} gives {len(values['trained_betas'])} trained_betas; each timestep has one.")
    with _said_of(path, f"no {kind} can be built from it"):
        scheduler = model.from_config(values)
        kept = scheduler.alphas_cumprod.double()
        if not (kept.isfinite().all() and (kept >= 0).all() and (kept <= 1).all() and (kept.diff() <= 0).all()):
            raise ValueError("its noise does not grow from step to step")
        return scheduler


def _tokenizer(folder: Path, kind: str) -> Any:
    import transformers

    if not folder.is_dir() or (not any(folder.glob("*.json")) and not any(folder.glob("*.txt"))):
        raise DiffgraftError(f"{folder} is missing, or holds no vocabulary: copy the model's folder again.")
    config = folder / "tokenizer_config.json"
    if config.exists():
        read_object(config)
    with _said_of(folder, f"no {kind} can be made of it"):
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _check_fit(folder: Path, parts: Mapping[str, Any]) -> None:
    """Raises DiffgraftError where the parts of a folder do not belong together."""
    unet, vae = parts["unet"].config, parts["vae"].config
    encoders = {name: part.config for name, part in parts.items() if name.startswith("text_encoder")}
    width = sum(config.hidden_size for config in encoders.values())
    reason = ""
    if unet.out_channels != vae.latent_channels or unet.in_channels < vae.latent_channels:
        reason = (
            f"its UNet takes {unet.in_channels} channels and gives {unet.out_channels}, and its VAE has "
            f"{vae.latent_channels}"
        )
    elif width != unet.cross_attention_dim:
        reason = f"its UNet takes text of width {unet.cross_attention_dim}, and its text encoders give {width}"
    elif ("text_encoder_2" in parts) != (unet.addition_embed_type is not None):
        reason = f"its UNet has addition_embed_type={unet.addition_embed_type!r}"
    for name, config in encoders.items():
        tokenizer = parts[name.replace("text_encoder", "tokenizer")]
        with _said_of(folder / name.replace("text_encoder", "tokenizer"), "the tokenizer is damaged"):
            if type(tokenizer).__name__.startswith("CLIP"):
                check_vocabulary(tokenizer, config.vocab_size, _CLIP)
            first, last = [*tokenizer("").input_ids, None, None][:2]
            ids = tokenizer("a photo").input_ids
            if None in (first, last, tokenizer.pad_token_id) or len(ids) < 3:
                reason = reason or f"the tokenizer of its {name} reads nothing of a text, or has no ends and padding"
            elif max(*ids, tokenizer.pad_token_id, len(tokenizer) - 1) >= config.vocab_size:
                reason = reason or f"the tokenizer of its {name} has more words than the table of the text encoder"
            elif not 3 <= tokenizer.model_max_length <= config.max_position_embeddings:
                reason = reason or (
                    f"the tokenizer of its {name} reads {tokenizer.model_max_length} tokens, and the text encoder has "
                    f"places for {config.max_position_embeddings}"
                )
    if reason:
        raise DiffgraftError(f"{folder} is no base that works: {reason}; copy the model's folder again.")
