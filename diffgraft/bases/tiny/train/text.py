"""Stage 3 of the training: the text encoder, trained to predict from a caption what the picture shows.

Linear heads on two hidden states, at the end token and at a later padding token, predict thing, colour, setting, style
and backdrop. If a caption contains a rare word, both states must also match the embedding of that word's token, so
that a word unknown to the base (a trigger) still reaches the UNet.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffgraft.bases.tiny.judge import LABELS
from diffgraft.bases.tiny.train.fit import StagePlan, fit
from diffgraft.bases.tiny.train.samples import (
    END,
    LENGTH,
    START,
    WORDINGS,
    captions_of,
    pad_ids,
    rare_words,
    sample_at,
    tokens,
)
from diffgraft.bases.tiny.train.work_folder import read_tensors, write_tensors
from diffgraft.bases.tiny.world import COLOURS
from diffgraft.bases.tiny.world.broad import Sample, nouns
from diffgraft.bases.tiny.world.scene import SETTING_WORDS

WIDTH = 64
ANSWERS = {**LABELS, "thing": nouns(), "backdrop": ("none", *COLOURS)}
"""Label kind that is predicted from a caption → its class names."""
_NOT_SAID = -100
"""Label of anything that the caption does not mention; `cross_entropy` ignores this value."""


def new_text_encoder() -> CLIPTextModel:
    """Create the untrained text encoder: CLIP's architecture with four layers of width `WIDTH`."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=WIDTH,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
    )
    encoder = CLIPTextModel(config)
    embeddings = {name: p for name, p in encoder.named_parameters() if "embedding.weight" in name}
    for name, table in embeddings.items():
        # token embeddings start large, so that untrained words still affect the hidden states
        nn.init.normal_(table, std=0.2 if "token" in name else 0.05)
    return encoder


def labels_of_caption(sample: Sample, text: str) -> list[int]:
    """Return the class index of each kind in `ANSWERS`; -100 for a setting that `text` does not mention."""
    scene = sample.scene
    phrases = [words.format(colour=scene.backdrop) for words in SETTING_WORDS[scene.setting]]
    classes = {
        "thing": scene.thing,
        "setting": scene.setting if any(phrase in text for phrase in phrases) else None,
        "style": scene.style,
        "colour": scene.colour or "own",
        "backdrop": scene.backdrop if f"{scene.backdrop} background" in text else "none",
    }
    return [_NOT_SAID if classes[kind] is None else names.index(str(classes[kind])) for kind, names in ANSWERS.items()]


def captions(work: Path, tokenizer: CLIPTokenizer, count: int) -> tuple[Tensor, Tensor]:
    """Return token ids [count, wordings, `LENGTH`] and labels [count, wordings, kinds + 1] of random captions.

    Each sample has captions in several wordings. The labels of a caption are the class index of each kind in `ANSWERS`
    and the token id of its rare word; -100 for anything that the caption does not mention.
    """
    path = work / f"captions-{count}.pt"
    if path.exists():
        stored = read_tensors(path, ("ids", "labels"))
        return stored["ids"], stored["labels"]
    words, texts, labels = rare_words(tokenizer), [], []
    for index in tqdm(range(count), "writing captions", mininterval=5):
        sample = sample_at(index, words)
        token = int(tokenizer.convert_tokens_to_ids(sample.rare + "</w>")) if sample.rare else _NOT_SAID
        for text in captions_of(sample, index):
            texts.append(text)
            labels.append([*labels_of_caption(sample, text), token])
    ids = tokens(tokenizer, texts).view(count, WORDINGS, LENGTH)
    out = ids, torch.tensor(labels).view(count, WORDINGS, -1)
    write_tensors(path, {"ids": out[0], "labels": out[1]})
    return out


class Reader(nn.Module):
    """The text encoder with the linear heads it is trained through; the heads are discarded after training."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(WIDTH, len(names)) for names in ANSWERS.values())
        self.to_word = nn.Linear(WIDTH, WIDTH)

    def loss(self, ids: Tensor, labels: Tensor, pad: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            ids: Token ids [n, length].
            labels: Labels [n, kinds + 1], as `captions` returns them.
            pad: Offset [n] from the first padding token to the one whose hidden state is used.
        """
        hidden = self.encoder(input_ids=ids).last_hidden_state
        row = torch.arange(len(ids))
        end = ids.eq(END).int().argmax(1)
        padding = torch.minimum(end + 1 + pad, torch.tensor(ids.shape[1] - 1))
        total = hidden.new_zeros(())
        table = self.encoder.get_input_embeddings().weight
        for position in (end, padding):
            state = hidden[row, position]
            total = total + sum(F.cross_entropy(head(state), labels[:, i]) for i, head in enumerate(self.heads))
            rare = labels[:, -1] >= 0
            if rare.sum() > 1:
                target = F.normalize(table[labels[rare, -1]].detach(), dim=-1)
                similarity = F.normalize(self.to_word(state[rare]), dim=-1) @ target.T / 0.1
                total = total + 0.3 * F.cross_entropy(similarity, torch.arange(len(target)))
        loss: Tensor = total
        return loss


def train_text(work: Path, tokenizer: CLIPTokenizer, count: int, plan: StagePlan) -> CLIPTextModel:
    """Train the text encoder on the captions of `count` samples, or resume from the checkpoint in `work`."""
    torch.manual_seed(3)
    reader = Reader(new_text_encoder())
    ids, labels = captions(work, tokenizer, count)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([3, step])
        rows, wording = rng.integers(0, count, plan.batch), rng.integers(0, WORDINGS, plan.batch)
        # only every eighth step is padded to 77 tokens, which saves time
        batch = pad_ids(ids[rows, wording]) if step % 8 == 0 else ids[rows, wording].long()
        pad = torch.from_numpy(rng.integers(0, batch.shape[1], plan.batch))
        return reader.loss(batch, labels[rows, wording], pad)

    fit("text", reader, loss, plan, work, f"{count} pictures")
    trained: CLIPTextModel = reader.encoder
    return trained
