"""What a processor without bfloat16 is told, and only that one."""

import warnings
from pathlib import Path

import pytest
import torch

import diffgraft as dg
from diffgraft.bases import Base
from diffgraft.devices import warn_of_slow_bfloat16
from diffgraft.generation.session import Session
from tests.recipes import SUBJECT

WARNING = "This processor has no bfloat16 instructions"


def test_who_is_warned_of_slow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffgraft.devices.has_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match=WARNING):
        warn_of_slow_bfloat16("bfloat16", torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, device in (("float32", "cpu"), ("", "cpu"), ("bfloat16", "cuda")):
            warn_of_slow_bfloat16(name, torch.device(device))
        monkeypatch.setattr("diffgraft.devices.has_bfloat16", lambda: True)
        warn_of_slow_bfloat16("bfloat16", torch.device("cpu"))


def test_plan_and_generate_warn_of_slow_bfloat16(base: Base, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffgraft.devices.has_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match=WARNING):
        dg.plan(SUBJECT, base=base, images=pictures, subject="dog", precision="bfloat16", output="runs/a")
    monkeypatch.setattr(Session, "draw", lambda *_: [])
    with pytest.warns(UserWarning, match=WARNING):
        dg.generate("a dog", precision="bfloat16", device="cpu")
