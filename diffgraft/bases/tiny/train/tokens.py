"""Writer of the tokenizer's files: CLIP's byte-pair vocabulary of 49,408 entries, built from its list of merges."""

import gzip
import json
from pathlib import Path

MERGES = 49152 - 256 - 2
"""Number of merges that CLIP uses from its list; with 2 × 256 bytes and 2 special tokens they make 49,408 entries."""


def _byte_letters() -> list[str]:
    """Return a printable character for each byte, in vocabulary order (GPT-2's table, Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


def write_tokenizer(merges_gz: Path, folder: Path) -> None:
    """Write ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json`` from ``bpe_simple_vocab_16e6.txt.gz``."""
    merges = gzip.decompress(merges_gz.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    letters = _byte_letters()
    entries = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
