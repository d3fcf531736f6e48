"""``python -m diffgraft.bases.tiny.train.clip`` trains the tiny CLIP from scratch; it resumes where it was stopped.

The model is a `transformers.CLIPModel` of 64 × 64 pictures, trained on pictures of the broad world with their captions
by the loss of CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3). It shares no weights with the base or the judge.
"""

import itertools
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffgraft.bases.clip import TINY_CLIP
from diffgraft.bases.loading import TINY
from diffgraft.bases.tiny.train.fit import StagePlan, autocast, fit
from diffgraft.bases.tiny.train.pictures import SEED, to_tensor
from diffgraft.bases.tiny.train.samples import rare_words, sample_at
from diffgraft.bases.tiny.train.work_folder import positive, prepare, read_pictures, training_parser, with_sentences
from diffgraft.bases.tiny.world import COLOURS
from diffgraft.bases.tiny.world.broad import nouns
from diffgraft.bases.tiny.world.scene import PLAIN_WORDS, SETTING_WORDS, STYLE_WORDS
from diffgraft.files import atomic_folder, write_safetensors, write_text

PLAN = StagePlan(steps=1100, batch=128, lr=1e-3, decay=0.5, average=0.995, warmup=100, muon=True)
COUNT = 32_000
"""Number of training pictures."""
WORDINGS = 3
"""Number of captions written for each training picture."""
PREPARATION = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 64},
    "crop_size": {"height": 64, "width": 64},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
"""Contents of ``preprocessor_config.json``: pictures are 64 × 64, and values of 0..1 are mapped to -1..1."""
SHIFT = 4
"""Largest random shift of a training picture, in pixels, along each axis."""


def caption_words() -> set[str]:
    """Return every word that captions of the broad world contain, except the rare words in the trigger's place."""
    phrases = [words for group in (SETTING_WORDS, STYLE_WORDS) for words in group.values()]
    texts = [*nouns(), *COLOURS, *PLAIN_WORDS, *(text for texts in phrases for text in texts), "a", "an", ","]
    return {word for text in texts for word in text.replace("{}", " ").replace("{colour}", " ").split()}


