"""Adapter files keep their bytes from one version to the next: recipe and seed decide what is trained."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffgraft.bases import Base
from tests.trainers.trained_adapters import DIGESTS, RUNS, adapter_of, digests, kernels


@pytest.fixture(autouse=True, scope="module")
def _own_class_images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Those of other tests are drawn in another way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFGRAFT_CACHE", str(tmp_path_factory.mktemp("bytes")))
        yield


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_trains_the_same_adapter_as_ever(name: str, base: Base, tmp_path: Path) -> None:
    known = json.loads(DIGESTS.read_text("utf-8"))
    known = {processor: own for processor, own in known.items() if name in own}  # methods came later than others
    found = digests(adapter_of(name, base, tmp_path))
    assert found["shape"] in {own[name]["shape"] for own in known.values()}, "names, shapes or header have changed"
    values = {processor: own[name]["values"] for processor, own in known.items()}
    if kernels() not in known and found["values"] not in values.values():  # other kernels round differently
        pytest.skip(f"the digests of this processor are not known: {kernels()}")
    assert found["values"] == values.get(kernels(), found["values"])
