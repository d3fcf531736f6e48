"""Figures of the CLIP of `tiny`, on pictures that no stage is trained on: ``python -m benchmarks.tiny_clip``.

Retrieval finds the caption of a picture of the broad world among 64. Zero-shot classification says which thing, setting
and style a picture of the tiny world shows, by the cosine to a phrase for each class; settings and styles have the mean
of phrases on all things. Pictures are measured as they are drawn, and after they went through the VAE of `tiny`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from benchmarks.tiny_base import through_vae
from diffgraft.bases.clip import Clip, load_clip
from diffgraft.bases.loading import TINY, load_base
from diffgraft.bases.tiny.judge import LABELS
from diffgraft.bases.tiny.train.pictures import UNSEEN, scene_at
from diffgraft.bases.tiny.train.samples import rare_words, sample_at
from diffgraft.bases.tiny.world import THINGS, draw
from diffgraft.bases.tiny.world.scene import SETTING_WORDS
from diffgraft.pixels import to_tensor

AMONG = 64
"""Number of captions that the right one is found among"""
STYLE_PHRASES = {
    "flat": "a flat drawing of a {}",
    "line": "a line drawing of a {}",
    "pixel": "pixel art of a {}",
    "watercolour": "a watercolour painting of a {}",
}


def phrases(kind: str) -> dict[str, list[str]]:
    """Return class → phrases that describe it, for the things, settings or styles of the tiny world."""
    if kind == "thing":
        return {thing: [f"a {thing}", f"a picture of a {thing}"] for thing in THINGS}
    if kind == "style":
        return {style: [phrase.format(thing) for thing in THINGS] for style, phrase in STYLE_PHRASES.items()}
    return {
        setting: [f"a {thing} {words[0].format(colour='white')}" for thing in THINGS]
        for setting, words in SETTING_WORDS.items()
    }


@torch.no_grad()
def zero_shot(clip: Clip, kind: str) -> Tensor:
    """Return the mean embedding of the phrases of each class of a kind, unit vectors [classes, width]."""
    classes = phrases(kind)
    return F.normalize(torch.stack([clip.text_features(classes[name]).mean(0) for name in LABELS[kind]]), dim=-1)


@torch.no_grad()
def features(clip: Clip, pictures: Tensor) -> Tensor:
    """Return the embeddings [n, width] of pictures [n, 3, h, w] with values from -1 to 1."""
    return torch.cat([clip.image_features(part / 2 + 0.5) for part in pictures.split(128)])


def retrieval(image: Tensor, text: Tensor) -> dict[str, float]:
    """Return the share of pictures whose caption is nearest among `AMONG`, and of captions whose picture is."""
    shares = []
    for part, words in zip(image.split(AMONG), text.split(AMONG), strict=True):
        cosines, rows = part @ words.T, torch.arange(len(part))
        shares.append([float((cosines.argmax(axis) == rows).float().mean()) for axis in (1, 0)])
    caption, picture = np.mean(shares, 0)
    return {"caption of a picture": float(caption), "picture of a caption": float(picture)}


def measure(count: int = 1024, source: str | Path = "tiny") -> dict[str, Any]:
    """Return all figures on `count` pictures of either world, a multiple of `AMONG`."""
    clip, vae = load_clip(source), load_base("tiny").vae
    words = rare_words(CLIPTokenizer.from_pretrained(TINY / "tokenizer"))
    samples = [sample_at(UNSEEN + number, words) for number in range(count)]
    texts = [sample.caption(np.random.default_rng([1, number])) for number, sample in enumerate(samples)]
    scenes = [scene_at(UNSEEN + number) for number in range(count)]
    broad, own = to_tensor([sample.draw() for sample in samples]), to_tensor([draw(scene)[0] for scene in scenes])
    with torch.no_grad():
        captions = clip.text_features(texts)
    report: dict[str, Any] = {"n": count}
    for name, change in (("as drawn", lambda x: x), ("through the VAE", lambda x: through_vae(vae, x))):
        report[name] = {"retrieval": retrieval(features(clip, change(broad)), captions)}
        embedded = features(clip, change(own))
        for kind in ("thing", "setting", "style"):
            right = torch.tensor([LABELS[kind].index(getattr(scene, kind)) for scene in scenes])
            found = (embedded @ zero_shot(clip, kind).T).argmax(1)
            report[name][kind] = float((found == right).float().mean())
    return report


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1024)
    parser.add_argument("--clip", default="tiny")
    options = parser.parse_args()
    print(json.dumps(measure(options.count, options.clip), indent=1))


if __name__ == "__main__":
    main()
