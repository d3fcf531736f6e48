"""Compatibility notes: how other programs read a file differently from what the adapter does.

Each statement was verified by running the program's own reader, or by reading its source, on such files: diffusers
0.42, sd-scripts 48d368fa, LyCORIS 4.1.3, stable-diffusion-webui v1.10.1, Forge, InvokeAI and ComfyUI a125cd84.
"""

from collections.abc import Iterator

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.formats.families import family_of
from diffgraft.adapters.formats.original_names import is_for_transformer
from diffgraft.adapters.ops.all_timesteps import excess_share
from diffgraft.bases.layers import is_embedding, is_of_text

_KOHYA_NAMED = ("kohya", "lycoris", "webui")
"""Dialects with kohya's module names"""
_SUPPORTED = ("lora", "loha", "lokr", "full", "oft", "boft")
"""Kinds of deltas that both webui and ComfyUI read"""
_DISPLAY_NAMES = {
    "full": "full differences",
    "ia3": "(IA)³",
    "loha": "LoHa",
    "lokr": "LoKr",
    "glora": "GLoRA",
    "oft": "OFT",
    "boft": "BOFT",
    "oft-inputs": "OFT of inputs",
}
"""Kind of delta → its name in messages"""


def compatibility_notes(adapter: Adapter, dialect: str, name: str = "") -> list[str]:
    """Sentences on how other programs misread `adapter` in a file of `dialect`; the list is often empty.

    Args:
        adapter: contents of the file.
        dialect: a name in `registry.written_dialects()`.
        name: name of the file without its extension, if it is known.
    """
    all_deltas = [delta for deltas in adapter.deltas.values() for delta in deltas]
    if is_for_transformer(adapter):
        return list(_for_transformer(all_deltas)) if dialect in (*_KOHYA_NAMED, "comfyui") else []
    notes: list[str] = []
    if dialect != "diffgraft" and (share := excess_share(adapter)):
        notes.append(
            "Other programs apply all ranks of a T-LoRA at all timesteps, which at the noisiest one are "
            f"{100 * share:.0f} % of its change too much."
        )
    if dialect in _KOHYA_NAMED and all_deltas:
        notes += [*_dora(all_deltas), *_tucker(all_deltas), *_alphas(all_deltas)]
        notes += [*_text_without_output(adapter), *_full(adapter), *_other_kinds(all_deltas), *_misread(adapter)]
    if dialect == "lycoris" and all_deltas and (family := family_of(adapter)) in ("sd2", "sdxl"):
        notes.append(f"webui assumes an adapter of Stable Diffusion 1.x, but the base is {family}: use --to kohya.")
    if dialect in _KOHYA_NAMED and any(delta.kind in ("oft", "boft") for delta in all_deltas):
        notes.append("ComfyUI squares the strength of OFT and BOFT.")
    if dialect in _KOHYA_NAMED and all_deltas and adapter.tokens:
        notes.append(
            "diffusers refuses files with both words and weights; ComfyUI, Forge and InvokeAI load only the weights: "
            f"`--only {next(iter(adapter.tokens))} --to webui` writes a word into its own file."
        )
    if dialect in ("embedding", "kohya", "webui") and not all_deltas:
        notes += _words(adapter, dialect, name)
    return notes


def _for_transformer(deltas: list[Delta]) -> Iterator[str]:
    """Notes on files of a transformer with names of the original layout."""
    if any(isinstance(delta, DoraDelta) for delta in deltas):
        yield "diffusers ignores the norms of its DoRA, and loads the LoRA alone: for diffusers use --to diffusers."
    if others := sorted({_DISPLAY_NAMES.get(delta.kind, delta.kind) for delta in deltas if not delta.is_lora}):
        yield f"diffusers reads only LoRA under these names, and not {' and '.join(others)}."


def _words(adapter: Adapter, dialect: str, name: str) -> Iterator[str]:
    if dialect == "embedding" and any(set(vectors) == {"text_encoder"} for vectors in adapter.tokens.values()):
        yield "InvokeAI reads words of one text encoder only as emb_params: use --to webui for it."
    if name and (others := [word for word in adapter.tokens if word != name]):
        yield f"webui, ComfyUI and InvokeAI call the word by the file's name, {name}, instead of {others[0]}."


def _other_kinds(deltas: list[Delta]) -> Iterator[str]:
    """Notes on deltas that are not LoRA, and on deltas beside a LoRA."""
    kinds = {delta.kind for delta in deltas if set(delta.leaves) != {"diff_b"}}
    loras = {delta.kind for delta in deltas if delta.is_lora}
    if others := sorted(_DISPLAY_NAMES.get(kind, kind) for kind in kinds - loras):
        yield f"diffusers reads only LoRA under these names, and not {' and '.join(others)}."
    if kinds - {"full"} and any(set(delta.leaves) == {"diff_b"} for delta in deltas):
        yield "webui and diffusers ignore differences of biases beside other factors."


