"""The real models with random weights on one GPU: `pytest -m gpu`, with some 24 GB of memory on it and beside it."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import is_xformers_available

from benchmarks.scale import random_base
from diffgraft.bases import Base, load_base
from diffgraft.bases.quantize import quantized
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.optim.optimizers import _FACTORIES
from diffgraft.trainers.runtime.block_swap import swapped_bytes
from tests.flow_bases import wide_klein
from tests.trainers import gpu_checks
from tests.trainers.gpu_checks import losses_of
from tests.trainers.test_optimizers import parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU, and PyTorch finds none here"),
    pytest.mark.filterwarnings("default"),  # of what libraries warn there is theirs
]
GPU = torch.device("cuda")
HALF: dict[str, Any] = {"precision": "bfloat16", "resolution": 256}


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def half() -> Base:
    """Stable Diffusion 1.5 in bfloat16; every run leaves it as it was."""
    return random_base("sd1").to(dtype=torch.bfloat16)


def test_steps_of_stable_diffusion_1_5(half: Base, pictures: Path, tmp_path: Path) -> None:
    """At 512 pixels, with the text encoder."""
    more = {**HALF, "resolution": 512, "text_encoder": True}
    gpu_checks.trained(half, pictures, tmp_path / "run", **more)
    spent = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gpu_checks.trained(half, pictures, tmp_path / "spared", **more, gradient_checkpointing=True)
    assert torch.cuda.max_memory_allocated() < spent < 24e9


def test_steps_of_stable_diffusion_xl(pictures: Path, tmp_path: Path) -> None:
    """At 1024 pixels; then its layers in 4 bits, and both text encoders, too."""
    base = random_base("sdxl").to(dtype=torch.bfloat16)
    more = {**HALF, "resolution": 1024, "batch": 1, "gradient_checkpointing": True}
    gpu_checks.trained(base, pictures, tmp_path / "run", **more)
    spent = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gpu_checks.trained(quantized(base, "nf4"), pictures, tmp_path / "nf4", **more, text_encoder=True)
    assert torch.cuda.max_memory_allocated() < spent < 24e9


@pytest.mark.parametrize("times", [3, 1000])
def test_overflows_in_half_precision(
    times: int, half: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW is fused here, and leaves an update out by itself."""
    base = copy.deepcopy(half).to(dtype=torch.float16)
    path = gpu_checks.overflowing(base, times, monkeypatch)
    more = {**HALF, "precision": "float16", "steps": 24}
    if times < 20:
        run = gpu_checks.trained(base, pictures, tmp_path / "run", **more)
        assert any(delta.leaves["lora_up"].any() for (delta,) in run.adapter.deltas.values())
        return
    told = rf"at step 20, after 20 skipped updates in a row: the loss is .* is that of unet\.{path}"
    with pytest.raises(DiffgraftError, match=told):
        gpu_checks.trained(base, pictures, tmp_path / "run", **more)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base(kind: Any, half: Base, pictures: Path, tmp_path: Path) -> None:
    """As float weights of the same values; it is moved to the GPU, and has its bits when it is back."""
    base = quantized(copy.deepcopy(half), kind)
    found, wanted = gpu_checks.as_float_weights_say(base, GPU)
    assert (found - wanted).norm() < 1e-2 * wanted.norm()
    gpu_checks.trained(base, pictures, tmp_path / "run", **HALF, text_encoder=True, options={"dora": True})


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
def test_blocks_in_main_memory(kind: Any, pictures: Path, tmp_path: Path) -> None:
    """FLUX.2 klein with one double and eight single blocks, of which all wait: at most two are there at once."""
    base = load_base(wide_klein(tmp_path / "klein", 8), torch.bfloat16, quantize=kind)
    waiting, slots = swapped_bytes(base, 9, kind)
    runs, (plain, swapped) = gpu_checks.swapped_and_not(base, pictures, tmp_path, 9, **HALF, quantize=kind)
    assert losses_of(runs[1]) == pytest.approx(losses_of(runs[0]), rel=1e-2)
    assert plain - swapped > 0.5 * (waiting - slots)


@pytest.mark.parametrize("name", _FACTORIES)
def test_optimizers(name: str) -> None:
    """All get about where they get on a processor; those of 8 bits round, and those that take signs may turn."""
    found, optimizer = gpu_checks.walked(name, GPU)
    wanted, _ = gpu_checks.walked(name, torch.device("cpu"))
    assert bool(optimizer.defaults.get("fused")) == (name == "adamw")
    for key, start in parameters().items():
        way = (wanted[key] - start).detach().norm()
        assert (found[key] - wanted[key]).norm() < (0.01 if name in ("adamw", "adafactor") else 0.2) * way, key


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_run_that_was_stopped(optimizer: str, half: Base, pictures: Path, tmp_path: Path) -> None:
    """Not to the same bits, as on a processor: kernels of a GPU may add up in any order."""
    more = {**HALF, "optimizer": optimizer, "rank": 64}
    again, never = gpu_checks.stopped_and_never_stopped(half, pictures, tmp_path, **more)
    assert losses_of(again) == pytest.approx(losses_of(never), rel=1e-2)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "plain"},
        {"attention": "sliced"},
        {"attention": "xformers"},
        {"channels_last": True},
        {"compile": True},
        {"compile": True, "quantize": "nf4", "channels_last": True},
    ],
    ids=lambda settings: ", ".join(f"{key}={value}" for key, value in settings.items()),
)
def test_other_ways_to_compute_the_same(settings: dict[str, Any], half: Base, pictures: Path, tmp_path: Path) -> None:
    if settings.get("attention") == "xformers" and not is_xformers_available():
        pytest.skip("the package xformers is not installed")
    base = quantized(copy.deepcopy(half), settings.get("quantize", "none"))
    runs = [
        gpu_checks.trained(base, pictures, tmp_path / str(number), **HALF, **more)
        for number, more in enumerate(({}, settings))
    ]
    assert losses_of(runs[1]) == pytest.approx(losses_of(runs[0]), rel=1e-2)
