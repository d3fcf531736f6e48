"""Samples of the broad world by number, their captions, and the captions' tokens."""

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from diffgraft.bases.tiny.train.pictures import SEED
from diffgraft.bases.tiny.world.broad import Sample, random_sample

WORDINGS = 2
"""Captions written for each sample."""
LENGTH = 32
"""Tokens stored of a caption; every caption of the broad world is shorter."""
START, END = 49406, 49407
"""Ids of the tokens at both ends of a caption; the end token also pads."""


def rare_words(tokenizer: CLIPTokenizer) -> list[str]:
    """A seventh of the vocabulary's lower-case words of three to six letters, to stand where a trigger would.

    They are shuffled, always in the same way, so that any part of the list is as varied as the whole.
    """
    entries = [entry[:-4] for entry in tokenizer.get_vocab() if entry.endswith("</w>")]
    words = sorted(word for word in entries if word.isascii() and word.isalpha() and 3 <= len(word) <= 6)[::7]
    return [words[place] for place in np.random.default_rng(SEED).permutation(len(words))]


def sample_at(index: int, words: list[str]) -> Sample:
    """The sample with this number: a function of the number and the list of rare words alone."""
    return random_sample(np.random.default_rng([SEED, 4, index]), words)


def captions_of(sample: Sample, index: int) -> list[str]:
    """`WORDINGS` captions of the sample with this number."""
    return [sample.caption(np.random.default_rng([SEED, 5, index, wording])) for wording in range(WORDINGS)]


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Captions as int32 token ids [n, `LENGTH`], padded with the end token."""
    ids = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    return torch.as_tensor(ids, dtype=torch.int32)


def padded(ids: Tensor) -> Tensor:
    """Ids [n, `LENGTH`] → int64 [n, 77], padded as a pipeline pads prompts."""
    return torch.nn.functional.pad(ids.long(), (0, 77 - ids.shape[1]), value=END)
