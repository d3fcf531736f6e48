"""Numbered samples of the broad world, their captions, and the token ids of those captions."""

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from diffgraft.bases.tiny.train.pictures import SEED
from diffgraft.bases.tiny.world.broad import Sample, random_sample

WORDINGS = 2
"""Number of captions written for each sample."""
LENGTH = 32
"""Number of tokens stored for each caption; every caption of the broad world is shorter."""
START, END = 49406, 49407
"""Ids of CLIP's start and end tokens; the end token is also the padding token."""


def rare_words(tokenizer: CLIPTokenizer) -> list[str]:
    """Return rare words for the trigger's place: every seventh word of three to six letters in the vocabulary.

    The list is shuffled with a fixed seed, so that any part of it is as varied as the whole.
    """
    entries = [entry[:-4] for entry in tokenizer.get_vocab() if entry.endswith("</w>")]
    words = sorted(word for word in entries if word.isascii() and word.isalpha() and 3 <= len(word) <= 6)[::7]
    return [words[position] for position in np.random.default_rng(SEED).permutation(len(words))]


def sample_at(index: int, words: list[str]) -> Sample:
    """Return sample number `index`; the same index and list of rare words always give the same sample."""
    return random_sample(np.random.default_rng([SEED, 4, index]), words)


def captions_of(sample: Sample, index: int) -> list[str]:
    """Return `WORDINGS` captions of `sample`, the sample number `index`."""
    return [sample.caption(np.random.default_rng([SEED, 5, index, wording])) for wording in range(WORDINGS)]


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Tokenize captions to int32 token ids [n, `LENGTH`], padded with the end token."""
    ids = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    return torch.as_tensor(ids, dtype=torch.int32)


def pad_ids(ids: Tensor) -> Tensor:
    """Pad token ids [n, `LENGTH`] to int64 [n, 77] with the end token, as a pipeline pads prompts."""
    return torch.nn.functional.pad(ids.long(), (0, 77 - ids.shape[1]), value=END)
