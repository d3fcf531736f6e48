"""What other programs make of a file where it is not what the adapter does: one sentence for each such thing.

Every statement was seen by running the program's own reader, or read in its source, on files of the kind: diffusers
0.42, sd-scripts 48d368fa, LyCORIS 4.1.3, stable-diffusion-webui v1.10.1, Forge, InvokeAI and ComfyUI a125cd84.
"""

from collections.abc import Iterator

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.method import is_embedding, is_of_text

_KOHYA = ("kohya", "lycoris", "webui")
"""Dialects with kohya's names of modules"""


def remarks(adapter: Adapter, dialect: str) -> list[str]:
    """Sentences on `adapter` in a file of `dialect`, a name of `diffgraft.adapters.formats.DIALECTS`; often none."""
    deltas = [delta for found in adapter.deltas.values() for delta in found]
    found: list[str] = []
    if dialect in _KOHYA and deltas:
        found += [*_dora(deltas), *_tucker(deltas), *_alphas(deltas), *_text_without_output(adapter), *_full(adapter)]
    if dialect == "diffusers" and deltas:
        found.append("webui, ComfyUI, Forge and sd-scripts do not read diffusers' layout: for those use --to kohya.")
    if dialect in _KOHYA and any(delta.kind in ("oft", "boft") for delta in deltas):
        found.append("ComfyUI squares the strength of OFT and BOFT.")
    if deltas and adapter.tokens:
        found.append(
            "diffusers refuses a file that holds words beside weights, and ComfyUI, Forge and InvokeAI take the "
            f"weights alone: `--only {next(iter(adapter.tokens))} --to webui` writes a word into a file of its own."
        )
    if dialect == "embedding" and any(set(vectors) == {"text_encoder"} for vectors in adapter.tokens.values()):
        found.append("InvokeAI reads words of one text encoder as emb_params alone: for it use --to webui.")
    return found


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
    if len({delta.alpha for delta in deltas if delta.kind == "lora"}) > 1:
        yield (
            "Its modules have different alphas, of which diffusers takes the commonest for all: for diffusers use "
            "--to diffusers."
        )


def _text_without_output(adapter: Adapter) -> Iterator[str]:
    loras = [path for path, found in adapter.deltas.items() if is_of_text(path) and found[0].kind == "lora"]
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
