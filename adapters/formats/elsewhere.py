"""What other programs make of a file where it is not what the adapter does: one sentence for each such thing.

Every statement was seen by running the program's own reader, or read in its source, on files of the kind: diffusers
0.42, sd-scripts 48d368fa, LyCORIS 4.1.3, stable-diffusion-webui v1.10.1, Forge, InvokeAI and ComfyUI a125cd84.
"""

from collections.abc import Iterator

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.formats.families import family_of
from diffgraft.bases.layers import is_embedding, is_of_text

_KOHYA = ("kohya", "lycoris", "webui")
"""Dialects with kohya's names of modules"""
_READ = ("lora", "loha", "lokr", "full", "oft", "boft")
"""Kinds that webui and ComfyUI both read"""
_SPELT = {
    "full": "full differences",
    "ia3": "(IA)³",
    "loha": "LoHa",
    "lokr": "LoKr",
    "glora": "GLoRA",
    "oft": "OFT",
    "boft": "BOFT",
    "oft-inputs": "OFT of inputs",
}
"""Kind → what people call it"""


def remarks(adapter: Adapter, dialect: str, name: str = "") -> list[str]:
    """Sentences on `adapter` in a file of `dialect`, a name in `registry.written_dialects()`; often none.

    `name` is that of the file, without its ending.
    """
    deltas = [delta for found in adapter.deltas.values() for delta in found]
    found: list[str] = []
    if dialect in _KOHYA and deltas:
        found += [*_dora(deltas), *_tucker(deltas), *_alphas(deltas), *_text_without_output(adapter), *_full(adapter)]
        found += [*_other_kinds(deltas), *_misread(adapter)]
    if dialect == "lycoris" and deltas and (family := family_of(adapter)) in ("sd2", "sdxl"):
        found.append(
            f"webui takes it for an adapter of Stable Diffusion 1.x, and its base is {family}: use --to kohya."
        )
    if dialect in _KOHYA and any(delta.kind in ("oft", "boft") for delta in deltas):
        found.append("ComfyUI squares the strength of OFT and BOFT.")
    if dialect in _KOHYA and deltas and adapter.tokens:
        found.append(
            "diffusers refuses a file that holds words beside weights, and ComfyUI, Forge and InvokeAI take the "
            f"weights alone: `--only {next(iter(adapter.tokens))} --to webui` writes a word into a file of its own."
        )
    if dialect in ("embedding", "kohya", "webui") and not deltas:
        found += _words(adapter, dialect, name)
    return found


def _words(adapter: Adapter, dialect: str, name: str) -> Iterator[str]:
    if dialect == "embedding" and any(set(vectors) == {"text_encoder"} for vectors in adapter.tokens.values()):
        yield "InvokeAI reads words of one text encoder as emb_params alone: for it use --to webui."
    if name and (others := [word for word in adapter.tokens if word != name]):
        yield f"webui, ComfyUI and InvokeAI call the word by the file's name, {name}, and not {others[0]}."


def _other_kinds(deltas: list[Delta]) -> Iterator[str]:
    """Of what is no LoRA, and of what stands beside one."""
    kinds = {delta.kind for delta in deltas if set(delta.leaves) != {"diff_b"}}
    loras = {delta.kind for delta in deltas if delta.is_lora}
    if others := sorted(_SPELT.get(kind, kind) for kind in kinds - loras):
        yield f"diffusers reads LoRA alone under these names, and not {' and '.join(others)}."
    if kinds - {"full"} and any(set(delta.leaves) == {"diff_b"} for delta in deltas):
        yield "webui leaves out differences of biases beside other factors, and so does diffusers."


def _misread(adapter: Adapter) -> Iterator[str]:
    """What `trouble` finds, once for each reason, without what has a sentence of its own."""
    found: dict[str, list[str]] = {}
    for path, deltas in adapter.deltas.items():
        for delta in deltas:
            is_told = isinstance(delta, DoraDelta) or (delta.kind == "full" and is_unread(path))
            if not is_told and (reason := trouble(path, delta)):
                found.setdefault(reason, []).append(path)
    for reason, paths in found.items():
        yield f"{len(paths)} of its modules, such as {paths[0]}, hold {reason}."
    if torn := torn_attention(adapter):
        yield f"webui leaves out {torn}."


