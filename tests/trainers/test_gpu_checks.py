"""What `pytest -m gpu` does at real sizes, here on a processor with small models of the same configurations."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffgraft.bases import load_base
from diffgraft.trainers.optim.optimizers import _FACTORIES
from tests.conftest import flow_folder_of
from tests.trainers import gpu_checks
from tests.trainers.gpu_checks import losses_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_steps_in_bfloat16(family: str, folders: Path, pictures: Path, tmp_path: Path) -> None:
    base = load_base(folders / family, torch.bfloat16)
    more: dict[str, Any] = {"resolution": 128, "precision": "bfloat16", "gradient_checkpointing": True}
    run = gpu_checks.trained(base, pictures, tmp_path / "run", **more, text_encoder=True)
    assert any(path.startswith("text_encoder.") for path in run.adapter.modules)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base(kind: Any, folders: Path, pictures: Path, tmp_path: Path) -> None:
    base = load_base(folders / "sdxl", torch.bfloat16, quantize=kind)
    found, wanted = gpu_checks.as_float_weights_say(base, CPU)
    assert torch.equal(found, wanted)
    more: dict[str, Any] = {"resolution": 128, "precision": "bfloat16", "options": {"dora": True}}
    gpu_checks.trained(base, pictures, tmp_path / "run", **more)


def test_a_run_that_was_stopped(folders: Path, pictures: Path, tmp_path: Path) -> None:
    base = load_base(folders / "sd1")
    runs = gpu_checks.stopped_and_never_stopped(base, pictures, tmp_path, resolution=128)
    assert losses_of(runs[0]) == losses_of(runs[1])


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_blocks_in_main_memory(
    kind: Any, pictures: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = load_base(flow_folder_of("flux2-klein", tmp_path_factory), quantize=kind)
    runs, _ = gpu_checks.swapped_and_not(base, pictures, tmp_path, 2, resolution=32, quantize=kind)
    assert runs[0].adapter_file.read_bytes() == runs[1].adapter_file.read_bytes()


@pytest.mark.parametrize("name", _FACTORIES)
def test_optimizers(name: str) -> None:
    places, optimizer = gpu_checks.walked(name, CPU)
    again, _ = gpu_checks.walked(name, CPU)
    assert all(torch.equal(value, again[key]) for key, value in places.items())
    assert not optimizer.defaults.get("fused")
