"""Adapter files keep their bytes from one version to the next: recipe and seed decide what is trained."""

import json
from pathlib import Path

import pytest

from diffgraft.bases import Base
from tests.trainers.trained import DIGESTS, RUNS, adapter_of, digests, kernels


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_trains_the_same_adapter_as_ever(name: str, base: Base, tmp_path: Path) -> None:
    known = json.loads(DIGESTS.read_text("utf-8"))
    found = digests(adapter_of(name, base, tmp_path))
    assert found["shape"] in {own[name]["shape"] for own in known.values()}, "names, shapes or header have changed"
    if kernels() in known:  # other vector instructions round otherwise
        assert found == known[kernels()][name]