def trouble(path: str, delta: Delta) -> str | None:
    """What a delta under kohya's names is that webui or ComfyUI takes for something else; None where both read it."""
    if delta.kind not in _READ:
        return f"{_SPELT.get(delta.kind, delta.kind)}, which webui or ComfyUI does not read"
    if isinstance(delta, DoraDelta) and not delta.of_inputs:
        return "a DoRA by outputs, which webui takes for one by inputs, without saying so"
    if delta.kind == "full" and is_unread(path):
        return "a full difference of a norm or an embedding in a text encoder, which webui and ComfyUI leave out"
    if "lokr_t2" in delta.leaves:
        return "a LoKr in its Tucker variant, with which ComfyUI fails"
    if delta.kind in ("oft", "boft") and (delta.alpha or "rescale" in delta.leaves):
        return f"{_SPELT[delta.kind]} with a bound or a rescaling, which ComfyUI leaves away"
    return None


def torn_attention(adapter: Adapter) -> str | None:
    """Layers that webui leaves out: of OpenCLIP's attention it changes all four together, or none."""
    layers: dict[str, set[str]] = {}
    for path in adapter.deltas:
        start, attention, name = path.partition(".self_attn.")
        if attention:
            layers.setdefault(start, set()).add(name)
    some = {start: names for start, names in layers.items() if len(names) < 4}
    open_clip = "text_encoder." if some and family_of(adapter) == "sd2" else "text_encoder_2."
    torn = {start: names for start, names in some.items() if start.startswith(open_clip)}
    if not torn:
        return None
    start, names = next(iter(torn.items()))
    return f"{', '.join(sorted(names))} of {start}.self_attn, as it needs all four layers of an attention of OpenCLIP"


def _dora(deltas: list[Delta]) -> Iterator[str]:
    of_inputs = {delta.of_inputs for delta in deltas if isinstance(delta, DoraDelta)}
    if of_inputs:
        yield "It holds DoRA, which LyCORIS reads; sd-scripts and diffusers leave out its norms."
    if False in of_inputs:
        yield (
            "webui and InvokeAI take its norms of outputs for norms of inputs, which is far from what was trained, and "
            "ComfyUI divides by other norms: for diffusers use --to diffusers, for the others train without DoRA."
        )
    if of_inputs:
        yield "At strengths other than 1 programs differ in what DoRA does."


def _tucker(deltas: list[Delta]) -> Iterator[str]:
    if any("lora_mid" in delta.leaves for delta in deltas):
        yield "sd-scripts' own loader and diffusers do not read lora_mid, the middle factor of Tucker's decomposition."


def _alphas(deltas: list[Delta]) -> Iterator[str]:
    if len({delta.alpha for delta in deltas if delta.is_lora}) > 1:
        yield (
            "Its modules have different alphas, of which diffusers takes the commonest for all: for diffusers use "
            "--to diffusers."
        )


def _text_without_output(adapter: Adapter) -> Iterator[str]:
    loras = [path for path, found in adapter.deltas.items() if is_of_text(path) and found[0].is_lora]
    if loras and not any(path.endswith("self_attn.out_proj") for path in loras):
        yield (
            "diffusers reads LoRAs of text encoders under these names only where self_attn.out_proj is among them: for "
            "diffusers use --to diffusers."
        )


def _full(adapter: Adapter) -> Iterator[str]:
    others = [path for path, found in adapter.deltas.items() if found[0].kind == "full" and is_unread(path)]
    if others:
        yield (
            f"{len(others)} of its modules are norms and embeddings of text encoders, such as {others[0]}: webui, "
            "Forge and ComfyUI leave those out."
        )
    if any(is_embedding(path) for path in others):
        yield "LyCORIS stops at embeddings of text encoders."


_READ_OF_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "mlp.fc1", "mlp.fc2")
"""Endings of the layers of text encoders that ComfyUI and webui know by kohya's names"""


def is_unread(path: str) -> bool:
    """Whether it is a module of a text encoder that webui, Forge and ComfyUI do not know: a norm or an embedding."""
    return is_of_text(path) and not path.endswith(_READ_OF_TEXT)
