"""Trains with the plugins of the page on extending, which are installed as an outside package in this process.

Run as ``python installed.py FOLDER PICTURES``; what it found is printed as JSON.
"""

import json
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

import diffgraft as dg
from diffgraft.progress import reporting, silent
from tests.recipes import SUBJECT

SHORT: dict[str, Any] = {"subject": "dog", "batch": 2, "seed": 3, "previews": False, "sample_every": 0}


def train(folder: Path, pictures: Path, **settings: Any) -> dg.Run:
    """A short run on two processor threads at most."""
    return dg.train(SUBJECT, images=pictures, output=folder, **{**SHORT, "prior": {"weight": 0}, **settings})


def method(folder: Path, pictures: Path) -> dict[str, Any]:
    """Train, save, load and merge the page's method, by outputs and by inputs."""
    base, found = dg.load_base("tiny"), {}
    for by in ("outputs", "inputs"):
        run = train(folder / by, pictures, base=base, method="rows", options={"by": by}, steps=3, lr=1e-2)
        adapter = dg.load_adapter(run.adapter_file)
        ((path, (delta,)), *_) = adapter.deltas.items()
        (leaf,) = delta.leaves.values()
        layer = base.unet.get_submodule(path.removeprefix("unet."))
        bare = layer.weight.detach().clone()
        column = leaf[:, None] if by == "outputs" else leaf[None, :]
        with dg.graft(base, {run: 0.5}):
            merged = torch.allclose(layer.weight, bare + 0.5 * column, atol=1e-6)
        found[by] = {
            "kinds": sorted({delta.kind for deltas in adapter.deltas.values() for delta in deltas}),
            "moved": bool(leaf.any()),
            "merged": merged,
            "restored": torch.equal(layer.weight, bare),
        }
    with dg.graft(base, {adapter: 2.0, lora(folder, pictures): 1.0}):
        stacked = layer.weight - bare
    wanted = 2 * column + lora(folder, pictures).adapter.deltas[path][0].delta(bare.shape)
    return {**found, "stacks": torch.allclose(stacked, wanted, rtol=1e-3, atol=1e-6)}


@cache
def lora(folder: Path, pictures: Path) -> dg.Run:
    """A LoRA of two steps."""
    return train(folder / "lora", pictures, steps=2)


def objective(folder: Path, pictures: Path) -> dict[str, Any]:
    """Train by the page's objective; its terms stand in the record, and drift from zero."""
    run = train(folder / "close", pictures, loss={"objective": "close"}, steps=3)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    sums = [abs(line["loss"] - line["instance"] - 0.1 * line["drift"]) < 1e-5 for line in lines]
    return {"steps": len(lines), "sums": all(sums), "drift": [line["drift"] for line in lines]}


def dialect(folder: Path, pictures: Path) -> dict[str, Any]:
    """Convert an adapter into the page's dialect; what is read of it is the same to the bit."""
    run = lora(folder, pictures)
    file = folder / "plain.safetensors"
    dg.convert(run.adapter_file, file, "plain")
    before, after = dg.load_adapter(run.adapter_file), dg.load_adapter(file)
    return {
        "same": before.modules == after.modules
        and all(
            torch.equal(leaf, after.deltas[path][0].leaves[name]) and delta.alpha == after.deltas[path][0].alpha
            for path, (delta,) in before.deltas.items()
            for name, leaf in delta.leaves.items()
        ),
        "method": after.method,
    }


def family(folder: Path, pictures: Path) -> dict[str, Any]:
    """Train a LoRA on a random base of the page's family; the file has its prefix, and merges."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    from diffgraft.bases.registry import families

    torch.manual_seed(0)
    tiny = dg.load_base("tiny")
    width = tiny.text_encoder.config.hidden_size
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=tiny.latents.channels,
        out_channels=tiny.latents.channels,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=width,
        caption_projection_dim=24,
        pooled_projection_dim=width,
        pos_embed_max_size=16,
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    base = dg.Base(
        name="dots",
        family=families()["dots"],
        vae=tiny.vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
        text_encoder=tiny.text_encoder,
        tokenizer=tiny.tokenizer,
    )
    run = train(folder / "dots", pictures, base=base, steps=3, format="diffgraft")
    adapter = dg.load_adapter(run.adapter_file)
    before = {name: value.detach().clone() for name, value in transformer.named_parameters()}
    with dg.graft(base, {run: 1.0}):
        changed = [name for name, value in transformer.named_parameters() if not torch.equal(value, before[name])]
    refused = []
    for name, settings in (("snr", {"loss": {"snr_gamma": 5}}), ("sliced", {"attention": "sliced"})):
        try:
            train(folder / name, pictures, base=base, steps=3, **settings)
        except dg.DiffgraftError as error:
            refused.append(str(error))
    return {
        "prefixes": sorted({path.partition(".")[0] for path in adapter.modules}),
        "modules": len(adapter.modules),
        "changed": len(changed),
        "family": adapter.metadata["base"]["family"],
        "refused": refused,
    }


def measure(folder: Path, pictures: Path) -> dict[str, Any]:  # noqa: ARG001
    """Score white pictures by the page's measure, with grey ones of the base, black and white references."""
    from PIL import Image

    from diffgraft.evaluation.encoders import Encoders
    from diffgraft.evaluation.evidence import Drawings, Evidence, Prompts, Reference, figure
    from diffgraft.evaluation.measure import get_measure

    white, grey = ([[Image.new("RGB", (4, 4), colour)] * 3] for colour in ("white", (191, 191, 191)))
    references = [Reference(Image.new("RGB", (4, 4), colour)) for colour in ("white", "black")]
    bare = Drawings(grey, grey)
    prompts = Prompts(("a sks dog",), ("a dog",), ("a dog",))
    found = get_measure("brightness")
    own, other = (
        found.estimator(Evidence(drawn, bare, prompts, references, Encoders({})))
        for drawn in (Drawings(white, white), bare)
    )
    score = figure(own, other, 3)
    return {
        "title": found.title,
        "value": score.value,
        "gain": round(score.gain, 2),
        "error": score.error,
        "bare": round(other(range(3)), 2),
    }


def hook(folder: Path, pictures: Path) -> dict[str, Any]:
    """Train with the page's hook in the place of the plot."""
    from norms import NormHook  # type: ignore[import-not-found]

    from diffgraft.trainers.run import train_adapter

    train_adapter.PlotHook = lambda file, _: NormHook(file.with_name("norms.csv"), 2)  # type: ignore[assignment,misc]
    run = train(folder / "norms", pictures, steps=5)
    rows = [line.split(",") for line in (run.folder / "norms.csv").read_text("utf-8").splitlines()]
    return {"steps": [int(step) for step, _ in rows], "positive": all(float(norm) > 0 for _, norm in rows)}


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword", DeprecationWarning)
    place, images, *names = (Path(word) for word in sys.argv[1:])
    parts = {
        "method": method,
        "objective": objective,
        "dialect": dialect,
        "family": family,
        "measure": measure,
        "hook": hook,
    }
    with reporting(silent):
        print(json.dumps({str(name): parts[str(name)](place, images) for name in names}))
