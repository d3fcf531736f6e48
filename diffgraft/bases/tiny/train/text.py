"""Stage 3: the text encoder, taught to know from a caption what the picture shows.

Two read-outs, at the end token and at a padding token behind it, must name thing, colour, setting, style and
backdrop; where a caption holds a rare word, the same states must point to that word's own embedding, so that a word
nobody has taught the base (a trigger) still reaches the UNet.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffgraft.bases.tiny.judge import LABELS, labels_of
from diffgraft.bases.tiny.train.fit import Plan, fingerprint, fit
from diffgraft.bases.tiny.train.pictures import SEED, scene_at
from diffgraft.bases.tiny.world import COLOURS, caption

WIDTH = 64
WORDINGS = 2
"""Captions kept for each picture."""
_BACKDROPS = ("none", *COLOURS)


def new_text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=WIDTH,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    encoder = CLIPTextModel(config)
    embeddings = {name: p for name, p in encoder.named_parameters() if "embedding.weight" in name}
    for name, table in embeddings.items():
        nn.init.normal_(table, std=0.2 if "token" in name else 0.05)  # words nobody teaches must still be heard
    return encoder


def rare_words(tokenizer: CLIPTokenizer) -> list[str]:
    """A seventh of the vocabulary's lower-case words of three to six letters, to stand where a trigger would."""
    entries = [entry[:-4] for entry in tokenizer.get_vocab() if entry.endswith("</w>")]
    return sorted(word for word in entries if word.isascii() and word.isalpha() and 3 <= len(word) <= 6)[::7]


def captions(work: Path, tokenizer: CLIPTokenizer, count: int) -> tuple[Tensor, Tensor]:
    """Token ids [count, wordings, 77] and labels [count, wordings, 6]: thing, setting, style, colour, backdrop, rare.

    A label the caption does not mention is -100; `rare` is the token of the rare word.
    """
    path = work / f"captions-{count}.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        return kept["ids"], kept["labels"]
    words = rare_words(tokenizer)
    texts, labels = [], []
    for index in tqdm(range(count), "writing captions"):
        scene = scene_at(index)
        for wording in range(WORDINGS):
            rng = np.random.default_rng([SEED, 2, index, wording])
            rare = str(rng.choice(words)) if rng.random() < 0.1 else ""
            text = caption(scene, rng, rare)
            backdrop = _BACKDROPS.index(scene.backdrop) if f"{scene.backdrop} background" in text else 0
            row = labels_of(scene)
            if not any(word in text for word in ("background", "behind", *_PLACES)):
                row[1] = -100
            texts.append(text)
            token = tokenizer.convert_tokens_to_ids(rare + "</w>") if rare else -100
            labels.append([*row, backdrop, token])
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    out = ids.view(count, WORDINGS, -1), torch.tensor(labels).view(count, WORDINGS, -1)
    torch.save({"ids": out[0], "labels": out[1]}, path)
    return out


_PLACES = frozenset("snow beach grass meadow night stars jungle desert city water sunset kitchen".split())  # noqa: SIM905


class Reader(nn.Module):
    """The text encoder and its read-outs; only the encoder is kept."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        answers = [len(names) for names in LABELS.values()] + [len(_BACKDROPS)]
        self.heads = nn.ModuleList(nn.Linear(WIDTH, n) for n in answers)
        self.to_word = nn.Linear(WIDTH, WIDTH)

    def loss(self, ids: Tensor, labels: Tensor, pad: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids).last_hidden_state
        row = torch.arange(len(ids))
        end = ids.eq(49407).int().argmax(1)
        later = torch.minimum(end + 1 + pad, torch.tensor(ids.shape[1] - 1))
        total = hidden.new_zeros(())
        table = self.encoder.get_input_embeddings().weight
        for place in (end, later):
            state = hidden[row, place]
            total = total + sum(F.cross_entropy(head(state), labels[:, i]) for i, head in enumerate(self.heads))
            rare = labels[:, -1] >= 0
            if rare.sum() > 1:
                wanted = F.normalize(table[labels[rare, -1]].detach(), dim=-1)
                alike = F.normalize(self.to_word(state[rare]), dim=-1) @ wanted.T / 0.1
                total = total + 0.3 * F.cross_entropy(alike, torch.arange(len(wanted)))
        loss: Tensor = total
        return loss


def train_text(work: Path, tokenizer: CLIPTokenizer, count: int, plan: Plan) -> CLIPTextModel:
    torch.manual_seed(3)
    reader = Reader(new_text_encoder())
    ids, labels = captions(work, tokenizer, count)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([3, step])
        rows, wording = rng.integers(0, count, plan.batch), rng.integers(0, WORDINGS, plan.batch)
        length = 77 if step % 8 == 0 else 32  # most steps spare themselves the long tail of padding
        pad = torch.from_numpy(rng.integers(0, length, plan.batch))
        return reader.loss(ids[rows, wording][:, :length], labels[rows, wording], pad)

    fit("text", reader, loss, plan, work)
    trained: CLIPTextModel = reader.encoder
    return trained


@torch.no_grad()
def text_states(work: Path, encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """Last hidden states of all captions, float16 [count, wordings, 77, width]."""
    path = work / f"states-{len(ids)}-{fingerprint(encoder)}.pt"
    if path.exists():
        states: Tensor = torch.load(path, weights_only=True)
        return states
    flat = ids.flatten(0, 1)
    out = torch.empty(*flat.shape, WIDTH, dtype=torch.float16)
    for start in tqdm(range(0, len(flat), 256), "reading captions"):
        out[start : start + 256] = encoder(input_ids=flat[start : start + 256]).last_hidden_state.half()
    out = out.view(*ids.shape, WIDTH)
    torch.save(out, path)
    return out
