"""What a run does not need leaves the accelerator's memory, and is there again for drawing."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from diffgraft.bases import Base, load_base
from diffgraft.trainers.runtime.offload import loaded, offload, offloadable, onload


class Elsewhere:
    """A base as if it were on another device: where its parts have been sent is noted."""

    def __init__(self, base: Base, patch: pytest.MonkeyPatch, device: str) -> None:
        self.sent: list[tuple[str, str]] = []
        patch.setattr(type(base), "device", property(lambda _: torch.device(device)))
        for name, part in base.parts():
            patch.setattr(part, "to", lambda where, name=name: self.sent.append((name, str(where))))


def test_vae_and_text_encoder_go_and_come(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base("tiny")
    assert offloadable(base, has_texts=True) == []
    elsewhere = Elsewhere(base, monkeypatch, "cuda:0")
    assert offloadable(base, has_texts=False) == ["vae"]
    names = offloadable(base, has_texts=True)
    assert names == ["vae", "text_encoder"]
    offload(base, names)
    with loaded(base, names):
        assert elsewhere.sent[2:] == [("vae", "cuda:0"), ("text_encoder", "cuda:0")]
    assert elsewhere.sent[:2] == elsewhere.sent[4:] == [("vae", "cpu"), ("text_encoder", "cpu")]
    onload(base, names)
    assert elsewhere.sent[6:] == elsewhere.sent[2:4]


def test_the_vae_of_an_inpainting_base_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = replace(load_base("tiny"))
    base.unet.register_to_config(in_channels=9)
    monkeypatch.setattr(type(base), "device", property(lambda _: torch.device("cuda:0")))
    assert offloadable(base, has_texts=False) == []