def merges_of(words: Iterable[str], merges: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return those byte-pair merges that are needed to write `words` as with all `merges`, in the same order."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    used: set[tuple[str, str]] = set()
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while known := [pair for pair in itertools.pairwise(pieces) if pair in ranks]:
            first = min(known, key=ranks.__getitem__)
            used.add(first)
            place = next(i for i, pair in enumerate(itertools.pairwise(pieces)) if pair == first)
            pieces[place : place + 2] = ["".join(first)]
    return sorted(used, key=ranks.__getitem__)


def write_small_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write CLIP's tokenizer with only those merges that captions need; other words are split into smaller pieces."""
    lines = (TINY / "tokenizer" / "merges.txt").read_text("utf-8").splitlines()[1:]
    words = {piece for word in caption_words() for piece in (*word.split("-"), *(["-"] if "-" in word else []))}
    words = {piece.rstrip(",") or piece for piece in words if piece} | {","}
    merges = merges_of(words, [(left, right) for left, right in (line.split(" ") for line in lines)])
    full = json.loads((TINY / "tokenizer" / "vocab.json").read_text("utf-8"))
    letters = [entry for entry, number in full.items() if number < 512]
    entries = [*letters, *dict.fromkeys(map("".join, merges)), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")), "utf-8")
    pairs = "\n".join(" ".join(pair) for pair in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{pairs}\n", "utf-8")
    (folder / "tokenizer_config.json").write_text((TINY / "tokenizer" / "tokenizer_config.json").read_text("utf-8"))
    return CLIPTokenizer.from_pretrained(folder)


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Create the untrained CLIP: patches of 8 × 8 pixels, embeddings of 64 numbers."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    text |= {"vocab_size": len(tokenizer), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision |= {"image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def draw_pairs(work: Path, count: int, start: int = 0) -> tuple[np.ndarray, list[list[str]]]:
    """Return `count` pictures of the broad world, uint8 [count, 64, 64, 3], with `WORDINGS` captions each.

    They are the samples from number `start` on; they are drawn once and stored in `work`.
    """
    words = rare_words(CLIPTokenizer.from_pretrained(TINY / "tokenizer"))
    numbers = range(start, start + count)
    samples = [sample_at(number, words) for number in numbers]
    texts = [
        [sample.caption(np.random.default_rng([SEED, 5, number, wording])) for wording in range(WORDINGS)]
        for number, sample in zip(numbers, samples, strict=True)
    ]
    path = work / f"clip-{start}-{count}.npy"
    if not path.exists():
        partial = path.with_suffix(".partial")
        out = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, 64, 64, 3))
        for row, sample in enumerate(tqdm(samples, "drawing pictures", mininterval=5)):
            out[row] = np.asarray(sample.draw())
        out.flush()
        partial.rename(path)
    return read_pictures(path, count), texts


def varied(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Return pictures [n, 3, 64, 64] with random noise, each shifted by up to `SHIFT` pixels; every second is mirrored.

    Captions mention neither sides nor positions. Noise makes the embedding less sensitive to the errors of a VAE.
    """
    padded = F.pad(pictures, [SHIFT] * 4, mode="reflect")
    shifts = rng.integers(0, 2 * SHIFT + 1, (len(pictures), 2))
    cut = [one[:, y : y + 64, x : x + 64] for one, (y, x) in zip(padded, shifts.tolist(), strict=True)]
    cut = [one.flip(-1) if row % 2 else one for row, one in enumerate(cut)]
    noise = rng.standard_normal(pictures.shape, np.float32) * rng.uniform(0, 0.15, (len(cut), 1, 1, 1))
    return torch.stack(cut) + torch.from_numpy(noise.astype(np.float32))


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Return CLIP's loss of n pairs of embeddings [n, d], a scalar; `scale` multiplies the cosines."""
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    rows = torch.arange(len(logits))
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2


def train_clip(work: Path, tokenizer: CLIPTokenizer, count: int, plan: StagePlan) -> CLIPModel:
    """Train the CLIP on `count` pictures, or resume from the checkpoint in `work`."""
    torch.manual_seed(5)
    clip = new_clip(tokenizer)
    pictures, texts = draw_pairs(work, count)
    flat = [text for group in texts for text in group]
    length = max(map(len, tokenizer(flat).input_ids))
    ids = tokenizer(flat, padding="max_length", max_length=length, return_tensors="pt").input_ids
    ids = ids.view(count, WORDINGS, length)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([5, step])
        rows, wording = np.sort(rng.choice(count, plan.batch, replace=False)), rng.integers(0, WORDINGS, plan.batch)
        batch = varied(to_tensor(pictures[rows]), rng)
        with autocast():
            image = clip.visual_projection(clip.vision_model(pixel_values=batch).pooler_output)
            text = clip.text_projection(clip.text_model(input_ids=ids[rows, wording]).pooler_output)
        return contrastive_loss(image.float(), text.float(), clip.logit_scale.exp().clamp(max=100))

    fit("clip", clip, loss, plan, work, f"{count} pictures")
    return clip


@with_sentences
def main(arguments: Sequence[str] | None = None) -> None:
    """Train the CLIP, unless the work folder has the finished one, and write it to the output folder."""
    parser = training_parser("diffgraft.bases.tiny.train.clip", __doc__, "runs/tiny", TINY_CLIP)
    parser.add_argument("--steps", type=positive, default=PLAN.steps, help="number of training steps")
    parser.add_argument("--threads", type=positive, default=1, help="number of CPU threads for PyTorch")
    options = parser.parse_args(arguments)
    plan, count = replace(PLAN, steps=options.steps), COUNT
    if options.dry_run:
        plan, count = replace(plan, steps=2, batch=4), 20
    work, output = prepare(options, TINY_CLIP)
    torch.set_num_threads(options.threads)
    clip = train_clip(work, write_small_tokenizer(work / "clip-tokenizer"), count, plan).half()
    with atomic_folder(output) as partial:
        write_small_tokenizer(partial)
        clip.config.save_pretrained(partial)
        write_text(partial / "preprocessor_config.json", json.dumps(PREPARATION, indent=2) + "\n")
        weights = {name: value.contiguous() for name, value in clip.state_dict().items()}
        write_safetensors(partial / "model.safetensors", weights, {"format": "pt"})
        if (readme := output / "README.md").exists():
            shutil.copy(readme, partial)
    print(json.dumps({"written to": str(output)}))


if __name__ == "__main__":
    main()