def _misread(adapter: Adapter) -> Iterator[str]:
    """Notes for modules that `webui_problem` reports, one per reason, except those with a note of their own."""
    paths_by_reason: dict[str, list[str]] = {}
    for path, deltas in adapter.deltas.items():
        for delta in deltas:
            has_note = isinstance(delta, DoraDelta) or (delta.kind == "full" and is_unread(path))
            if not has_note and (reason := webui_problem(path, delta)):
                paths_by_reason.setdefault(reason, []).append(path)
    for reason, paths in paths_by_reason.items():
        yield f"{len(paths)} modules (e.g. {paths[0]}) hold {reason}."
    if layers := incomplete_attention(adapter):
        yield f"webui ignores {layers}."


def webui_problem(path: str, delta: Delta) -> str | None:
    """Why webui or ComfyUI misreads a delta under kohya's names, as a noun phrase; None if both read it correctly."""
    name = _DISPLAY_NAMES.get(delta.kind, delta.kind)
    if delta.kind not in _SUPPORTED:
        return f"{name}, which webui or ComfyUI does not read"
    if isinstance(delta, DoraDelta) and not delta.has_input_norms:
        return "a DoRA with norms of the outputs, which webui silently takes for norms of the inputs"
    if delta.kind == "full" and is_unread(path):
        return "a full difference of a norm or an embedding in a text encoder, which webui and ComfyUI ignore"
    if "lokr_t2" in delta.leaves:
        return "a LoKr in its Tucker variant, on which ComfyUI fails"
    if delta.kind in ("oft", "boft") and (delta.alpha or "rescale" in delta.leaves):
        return f"{name} with a bound or a rescaling, which ComfyUI ignores"
    return None


def incomplete_attention(adapter: Adapter) -> str | None:
    """Name an attention of OpenCLIP that webui ignores, as it lacks some of its four layers; None if there is none."""
    layers: dict[str, set[str]] = {}
    for path in adapter.deltas:
        block, attention, name = path.partition(".self_attn.")
        if attention:
            layers.setdefault(block, set()).add(name)
    partial = {block: names for block, names in layers.items() if len(names) < 4}
    open_clip = "text_encoder." if partial and family_of(adapter) == "sd2" else "text_encoder_2."
    ignored = {block: names for block, names in partial.items() if block.startswith(open_clip)}
    if not ignored:
        return None
    block, names = next(iter(ignored.items()))
    return f"{', '.join(sorted(names))} of {block}.self_attn, as it needs all four layers of an OpenCLIP attention"


def _dora(deltas: list[Delta]) -> Iterator[str]:
    has_input_norms = {delta.has_input_norms for delta in deltas if isinstance(delta, DoraDelta)}
    if has_input_norms:
        yield "It holds DoRA, which LyCORIS reads; sd-scripts and diffusers ignore its norms."
    if False in has_input_norms:
        yield (
            "webui and InvokeAI take its norms of outputs for norms of inputs, which is far from what was trained, and "
            "ComfyUI divides by other norms: for diffusers use --to diffusers, for the others train without DoRA."
        )
    if has_input_norms:
        yield "Programs differ in what DoRA does at strengths other than 1."


def _tucker(deltas: list[Delta]) -> Iterator[str]:
    if any("lora_mid" in delta.leaves for delta in deltas):
        yield "sd-scripts' own loader and diffusers do not read lora_mid, the core of a Tucker decomposition."


def _alphas(deltas: list[Delta]) -> Iterator[str]:
    if len({delta.alpha for delta in deltas if delta.is_lora}) > 1:
        yield (
            "Its modules have different alphas, but diffusers uses the most frequent one for all: for diffusers use "
            "--to diffusers."
        )


def _text_without_output(adapter: Adapter) -> Iterator[str]:
    loras = [path for path, deltas in adapter.deltas.items() if is_of_text(path) and deltas[0].is_lora]
    if loras and not any(path.endswith("self_attn.out_proj") for path in loras):
        yield (
            "diffusers reads LoRAs of text encoders under these names only if self_attn.out_proj is among them: for "
            "diffusers use --to diffusers."
        )


def _full(adapter: Adapter) -> Iterator[str]:
    unread = [path for path, deltas in adapter.deltas.items() if deltas[0].kind == "full" and is_unread(path)]
    if unread:
        yield (
            f"{len(unread)} modules are norms or embeddings of text encoders (e.g. {unread[0]}): webui, Forge and "
            "ComfyUI ignore them."
        )
    if any(is_embedding(path) for path in unread):
        yield "LyCORIS fails on embeddings of text encoders."


_READ_TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "mlp.fc1", "mlp.fc2")
"""Endings of the text encoder layers that ComfyUI and webui read under kohya's names"""


def is_unread(path: str) -> bool:
    """Whether the module is one of a text encoder that webui, Forge and ComfyUI ignore: a norm or an embedding."""
    return is_of_text(path) and not path.endswith(_READ_TEXT_LAYERS)
