"""Weights that stay in float8: the numbers of files in float8, and the nearest ones of others."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import diffgraft as dg
from diffgraft.bases.float8 import Float8
from diffgraft.bases.quantized import bytes_when_quantized
from tests.conftest import flow_folder_of


def quantized(weight: Tensor) -> Float8:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight.data = weight
    return Float8(layer)


@pytest.fixture
def weight() -> Tensor:
    return 0.02 * torch.randn(70, 40, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_scaled", [True, False])
def test_files_in_float8_keep_their_numbers(is_scaled: bool, dtype: torch.dtype, weight: Tensor) -> None:
    """Of a scaled file, products are read that are rounded to the precision of the base."""
    scale = weight.abs().max() / 448 if is_scaled else torch.tensor(1.0)
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    read = (numbers.float() * scale).to(dtype)
    found = quantized(read)
    assert torch.equal(found.weight.view(torch.float8_e4m3fn).float() * found.scale > 0, read > 0)
    if is_scaled:
        assert torch.equal(found.weight, numbers.view(torch.uint8))
        assert found.scale == pytest.approx(float(scale), rel=1e-3)
    assert (found.dequantized(dtype) - read).abs().max() <= 2**-23 * read.abs().max()


def test_others_get_the_nearest_numbers(weight: Tensor) -> None:
    """Half a step of three bits of mantissa, or of the smallest number, 2⁻⁹."""
    found = quantized(weight)
    step = torch.maximum(weight.abs() * 2**-3, torch.tensor(found.scale * 2**-9))
    assert ((found.dequantized() - weight).abs() <= 0.51 * step).all()
    assert (quantized(torch.zeros(3, 5)).dequantized() == 0).all()
    large = quantized(1e4 * weight.bfloat16())
    assert large.dequantized().isfinite().all()


def test_a_base_in_float8(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = flow_folder_of("flux2-klein", tmp_path_factory)
    plain, base = dg.load_base(folder, torch.bfloat16), dg.load_base(folder, torch.bfloat16, quantize="fp8")
    assert base.hash == plain.hash
    assert base.denoiser.dtype == torch.bfloat16
    taken = sum(value.nbytes for value in base.denoiser.parameters())
    assert taken == bytes_when_quantized(plain.denoiser, "fp8") < 0.55 * bytes_when_quantized(plain.denoiser, "none")
    base.to(dtype=torch.float32)  # the bytes of float8 are not cast
    assert sum(value.dtype == torch.uint8 for value in base.denoiser.parameters()) > 10
